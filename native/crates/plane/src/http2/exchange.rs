//! One stream, to be read and written as HTTP/1.1.
//!
//! ```text
//! reading:  head ──▶ content as it comes, in chunks unless it has a length ──▶ pending until the client leaves
//! writing:  interim heads*, head ──▶ content ──▶ done; reading then meets the end of input
//! ```
//!
//! What is written was composed by the plane itself, and framing arrives in whole pieces; anything else is a mistake of
//! ours and breaks the stream.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Response};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::request::{Head, push};
use crate::http::body::{Body, Piece};
use crate::http::fields::{self, Field, Name};
use crate::http::{Framing, find_end, response};
use crate::net::Transport;

/// Most bytes given to HTTP/2 at once.
const SEND_BYTES_MAX: usize = 64 * 1024;

/// What of the request is still to be read.
enum Upload {
    Content { is_chunked: bool },
    Trailers { is_chunked: bool },
    Over,
}

/// How far the response is.
enum Download {
    Head { respond: SendResponse<Bytes>, head: Vec<u8> },
    Content { stream: SendStream<Bytes>, body: Body, left: usize },
    Done,
}

/// See the module.
pub struct Exchange {
    request: RecvStream,
    upload: Upload,
    /// Bytes to be read next, and how many of them were content whose credit is due when they have been.
    incoming: Vec<u8>,
    taken: usize,
    credit: usize,
    is_head: bool,
    download: Download,
}

fn broken(error: impl Into<h2::Error>) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, error.into())
}

fn mistaken(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Exchange {
    /// For a request that begins with `head`. `is_head`: its method is `HEAD`.
    pub fn new(head: Head, is_head: bool, request: RecvStream, respond: SendResponse<Bytes>) -> Self {
        let Head { bytes, is_chunked } = head;
        let upload = if request.is_end_stream() { Upload::Over } else { Upload::Content { is_chunked } };
        let download = Download::Head { respond, head: Vec::new() };
        Self { request, upload, incoming: bytes, taken: 0, credit: 0, is_head, download }
    }

    /// Gives out what is waiting; returns the credit once all of it is gone.
    fn hand_over(&mut self, buf: &mut ReadBuf<'_>) {
        let waiting = &self.incoming[self.taken..];
        let count = waiting.len().min(buf.remaining());
        buf.put_slice(&waiting[..count]);
        self.taken += count;
        if self.taken == self.incoming.len() {
            self.incoming.clear();
            self.taken = 0;
            // An error means that the stream is over: nobody waits for the credit.
            let _ = self.request.flow_control().release_capacity(std::mem::take(&mut self.credit));
        }
    }

    /// Gets more to read. Ready when there is some, or when nothing will come any more.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.upload {
            Upload::Content { is_chunked } => match ready!(self.request.poll_data(cx)) {
                Some(data) => self.take_in(&data.map_err(broken)?, is_chunked),
                None => self.upload = Upload::Trailers { is_chunked },
            },
            Upload::Trailers { is_chunked } => {
                let trailers = ready!(self.request.poll_trailers(cx)).map_err(broken)?;
                if is_chunked {
                    self.end_chunks(trailers.as_ref());
                }
                self.upload = Upload::Over;
            }
            Upload::Over => return self.poll_gone(cx),
        }
        Poll::Ready(Ok(()))
    }

    fn take_in(&mut self, data: &Bytes, is_chunked: bool) {
        self.credit += data.len();
        // An empty chunk would be the last one.
        if is_chunked && !data.is_empty() {
            self.incoming.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
            self.incoming.extend_from_slice(data);
            self.incoming.extend_from_slice(b"\r\n");
        } else {
            self.incoming.extend_from_slice(data);
        }
    }

    fn end_chunks(&mut self, trailers: Option<&HeaderMap>) {
        self.incoming.extend_from_slice(b"0\r\n");
        for (name, value) in trailers.into_iter().flatten() {
            push(&mut self.incoming, name, value.as_bytes());
        }
        self.incoming.extend_from_slice(b"\r\n");
    }

    /// After the request: notices a client that takes it back.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let reason = match &mut self.download {
            Download::Head { respond, .. } => ready!(respond.poll_reset(cx)),
            Download::Content { stream, .. } => ready!(stream.poll_reset(cx)),
            Download::Done => return Poll::Ready(Ok(())),
        };
        Poll::Ready(Err(reason.map_or_else(broken, broken)))
    }

    /// Takes more of a head; returns how much of `data` belongs to it.
    fn write_head(&mut self, data: &[u8]) -> io::Result<usize> {
        let Download::Head { respond, head } = &mut self.download else { return Ok(0) };
        let before = head.len();
        head.extend_from_slice(data);
        let end = find_end(head, before, usize::MAX).map_err(|_| mistaken("a head is malformed"))?;
        let Some(end) = end else { return Ok(data.len()) };
        head.truncate(end);
        let mut fields = Vec::new();
        let parsed = response::parse(head, self.is_head, &mut fields).map_err(|_| mistaken("a head is malformed"))?;
        let mut message = Response::new(());
        *message.status_mut() = http::StatusCode::from_u16(parsed.status).map_err(|_| mistaken("no such status"))?;
        *message.headers_mut() = header_map(head, &fields);
        if parsed.status < 200 {
            head.clear();
            respond.send_informational(message).map_err(broken)?;
            return Ok(end - before);
        }
        let is_over = matches!(parsed.framing, Framing::None | Framing::Length(0));
        let stream = respond.send_response(message, is_over).map_err(broken)?;
        self.download = if is_over {
            Download::Done
        } else {
            Download::Content { stream, body: Body::new(parsed.framing), left: 0 }
        };
        Ok(end - before)
    }

    /// Sends what `data` holds of the content, as far as the client permits; returns how much was taken.
    fn poll_content(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let mut used = 0;
        while let Download::Content { stream, body, left } = &mut self.download {
            let rest = &data[used..];
            if *left > 0 {
                let granted = match poll_granted(stream, (*left).min(rest.len()), cx) {
                    Poll::Pending if used > 0 => return Poll::Ready(Ok(used)),
                    granted => ready!(granted)?,
                };
                *left -= granted;
                used += granted;
                let is_over = *left == 0 && body.is_done();
                stream.send_data(Bytes::copy_from_slice(&rest[..granted]), is_over).map_err(broken)?;
                if is_over {
                    self.download = Download::Done;
                }
                continue;
            }
            match body.next(rest).map_err(|_| mistaken("a body is malformed"))? {
                Piece::Content(count) => *left = count,
                Piece::Framing(count) => used += count,
                Piece::Trailers(count) => {
                    finish(stream, &rest[..count])?;
                    used += count;
                    self.download = Download::Done;
                }
                Piece::More if rest.is_empty() => return Poll::Ready(Ok(used)),
                Piece::More | Piece::End => return Poll::Ready(Err(mistaken("a body is cut within its framing"))),
            }
        }
        Poll::Ready(Ok(used))
    }
}

