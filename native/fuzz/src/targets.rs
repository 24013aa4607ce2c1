//! The properties. Each takes any bytes and panics when a parser accepts what it must not, or contradicts itself.

use std::net::{IpAddr, Ipv4Addr};

use http::{Request, Uri};
use sandgate_hosts::host::{self, HostName};
use sandgate_plane::admit::Credentials;
use sandgate_plane::compose::{self, HTTPS, Peer, Reply};
use sandgate_plane::http::body::{Body, Piece};
use sandgate_plane::http::{Framing, HeadError, fields, find_end, request as requests, response as responses};
use sandgate_plane::message::{self, Message};
use sandgate_plane::policy::{Policy, Visit};
use sandgate_plane::streams::backlog::{CURSOR_BYTES, Withheld};
use sandgate_plane::streams::event::Batch;
use sandgate_plane::streams::lines::Lines;
use sandgate_plane::streams::machine::Trouble;
use sandgate_plane::streams::order::{self, Order};
use sandgate_plane::streams::span::{Part, Span};
use sandgate_plane::streams::wanted::Wanted;
use sandgate_plane::streams::{file as files, report, time, upload};
use sandgate_plane::table::Table;
use sandgate_plane::trust;

const HEAD_BYTES_MAX: usize = 65536;

/// A policy that has an opinion about everything.
fn policy() -> Policy {
    Policy::new(Some(vec!["*".into()]), false, Some(&["'self'".into()])).expect("a policy")
}

/// What is sent to an upstream reads as one request, to the same host and with the same framing as what came in,
/// whatever a trusted proxy says of the client. The answer to a preflight request reads as one response.
pub fn request(input: &[u8]) {
    let Ok(Some(len)) = find_end(input, 0, HEAD_BYTES_MAX) else { return };
    let head = &input[..len];
    let mut fields = Vec::new();
    let Ok(parsed) = requests::parse(head, &mut fields) else { return };
    let near = Peer::new(Some(IpAddr::V4(Ipv4Addr::LOCALHOST)), HTTPS);
    let told = trust::client_of(&["10.0.0.0/8".parse().expect("a network")], &near, head, &fields);
    let value = |field: Option<&fields::Field>| field.map(|field| field.value(head));
    let visit = Visit {
        origin: value(fields.first()),
        wanted_method: value(fields.get(1)),
        wanted_fields: value(fields.get(2)),
    };
    if let Some(Ok(mut answer)) = policy().preflight(&visit) {
        answer.extend_from_slice(b"\r\n");
        assert_eq!(find_end(&answer, 0, usize::MAX), Ok(Some(answer.len())), "more or less than one head");
        responses::parse(&answer, false, &mut Vec::new()).expect("our own response");
    }
    for (credentials, peer) in [(None, &near), (Some(Credentials::default()), &told)] {
        let mut sent = Vec::new();
        compose::request(&mut sent, head, &fields, &parsed, credentials.as_ref(), peer);
        assert_eq!(find_end(&sent, 0, usize::MAX), Ok(Some(sent.len())), "more or less than one head");
        let mut sent_fields = Vec::new();
        let again = match requests::parse(&sent, &mut sent_fields) {
            Ok(again) => again,
            // What we add may take the head over the limit on fields, and nothing else may be wrong with it.
            Err(error) => {
                assert_eq!(error, HeadError::TooLarge);
                continue;
            }
        };
        assert_eq!(again.framing, parsed.framing);
        assert_eq!(sent[again.host], head[parsed.host.clone()]);
        assert_eq!(sent[again.method], head[parsed.method.clone()]);
        assert_eq!(again.is_upgrade, parsed.is_upgrade);
    }
}

/// What is sent to a client reads as one response of the same status.
pub fn response(input: &[u8]) {
    let Ok(Some(len)) = find_end(input, 0, HEAD_BYTES_MAX) else { return };
    let head = &input[..len];
    let terms = policy().terms(&Visit { origin: Some(b"https://app.example"), ..Visit::default() });
    for (is_head, terms) in [(false, None), (true, Some(&terms)), (false, Some(&terms))] {
        let mut fields = Vec::new();
        let Ok(parsed) = responses::parse(head, is_head, &mut fields) else { return };
        let reply =
            Reply { minor: 1, is_keep_alive: true, is_switch: false, is_unchunked: false, is_preview: true, terms };
        let mut sent = Vec::new();
        compose::response(&mut sent, head, &fields, &parsed, reply);
        assert_eq!(find_end(&sent, 0, usize::MAX), Ok(Some(sent.len())), "more or less than one head");
        let again = match responses::parse(&sent, is_head, &mut Vec::new()) {
            Ok(again) => again,
            // What a policy adds may take the head over the limit on fields.
            Err(error) => {
                assert_eq!((error, terms.is_some()), (HeadError::TooLarge, true));
                continue;
            }
        };
        assert_eq!((again.status, again.framing), (parsed.status, parsed.framing));
    }
}

