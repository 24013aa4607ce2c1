//! The parsers: what they find does not depend on how the input was cut, and nothing makes them panic.

use sandgate_plane::compose::{self, Peer};
use sandgate_plane::http::body::{Body, Piece};
use sandgate_plane::http::fields::Name;
use sandgate_plane::http::{Framing, HeadError, find_end, request, response};

/// A small generator of numbers (xorshift): the same run every time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// Content, trailers and what follows, of a body that arrives in the given cuts.
fn read(
    framing: Framing,
    input: &[u8],
    mut cut: impl FnMut(usize) -> usize,
) -> Result<(Vec<u8>, Vec<u8>, usize), HeadError> {
    let (mut body, mut content, mut trailers) = (Body::new(framing), Vec::new(), Vec::new());
    let (mut at, mut have) = (0, 0);
    loop {
        match body.next(&input[at..have])? {
            Piece::Content(count) => {
                content.extend_from_slice(&input[at..at + count]);
                at += count;
            }
            Piece::Framing(count) => at += count,
            Piece::Trailers(count) => {
                trailers.extend_from_slice(&input[at..at + count]);
                at += count;
            }
            Piece::End => return Ok((content, trailers, at)),
            Piece::More if have == input.len() => return Err(HeadError::TooLarge),
            Piece::More => have = (have + 1 + cut(input.len() - have)).min(input.len()),
        }
    }
}

#[test]
fn a_body_is_the_same_however_it_is_cut() {
    let chunked = b"5\r\nhello\r\n00a;x=\"y\"\r\n world\r\n\r\n\r\n0\r\nX-A: 1\r\nX-B: 2\r\n\r\nGET / HTTP/1.1\r\n";
    let whole = (b"hello world\r\n\r\n".to_vec(), b"X-A: 1\r\nX-B: 2\r\n\r\n".to_vec(), chunked.len() - 16);
    assert_eq!(read(Framing::Chunked, chunked, |left| left), Ok(whole.clone()));
    assert_eq!(read(Framing::Chunked, chunked, |_| 0), Ok(whole.clone()));
    let mut random = Random(1);
    for _ in 0..2000 {
        assert_eq!(read(Framing::Chunked, chunked, |_| random.below(7)), Ok(whole.clone()));
    }
    assert_eq!(read(Framing::Length(3), b"abcdef", |_| 0), Ok((b"abc".to_vec(), Vec::new(), 3)));
    assert_eq!(read(Framing::None, b"abc", |_| 0), Ok((Vec::new(), Vec::new(), 0)));
}

#[test]
fn no_input_makes_a_parser_panic() {
    let seeds: [&[u8]; 4] = [
        b"POST /a?b HTTP/1.1\r\nHost: x:1\r\nContent-Length: 3\r\nCookie: sandgate_preview=a; b\r\n\r\nabc",
        b"GET http://x/ HTTP/1.0\r\nhost: x\r\nConnection: upgrade, y\r\nUpgrade: z\r\nY: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nSet-Cookie: a; Domain=b; C\r\n\r\n",
        b"ff;a\r\n0\r\n\r\n0\r\nA: b\r\n\r\n",
    ];
    let peer = Peer::new(Some([1, 2, 3, 4].into()), compose::HTTP);
    let (mut random, mut fields, mut out) = (Random(7), Vec::new(), Vec::new());
    for round in 0..200_000 {
        let mut input = seeds[round % seeds.len()].to_vec();
        for _ in 0..=random.below(4) {
            let at = random.below(input.len());
            match random.below(3) {
                0 => input[at] = b"\r\n\0 :;,/-_\x7f\xff0a"[random.below(14)],
                1 => drop(input.remove(at)),
                _ => input.insert(at, random.below(256) as u8),
            }
        }
        let len = find_end(&input, random.below(input.len()), 65536).ok().flatten().unwrap_or(input.len());
        out.clear();
        if let Ok(parsed) = request::parse(&input[..len], &mut fields) {
            compose::request(&mut out, &input[..len], &fields, &parsed, None, &peer);
            let mut again = Vec::new();
            let passed = request::parse(&out, &mut again).expect("what is sent on is well-formed");
            assert_eq!(passed.framing, parsed.framing);
            assert_eq!(out[passed.host.clone()], input[parsed.host.clone()]);
        }
        let _ = response::parse(&input[..len], false, &mut fields);
        let _ = read(Framing::Chunked, &input, |_| 1);
    }
}

#[test]
fn a_head_is_found_wherever_the_search_starts() {
    let head = b"GET / HTTP/1.1\r\nHost: x\r\n\r\nrest";
    for seen in 0..head.len() - 6 {
        assert_eq!(find_end(head, seen, 100), Ok(Some(head.len() - 4)), "{seen}");
    }
    assert_eq!(find_end(&head[..20], 0, 100), Ok(None));
    assert_eq!(find_end(head, 0, head.len() - 4), Ok(Some(head.len() - 4)));
    assert_eq!(find_end(head, 0, head.len() - 5), Err(HeadError::TooLarge));
    assert_eq!(find_end(&head[..20], 0, 20), Err(HeadError::TooLarge));
}

#[test]
fn names_that_must_not_be_forged_are_known_in_every_spelling() {
    let head =
        b"GET / HTTP/1.1\r\nHost: x\r\nX_FORWARDED-for: 1\r\nx_sandgate_x: 1\r\nX-Sandgat-E: 1\r\nForwarded: 1\r\n\
        X-Real_Ip: 1\r\nX-MIOSA-PREVIEW-TOKEN: 1\r\nX-Api_Key: 1\r\n\r\n";
    let mut fields = Vec::new();
    request::parse(head, &mut fields).expect("well-formed");
    let names: Vec<Name> = fields.iter().map(|field| field.name).collect();
    let expected = [
        Name::Host,
        Name::Forwarding,
        Name::Private,
        Name::Other,
        Name::Forwarding,
        Name::Forwarding,
        Name::PreviewToken,
        Name::ApiKey,
    ];
    assert_eq!(names, expected);
}

#[test]
fn tokens_are_cut_out_of_targets() {
    let cases = [
        ("/", "/"),
        ("/a?", "/a?"),
        ("/a?b=1&c", "/a?b=1&c"),
        ("/a?preview_token=x", "/a"),
        ("/a?preview_token=x&b=1", "/a?b=1"),
        ("/a?b=1&preview_token=x&&c", "/a?b=1&c"),
        ("/a?mt=mp_x&mp=miosa_pv_y&mt=own&mp", "/a?mt=own&mp"),
        ("/a?xpreview_token=1", "/a?xpreview_token=1"),
        ("/preview_token=1?b", "/preview_token=1?b"),
    ];
    for (target, expected) in cases {
        let mut out = Vec::new();
        compose::push_target(&mut out, target.as_bytes());
        assert_eq!(String::from_utf8_lossy(&out), expected, "{target}");
    }
}

#[test]
fn an_upgrade_that_connection_names_beside_other_fields_stays_one() {
    let head = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: x-a, Upgrade\r\nX-A: 1\r\nUpgrade: websocket\r\n\r\n";
    let mut fields = Vec::new();
    let parsed = request::parse(head, &mut fields).unwrap();
    let mut sent = Vec::new();
    let peer = Peer::new(Some([127, 0, 0, 1].into()), compose::HTTP);
    compose::request(&mut sent, head, &fields, &parsed, None, &peer);
    assert!(request::parse(&sent, &mut fields).unwrap().is_upgrade);
    assert!(!String::from_utf8(sent).unwrap().contains("X-A"));
}
