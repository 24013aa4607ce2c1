//! The codec against its own description, at its limits and on arbitrary bytes.

use proptest::prelude::*;
use sandgate_frame::{
    COUNT_BYTES, DATA_BYTES_MAX, Decoder, FrameError, HEADER_BYTES, Kind, PAYLOAD_BYTES_MAX, fuzz, push, push_count,
    push_data,
};

fn any_kind() -> impl Strategy<Value = Kind> {
    (1_u8..=13).prop_map(|byte| Kind::from_byte(byte).expect("1 to 13 are types"))
}

fn any_frame() -> impl Strategy<Value = (Kind, u8, u32, Vec<u8>)> {
    any_kind().prop_flat_map(|kind| {
        let (shortest, longest) = kind.payload_range();
        let payload = prop::collection::vec(any::<u8>(), shortest..=longest.min(shortest + 2000));
        (Just(kind), any::<u8>(), any::<u32>(), payload)
    })
}

proptest! {
    #[test]
    fn frames_survive_the_trip_however_the_bytes_are_cut(
        frames in prop::collection::vec(any_frame(), 0..20),
        piece_bytes in 1_usize..3000,
    ) {
        let mut bytes = Vec::new();
        for (kind, channel, stream, payload) in &frames {
            push(&mut bytes, *kind, *channel, *stream, payload);
        }
        let (decoded, error, left) = fuzz::decode(bytes.chunks(piece_bytes));
        prop_assert_eq!(decoded, frames);
        prop_assert_eq!((error, left), (None, 0));
    }

    #[test]
    fn arbitrary_bytes_decode_the_same_whole_and_cut(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        fuzz::check(&bytes);
    }

    #[test]
    fn nearly_valid_bytes_decode_the_same_whole_and_cut(
        frames in prop::collection::vec(any_frame(), 1..6),
        cut in any::<u8>(),
        flipped in any::<prop::sample::Index>(),
        mask in any::<u8>(),
    ) {
        let mut bytes = vec![cut];
        for (kind, channel, stream, payload) in &frames {
            push(&mut bytes, *kind, *channel, *stream, payload);
        }
        let at = flipped.index(bytes.len());
        bytes[at] ^= mask;
        fuzz::check(&bytes);
    }
}

fn header(length: usize, kind: u8, reserved: u8) -> Vec<u8> {
    let mut bytes = (length as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&[kind, 0, reserved, 0, 7, 0, 0, 0]);
    bytes
}

fn error_of(bytes: &[u8]) -> Option<FrameError> {
    fuzz::decode([bytes]).1
}

#[test]
fn layout_is_the_documented_one() {
    let mut bytes = Vec::new();
    push_data(&mut bytes, 2, 0x0102_0304, 5, b"ab");
    assert_eq!(bytes, b"\x0a\0\0\0\x05\x02\0\0\x04\x03\x02\x01\x05\0\0\0\0\0\0\0ab");
}

#[test]
fn data_limit_is_exact() {
    let longest = COUNT_BYTES + DATA_BYTES_MAX;
    assert_eq!(longest, 262_152);
    assert_eq!(error_of(&header(longest, Kind::Data as u8, 0)), None);
    assert_eq!(
        error_of(&header(longest + 1, Kind::Data as u8, 0)),
        Some(FrameError::BadLength(Kind::Data, longest + 1))
    );
    assert_eq!(error_of(&header(7, Kind::Data as u8, 0)), Some(FrameError::BadLength(Kind::Data, 7)));
}

#[test]
fn json_limit_is_exact() {
    assert_eq!(error_of(&header(PAYLOAD_BYTES_MAX, Kind::Reply as u8, 0)), None);
    let long = PAYLOAD_BYTES_MAX + 1;
    assert_eq!(error_of(&header(long, Kind::Reply as u8, 0)), Some(FrameError::BadLength(Kind::Reply, long)));
}

#[test]
fn unknown_types_and_reserved_fields_are_refused() {
    assert_eq!(error_of(&header(0, 0, 0)), Some(FrameError::UnknownType(0)));
    assert_eq!(error_of(&header(0, 14, 0)), Some(FrameError::UnknownType(14)));
    assert_eq!(error_of(&header(0, Kind::Close as u8, 9)), Some(FrameError::ReservedField(9)));
}

#[test]
fn an_untrusted_peer_gets_a_smaller_limit() {
    let mut decoder = Decoder::new(100);
    decoder.feed(&header(101, Kind::Hello as u8, 0));
    assert_eq!(decoder.next_frame(), Err(FrameError::BadLength(Kind::Hello, 101)));
    decoder.set_payload_bytes_max(101);
    assert_eq!(decoder.next_frame(), Ok(None));
}

#[test]
fn an_announced_length_allocates_nothing() {
    let mut decoder = Decoder::default();
    decoder.feed(&header(PAYLOAD_BYTES_MAX, Kind::Open as u8, 0));
    assert_eq!(decoder.next_frame(), Ok(None));
    assert!(decoder.space(1).len() < 64 * 1024);
    assert_eq!(decoder.buffered(), HEADER_BYTES);
}

#[test]
fn counts_are_read_back() {
    let mut bytes = Vec::new();
    push_count(&mut bytes, Kind::Credit, 1, 9, u64::MAX);
    push_data(&mut bytes, 0, 9, 77, b"xyz");
    push(&mut bytes, Kind::Ping, 0, 0, b"12345678");
    let mut decoder = Decoder::default();
    decoder.feed(&bytes);
    assert_eq!(decoder.next_frame().unwrap().unwrap().count(), Some((u64::MAX, &b""[..])));
    assert_eq!(decoder.next_frame().unwrap().unwrap().count(), Some((77, &b"xyz"[..])));
    assert_eq!(decoder.next_frame().unwrap().unwrap().count(), None);
}