/// A chunked body has the same content, end and errors however it is cut.
pub fn body(input: &[u8]) {
    let Some((&cut, bytes)) = input.split_first() else { return };
    let whole = unchunk(&[bytes]);
    let pieces: Vec<&[u8]> = bytes.chunks(usize::from(cut) + 1).collect();
    assert_eq!(whole, unchunk(&pieces));
}

/// The content, and how many bytes the body took if it ended; none if it is malformed.
fn unchunk(pieces: &[&[u8]]) -> Option<(Vec<u8>, Option<usize>)> {
    let mut body = Body::new(Framing::Chunked);
    let (mut content, mut waiting, mut used) = (Vec::new(), Vec::new(), 0);
    for piece in pieces {
        waiting.extend_from_slice(piece);
        loop {
            let count = match body.next(&waiting).ok()? {
                Piece::Content(count) => {
                    content.extend_from_slice(&waiting[..count]);
                    count
                }
                Piece::Framing(count) => count,
                Piece::Trailers(count) => {
                    fields::parse(&waiting[..count], 0, &mut Vec::new()).ok()?;
                    count
                }
                Piece::More => break,
                Piece::End => return Some((content, Some(used))),
            };
            waiting.drain(..count);
            used += count;
        }
    }
    Some((content, body.is_done().then_some(used)))
}

/// A host name that is accepted is in its one form, which names the same target.
pub fn host(input: &[u8]) {
    let Ok(name) = HostName::parse(input) else { return };
    let domains = ["localhost".to_owned(), "a.b".to_owned()];
    let target = format!("{:?}", host::classify(name.as_str(), &domains));
    let again = HostName::parse(name.as_str().as_bytes()).expect("its own form");
    assert_eq!(again.as_str(), name.as_str());
    assert_eq!(format!("{:?}", host::classify(again.as_str(), &domains)), target);
}

/// Whatever lines made a table, what is kept of it makes a table of as many sandboxes.
pub fn control(input: &[u8]) {
    let table = Table::default();
    let Ok(text) = std::str::from_utf8(input) else { return };
    obey(text, &table);
    let kept = message::dump(&table);
    let copy = Table::default();
    obey(std::str::from_utf8(&kept).expect("JSON is UTF-8"), &copy);
    assert_eq!(copy.sandboxes(), table.sandboxes());
}

fn obey(text: &str, table: &Table) {
    let mut sync = None;
    for line in text.lines() {
        if let Ok(message) = serde_json::from_str::<Message>(line) {
            // A refusal is an answer.
            let _ = message::apply(message.body, line, table, &mut sync, 1);
        }
    }
}

/// An order judges every event, a stretch of the log is in order, and a backlog is passed on whole but for its cursor.
pub fn streams(input: &[u8]) {
    let mut selections = Vec::new();
    let mut events = Vec::new();
    for line in input.split(|&byte| byte == b'\n') {
        if let Ok(Order::Events(selection)) = order::read(line) {
            selections.push(selection);
        }
        if let Ok(Message { body: message::Body::Publish { after, through, events: records, .. }, .. }) =
            serde_json::from_slice(line)
        {
            let Some(batch) = Batch::new(after, through, records) else { continue };
            assert!(batch.events.iter().all(|event| after < event.seq && event.seq <= through));
            assert!(batch.events.is_sorted_by_key(|event| event.seq));
            events.extend(batch.events);
        }
    }
    for event in &events {
        let mut body = Body::new(Framing::Chunked);
        let Ok(Piece::Framing(start)) = body.next(event.bytes(false)) else { panic!("no chunk") };
        assert_eq!(body.next(&event.bytes(false)[start..]), Ok(Piece::Content(event.bytes(true).len())));
        for selection in &selections {
            let _ = selection.takes(event);
        }
    }
    let mut withheld = Withheld::default();
    let mut passed = Vec::new();
    for piece in input.chunks(7) {
        withheld.push(piece);
        passed.extend(withheld.take());
    }
    assert_eq!(passed.len(), input.len().saturating_sub(CURSOR_BYTES));
    assert!(input.starts_with(&passed));
    if let Some(cursor) = withheld.cursor() {
        assert!(input.ends_with(format!("{cursor:020}").as_bytes()));
    }
}

