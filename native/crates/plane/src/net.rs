//! Streams shared by the two directions of one task.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::server::TlsStream;

/// A connection's transport.
pub trait Transport: AsyncRead + AsyncWrite + Unpin {
    /// The socket, where the bytes on it are those of the transport.
    fn socket(&self) -> Option<&TcpStream> {
        None
    }
}

impl Transport for TlsStream<Socket> {}

/// A stream whose read and write side are used by two futures of one task.
///
/// Each poll borrows it for itself only, so no lock and no split is needed.
pub struct Shared<S>(RefCell<S>);

impl<S> Shared<S> {
    /// Takes a stream.
    pub fn new(stream: S) -> Self {
        Self(RefCell::new(stream))
    }

    /// Whether it is a plain socket.
    pub fn is_socket(&self) -> bool
    where
        S: Transport,
    {
        self.0.borrow().socket().is_some()
    }

    /// As `TcpStream::try_io`, waiting. Only for a socket.
    pub fn poll_io<T>(
        &self,
        cx: &mut Context<'_>,
        interest: Interest,
        mut operation: impl FnMut(&TcpStream) -> io::Result<T>,
    ) -> Poll<io::Result<T>>
    where
        S: Transport,
    {
        let stream = self.0.borrow();
        let Some(socket) = stream.socket() else { return Poll::Ready(Err(io::ErrorKind::Unsupported.into())) };
        loop {
            let ready = if interest.is_readable() { socket.poll_read_ready(cx) } else { socket.poll_write_ready(cx) };
            ready!(ready)?;
            match socket.try_io(interest, || operation(socket)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    /// Gives it back.
    pub fn into_inner(self) -> S {
        self.0.into_inner()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for &Shared<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for &Shared<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_write(cx, data)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.borrow().is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_shutdown(cx)
    }
}

/// A connection by TCP or by a Unix socket.
pub enum Socket {
    /// Of a client, or to a port of a sandbox.
    Tcp(TcpStream),
    /// Of a proxy on this machine, or to the API.
    Unix(UnixStream),
}

impl Socket {
    /// Whether an idle connection can still be used, as far as the reactor has told us: open, and with nothing said on
    /// it unasked. Costs no system call unless there is something to read.
    pub fn is_quiet(&self) -> bool {
        let mut byte = [0];
        let tried = match self {
            Self::Tcp(stream) => stream.try_read(&mut byte),
            Self::Unix(stream) => stream.try_read(&mut byte),
        };
        matches!(tried, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// The same by a look at the socket itself, for when the reactor may not have told us yet.
    pub fn is_surely_quiet(&self) -> bool {
        let mut byte = [std::mem::MaybeUninit::uninit()];
        let peeked = match self {
            Self::Tcp(stream) => socket2::SockRef::from(stream).peek(&mut byte),
            Self::Unix(stream) => socket2::SockRef::from(stream).peek(&mut byte),
        };
        matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

impl Transport for Socket {
    fn socket(&self) -> Option<&TcpStream> {
        match self {
            Self::Tcp(stream) => Some(stream),
            Self::Unix(_) => None,
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, data),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, data),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, data),
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, data),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// Writes `head` and `body`, with one call if it takes them, and flushes what the writer keeps back (a TLS stream does;
/// a socket never). `on_progress` is told how much each call took.
pub async fn write_both<W: AsyncWrite + Unpin>(
    writer: &mut W,
    head: &[u8],
    body: &[u8],
    on_progress: impl Fn(usize),
) -> io::Result<()> {
    let (mut head, mut body) = (head, body);
    std::future::poll_fn(|cx| {
        while !head.is_empty() || !body.is_empty() {
            let count = if head.is_empty() {
                ready!(Pin::new(&mut *writer).poll_write(cx, body))?
            } else if body.is_empty() {
                ready!(Pin::new(&mut *writer).poll_write(cx, head))?
            } else {
                ready!(Pin::new(&mut *writer).poll_write_vectored(cx, &[IoSlice::new(head), IoSlice::new(body)]))?
            };
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            on_progress(count);
            let of_head = count.min(head.len());
            head = &head[of_head..];
            body = &body[count - of_head..];
        }
        Pin::new(&mut *writer).poll_flush(cx)
    })
    .await
}
