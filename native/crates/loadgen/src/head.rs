//! As much of HTTP/1.1 as well-meaning proxies send back.

use memchr::memmem;

/// What a response's head says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its length, with the empty line.
    pub len: usize,
    pub status: u16,
    pub body: Body,
    /// The connection ends after this response.
    pub is_last: bool,
}

/// How the body is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    Length(usize),
    Chunked,
    UntilClose,
}

/// The head at the start of `input`: none if it is not complete, an error if it is none.
pub fn parse(input: &[u8]) -> Result<Option<Head>, ()> {
    let Some(end) = memmem::find(input, b"\r\n\r\n") else { return Ok(None) };
    let mut lines = input[..end].split(|&b| b == b'\n').map(<[u8]>::trim_ascii);
    let line = lines.next().ok_or(())?;
    let status = line.strip_prefix(b"HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(number).ok_or(())?;
    let mut head = Head { len: end + 4, status: status as u16, body: Body::UntilClose, is_last: false };
    for line in lines {
        let Some(at) = memchr::memchr(b':', line) else { return Err(()) };
        let (name, value) = (&line[..at], line[at + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"content-length") {
            head.body = Body::Length(number(value).ok_or(())?);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            head.body = Body::Chunked;
        } else if name.eq_ignore_ascii_case(b"connection") {
            head.is_last = value.eq_ignore_ascii_case(b"close");
        }
    }
    if status < 200 || status == 204 || status == 304 {
        head.body = Body::Length(0);
    }
    Ok(Some(head))
}

fn number(digits: &[u8]) -> Option<usize> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Takes the chunk framing out of a body that arrives in pieces.
#[derive(Default)]
pub struct Unchunk {
    left: usize,
    line: Vec<u8>,
}

impl Unchunk {
    /// Appends what `input` holds of the content. False once the last chunk has come.
    pub fn feed(&mut self, mut input: &[u8], out: &mut Vec<u8>) -> Result<bool, ()> {
        while !input.is_empty() {
            if self.left > 0 {
                let count = self.left.min(input.len());
                out.extend_from_slice(&input[..count]);
                self.left -= count;
                input = &input[count..];
                continue;
            }
            let Some(at) = memchr::memchr(b'\n', input) else {
                self.line.extend_from_slice(input);
                return Ok(true);
            };
            self.line.extend_from_slice(&input[..at]);
            input = &input[at + 1..];
            // The end of the chunk before comes as an empty line.
            let size = self.line.trim_ascii();
            if !size.is_empty() {
                let digits = std::str::from_utf8(size).map_err(|_| ())?;
                self.left = usize::from_str_radix(digits, 16).map_err(|_| ())?;
                if self.left == 0 {
                    return Ok(false);
                }
            }
            self.line.clear();
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_says_how_the_body_ends() {
        let head = |text: &str| parse(text.as_bytes()).unwrap().unwrap();
        assert_eq!(head("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").body, Body::Length(5));
        assert_eq!(head("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").body, Body::Chunked);
        assert_eq!(head("HTTP/1.1 200 OK\r\n\r\n").body, Body::UntilClose);
        assert!(head("HTTP/1.1 502 Bad\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").is_last);
        assert_eq!(parse(b"HTTP/1.1 200 OK\r\nContent-"), Ok(None));
        assert_eq!(parse(b"HTTP/1.1 2x0 OK\r\n\r\n"), Err(()));
    }

    #[test]
    fn chunks_are_joined_however_they_are_cut() {
        let body = b"5\r\nhello\r\n1\r\n \r\n5\r\nworld\r\n0\r\n\r\n";
        for size in 1..body.len() {
            let (mut unchunk, mut out) = (Unchunk::default(), Vec::new());
            for piece in body.chunks(size) {
                if !unchunk.feed(piece, &mut out).unwrap() {
                    break;
                }
            }
            assert_eq!(out, b"hello world");
        }
    }
}
