//! What a fuzzer drives: any bytes, cut anywhere, must decode to the same frames or the same error.

use crate::{Decoder, Frame, FrameError, Kind, push};

/// A frame that owns its payload.
type Owned = (Kind, u8, u32, Vec<u8>);

fn owned(frame: &Frame<'_>) -> Owned {
    (frame.kind, frame.channel, frame.stream, frame.payload.to_vec())
}

/// Decode `pieces` one after the other: the frames, the error that ended it, and the bytes left over.
pub fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Owned>, Option<FrameError>, usize) {
    let mut decoder = Decoder::default();
    let mut frames = Vec::new();
    for piece in pieces {
        decoder.feed(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(owned(&frame)),
                Ok(None) => break,
                Err(error) => return (frames, Some(error), decoder.buffered()),
            }
        }
    }
    let left = decoder.buffered();
    (frames, None, left)
}

/// Entry of the fuzz target. The first byte chooses where to cut the rest.
///
/// # Panics
/// If cutting changes the result, or if the frames do not encode to the bytes they came from.
pub fn check(input: &[u8]) {
    let Some((&cut, bytes)) = input.split_first() else {
        return;
    };
    let (frames, error, left) = decode([bytes]);
    let (cut_frames, cut_error, cut_left) = decode(bytes.chunks(usize::from(cut) + 1));
    assert_eq!((&frames, error), (&cut_frames, cut_error));
    if error.is_none() {
        assert_eq!(left, cut_left);
    }
    let mut again = Vec::new();
    for (kind, channel, stream, payload) in &frames {
        push(&mut again, *kind, *channel, *stream, payload);
    }
    assert_eq!(again, bytes[..again.len()]);
}