/// How many of `wanted` bytes, at least one, may be sent now.
fn poll_granted(stream: &mut SendStream<Bytes>, wanted: usize, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
    let wanted = wanted.min(SEND_BYTES_MAX);
    stream.reserve_capacity(wanted);
    loop {
        match stream.capacity() {
            0 => match ready!(stream.poll_capacity(cx)) {
                Some(granted) => granted.map_err(broken)?,
                None => return Poll::Ready(Err(broken(Reason::CANCEL))),
            },
            granted => return Poll::Ready(Ok(granted.min(wanted))),
        };
    }
}

/// Ends a stream with the trailers of `section`, if it has any.
fn finish(stream: &mut SendStream<Bytes>, section: &[u8]) -> io::Result<()> {
    let mut trailers = Vec::new();
    fields::parse(section, 0, &mut trailers).map_err(|_| mistaken("trailers are malformed"))?;
    if trailers.is_empty() {
        stream.send_data(Bytes::new(), true).map_err(broken)
    } else {
        stream.send_trailers(header_map(section, &trailers)).map_err(broken)
    }
}

/// The fields that HTTP/2 has; those of the connection are none of its business.
fn header_map(head: &[u8], fields: &[Field]) -> HeaderMap {
    let is_passed = |field: &&Field| {
        !matches!(field.name, Name::Connection | Name::HopByHop | Name::TransferEncoding | Name::Upgrade)
    };
    let mut map = HeaderMap::with_capacity(fields.len());
    for field in fields.iter().filter(is_passed) {
        // What the parser takes, these take; a limit on their number lies far above ours.
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(field.name(head)), HeaderValue::from_bytes(field.value(head)))
        {
            map.append(name, value);
        }
    }
    map
}

impl Transport for Exchange {}

impl AsyncRead for Exchange {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // A response that is over ends the exchange, whatever the client still has to say.
        while this.taken == this.incoming.len() {
            if matches!(this.download, Download::Done) {
                return Poll::Ready(Ok(()));
            }
            ready!(this.poll_more(cx))?;
        }
        this.hand_over(buf);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Exchange {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        match this.download {
            Download::Head { .. } => Poll::Ready(this.write_head(data)),
            Download::Content { .. } => this.poll_content(cx, data),
            Download::Done => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    /// The connection sends by itself.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Ends a body that has no other end.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Download::Content { stream, body, left: 0 } = &mut this.download
            && body.may_end_by_close()
        {
            stream.send_data(Bytes::new(), true).map_err(broken)?;
            this.download = Download::Done;
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Exchange {
    /// A response that was not finished must not look as if it were.
    fn drop(&mut self) {
        match &mut self.download {
            Download::Head { respond, .. } => respond.send_reset(Reason::INTERNAL_ERROR),
            Download::Content { stream, .. } => stream.send_reset(Reason::INTERNAL_ERROR),
            Download::Done => {}
        }
    }
}
