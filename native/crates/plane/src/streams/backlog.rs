//! The backlog: the body of an answer that orders events. Its last bytes are not for the client but say up to where
//! in the log the rest goes.

use tokio::io::{AsyncRead, AsyncWrite};

use crate::buf::Inbox;
use crate::http::HeadError;
use crate::http::body::{Body, Piece};
use crate::pump::{Flow, PumpError};

/// The cursor at the end: decimal digits, zeros in front.
pub const CURSOR_BYTES: usize = 20;

/// Content on its way, of which the last bytes are held back.
#[derive(Debug, Default)]
pub struct Withheld(Vec<u8>);

impl Withheld {
    /// Takes more in.
    pub fn push(&mut self, content: &[u8]) {
        self.0.extend_from_slice(content);
    }

    /// What can surely be passed on.
    pub fn take(&mut self) -> Vec<u8> {
        let keep = self.0.split_off(self.0.len().saturating_sub(CURSOR_BYTES));
        std::mem::replace(&mut self.0, keep)
    }

    /// The cursor, if what is left is one.
    pub fn cursor(&self) -> Option<u64> {
        let is_whole = self.0.len() == CURSOR_BYTES && self.0.iter().all(u8::is_ascii_digit);
        is_whole.then(|| std::str::from_utf8(&self.0).ok()?.parse().ok()).flatten()
    }
}

/// Appends content as one chunk; an empty one would end the body.
pub fn push_chunk(out: &mut Vec<u8>, content: &[u8]) {
    if !content.is_empty() {
        out.extend_from_slice(format!("{:x}\r\n", content.len()).as_bytes());
        out.extend_from_slice(content);
        out.extend_from_slice(b"\r\n");
    }
}

/// Sends `head` and the backlog that starts in `inbox` and goes on in `reader`; returns the cursor at its end.
pub async fn pass<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    flow: &Flow<'_>,
    head: &[u8],
    body: &mut Body,
    inbox: &mut Inbox,
    reader: &mut R,
    writer: &mut W,
) -> Result<u64, PumpError> {
    let mut withheld = Withheld::default();
    let mut out = head.to_vec();
    loop {
        let is_over = take_in(body, inbox, &mut withheld).map_err(PumpError::Malformed)?;
        let content = withheld.take();
        if flow.is_unchunked {
            out.extend_from_slice(&content);
        } else {
            push_chunk(&mut out, &content);
        }
        if !out.is_empty() {
            flow.write(writer, &[], &out).await?;
            out.clear();
        }
        if is_over {
            let broken = PumpError::Malformed(HeadError::Malformed("The backlog ends without a cursor."));
            return withheld.cursor().ok_or(broken);
        }
        flow.wait(flow.read);
        match inbox.fill(reader).await {
            Ok(0) | Err(_) => return Err(PumpError::Read),
            Ok(_) => {}
        }
    }
}

/// Takes in all content that is here; true at the end of the body.
fn take_in(body: &mut Body, inbox: &mut Inbox, withheld: &mut Withheld) -> Result<bool, HeadError> {
    loop {
        let count = match body.next(inbox.data())? {
            Piece::Content(count) => {
                withheld.push(&inbox.data()[..count]);
                count
            }
            Piece::Framing(count) | Piece::Trailers(count) => count,
            Piece::More => return Ok(false),
            Piece::End => return Ok(true),
        };
        inbox.consume(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_the_cursor_back_however_it_is_cut() {
        let text = b": open\n\ndata: 1\n\n00000000000000000042";
        for cut in 1..text.len() {
            let mut withheld = Withheld::default();
            let mut passed = Vec::new();
            for piece in text.chunks(cut) {
                withheld.push(piece);
                passed.extend(withheld.take());
            }
            assert_eq!(passed, b": open\n\ndata: 1\n\n");
            assert_eq!(withheld.cursor(), Some(42));
        }
    }

    #[test]
    fn takes_nothing_else_for_a_cursor() {
        for text in [&b""[..], b"42", b"0000000000000000004x", b"99999999999999999999", b"+0000000000000000042"] {
            let mut withheld = Withheld::default();
            withheld.push(text);
            assert!(withheld.take().is_empty());
            assert_eq!(withheld.cursor(), None);
        }
    }
}
