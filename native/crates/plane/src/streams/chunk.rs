//! Bytes that are gathered into one chunk of the chunked coding.

/// Capacity to begin with.
const ROOM: usize = 256 * 1024;

/// Bytes on their way to the client, as one chunk.
pub struct Chunk {
    /// What to send.
    pub bytes: Vec<u8>,
    is_unchunked: bool,
    start: usize,
}

/// Room for the size, written once it is known.
const SIZE_LINE: &[u8] = b"00000000\r\n";

impl Chunk {
    /// For a body that is chunked, or not.
    pub fn new(is_unchunked: bool) -> Self {
        Self { bytes: Vec::with_capacity(ROOM), is_unchunked, start: 0 }
    }

    /// Starts a chunk after `head`.
    pub fn begin(&mut self, head: &[u8]) {
        self.bytes.clear();
        self.bytes.extend_from_slice(head);
        if !self.is_unchunked {
            self.bytes.extend_from_slice(SIZE_LINE);
        }
        self.start = self.bytes.len();
    }

    /// Whether nothing was gathered.
    pub fn is_empty(&self) -> bool {
        self.bytes.len() == self.start
    }

    /// Completes the chunk; `is_last`: and the body.
    pub fn end(&mut self, is_last: bool) {
        if self.is_unchunked {
            return;
        }
        let size = self.bytes.len() - self.start;
        if size == 0 {
            self.bytes.truncate(self.start - SIZE_LINE.len());
        } else {
            let line = self.start - SIZE_LINE.len();
            self.bytes[line..line + 8].copy_from_slice(format!("{size:08x}").as_bytes());
            self.bytes.extend_from_slice(b"\r\n");
        }
        if is_last {
            self.bytes.extend_from_slice(b"0\r\n\r\n");
        }
    }
}
