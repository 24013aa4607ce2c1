//! Buffers of one worker thread.
//!
//! A connection holds a 128 KiB buffer only while bytes wait in it; an idle connection holds none. Buffers come from a
//! pool of the thread, so that a busy worker neither allocates nor touches fresh memory.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

/// Size of every buffer. Small buffers cost wake-ups and copies: 16 KiB halves the throughput at 64 KiB bodies.
pub const BUFFER_BYTES: usize = 128 * 1024;
/// Unused buffers a thread keeps; more go back to the allocator.
const SPARE_BUFFERS_MAX: usize = 64;
/// Unused head vectors a thread keeps, and the capacity above which one is not worth keeping.
const SPARE_HEADS_MAX: usize = 256;
const SPARE_HEAD_BYTES_MAX: usize = 8 * 1024;

thread_local! {
    static SPARE_BUFFERS: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
    static SPARE_HEADS: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer on loan from the thread's pool.
struct Buffer(Box<[u8]>);

impl Buffer {
    fn take() -> Self {
        let spare = SPARE_BUFFERS.with_borrow_mut(Vec::pop);
        Self(spare.unwrap_or_else(|| vec![0; BUFFER_BYTES].into_boxed_slice()))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.0);
        // At thread exit the pool may be gone already; the bytes are then freed like any others.
        let _ = SPARE_BUFFERS.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < SPARE_BUFFERS_MAX {
                spare.push(bytes);
            }
        });
    }
}

/// A growing vector for a message head, on loan from the thread's pool.
#[derive(Default)]
pub struct HeadBuf(pub Vec<u8>);

impl HeadBuf {
    /// An empty one.
    pub fn take() -> Self {
        Self(SPARE_HEADS.with_borrow_mut(Vec::pop).unwrap_or_default())
    }
}

impl Drop for HeadBuf {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.0);
        if bytes.capacity() == 0 || bytes.capacity() > SPARE_HEAD_BYTES_MAX {
            return;
        }
        bytes.clear();
        let _ = SPARE_HEADS.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < SPARE_HEADS_MAX {
                spare.push(bytes);
            }
        });
    }
}

/// Bytes received and not used yet.
#[derive(Default)]
pub struct Inbox {
    buffer: Option<Buffer>,
    start: usize,
    end: usize,
}

impl Inbox {
    /// What waits.
    pub fn data(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], |buffer| &buffer.0[self.start..self.end])
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether no more fits without consuming.
    pub fn is_full(&self) -> bool {
        self.end - self.start == BUFFER_BYTES
    }

    /// Forgets the first `count` bytes.
    pub fn consume(&mut self, count: usize) {
        self.start += count;
        debug_assert!(self.start <= self.end);
        if self.start == self.end {
            self.release();
        }
    }

    fn release(&mut self) {
        self.buffer = None;
        self.start = 0;
        self.end = 0;
    }

    /// Reads once into the free space. 0 means end of input. Must not be called on a full inbox.
    pub fn poll_fill<R: AsyncRead + Unpin>(&mut self, cx: &mut Context<'_>, reader: &mut R) -> Poll<io::Result<usize>> {
        let buffer = self.buffer.get_or_insert_with(Buffer::take);
        if self.end == BUFFER_BYTES && self.start > 0 {
            buffer.0.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let mut space = ReadBuf::new(&mut buffer.0[self.end..]);
        let outcome = Pin::new(reader).poll_read(cx, &mut space);
        let count = space.filled().len();
        self.end += count;
        if self.start == self.end {
            self.release();
        }
        ready!(outcome)?;
        Poll::Ready(Ok(count))
    }

    /// As [`Self::poll_fill`], waiting.
    pub async fn fill<R: AsyncRead + Unpin>(&mut self, reader: &mut R) -> io::Result<usize> {
        std::future::poll_fn(|cx| self.poll_fill(cx, reader)).await
    }
}