/// Output becomes the same lines however its bytes are cut, each a JSON string of what was written; an order reads or not.
pub fn output(input: &[u8]) {
    let _ = serde_json::from_slice::<Wanted>(input);
    let _ = Trouble::of(input);
    let Some((&cut, bytes)) = input.split_first() else { return };
    let whole = lines(&[bytes]);
    let pieces: Vec<&[u8]> = bytes.chunks(usize::from(cut) + 1).collect();
    assert_eq!(whole, lines(&pieces));
    let written: String = whole.iter().map(|line| serde_json::from_str::<String>(line).expect("JSON")).collect();
    assert_eq!(written, String::from_utf8_lossy(bytes));
    let (last, others) = whole.split_last().map_or((None, &[][..]), |(last, others)| (Some(last), others));
    assert!(others.iter().all(|line| line.ends_with("\\n\"")) && last.is_none_or(|line| line.len() > 2));
}

/// A part of a file lies within it, a moment reads as one, and a report is one header line that says what was meant.
pub fn file(input: &[u8]) {
    let _ = serde_json::from_slice::<upload::Wanted>(input);
    let _ = serde_json::from_slice::<files::Wanted>(input);
    if let Ok(span) = serde_json::from_slice::<Span>(input) {
        assert!(span.first.is_some() || span.last.is_some());
    }
    let number = |at: usize| input.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
    if let (Some(offset), Some(size)) = (number(0), number(8)) {
        let length = number(16);
        match Part::of(offset, length, size) {
            Some(part) => assert!(part.offset == offset && part.length <= size - offset),
            None => assert!(offset >= size),
        }
        let moment = time::iso(f64::from_bits(size));
        assert!(moment.is_ascii() && moment.ends_with('Z') && !moment.contains('\n'));
    }
    let trouble = Trouble::of(input);
    let line = report::failed(&trouble);
    let text = line.strip_suffix("\r\n").and_then(|line| line.strip_prefix("X-Sandgate-Report: ")).expect("a line");
    assert!(text.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
    let told: serde_json::Value = serde_json::from_str(text).expect("JSON");
    assert_eq!(told["error"]["message"], trouble.message.as_str());
}

/// The lines of output that comes in pieces, as JSON strings.
fn lines(pieces: &[&[u8]]) -> Vec<String> {
    // No line holds a line break itself.
    let mut lines = Lines::new(("\"".into(), "\"\n".into()));
    let mut out = Vec::new();
    for piece in pieces {
        lines.feed(piece, &mut out);
    }
    lines.flush(true, &mut out);
    String::from_utf8(out).expect("UTF-8").lines().map(str::to_owned).collect()
}

/// Frames decode the same however they are cut, and encode to the bytes they came from.
pub fn frame(input: &[u8]) {
    sandgate_frame::fuzz::check(input);
}

/// A request of HTTP/2 becomes exactly one head, or none.
pub fn http2(input: &[u8]) {
    let mut lines = input.split(|&byte| byte == b'\n');
    let mut next = || lines.next().unwrap_or_default();
    let first = next();
    let mut words = first.split(|&byte| byte == b' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let Ok(uri) = Uri::try_from(path) else { return };
    let mut builder = Request::builder().method(method).uri(uri);
    for line in lines {
        let Some(at) = line.iter().position(|&byte| byte == b':') else { continue };
        builder = builder.header(line[..at].trim_ascii(), line[at + 1..].trim_ascii());
    }
    let Ok(made) = builder.body(()) else { return };
    for has_body in [false, true] {
        let Some(head) = sandgate_plane::http2::head(&made, has_body) else { return };
        assert_eq!(find_end(&head.bytes, 0, usize::MAX), Ok(Some(head.bytes.len())), "more or less than one head");
        if let Ok(parsed) = requests::parse(&head.bytes, &mut Vec::new()) {
            assert_eq!(parsed.framing == Framing::Chunked, head.is_chunked);
            assert!(!parsed.is_upgrade);
        }
    }
}

/// An index of a packed image is refused or makes sense.
pub fn index(input: &[u8]) {
    sandgate_restore::fuzz::index(input);
}

/// An image from outside is refused, or becomes plain files within the limit.
pub fn image(input: &[u8]) {
    sandgate_restore::fuzz::image(input);
}
