//! The retained output of one channel: the bytes from `start` to `end` of everything the process ever wrote there.

/// First allocation; most processes say little.
const SMALL_BYTES: usize = 16 * 1024;
/// Second one, before the whole limit.
const MEDIUM_BYTES: usize = 256 * 1024;

/// A ring over absolute offsets. It allocates as it fills, at most `limit` bytes.
#[derive(Debug)]
pub struct Ring {
    buffer: Vec<u8>,
    start: u64,
    end: u64,
    limit: usize,
}

impl Ring {
    pub fn new(limit: usize) -> Self {
        Self { buffer: Vec::new(), start: 0, end: 0, limit }
    }

    /// Offset of the oldest byte still held.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Offset after the newest byte: how much was written in all.
    pub fn end(&self) -> u64 {
        self.end
    }

    pub fn len(&self) -> usize {
        (self.end - self.start) as usize
    }

    pub fn is_allocated(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Bytes that still fit without dropping any.
    pub fn free(&self) -> usize {
        self.limit - self.len()
    }

    fn position(&self, offset: u64) -> usize {
        (offset % self.buffer.len() as u64) as usize
    }

    /// The next free stretch to write to, empty when full. It may be shorter than all that is free.
    pub fn space(&mut self) -> &mut [u8] {
        if self.len() == self.buffer.len() {
            self.grow(self.len() + 1);
        }
        if self.len() == self.buffer.len() {
            return &mut [];
        }
        let from = self.position(self.end);
        let contiguous = (self.buffer.len() - from).min(self.buffer.len() - self.len());
        &mut self.buffer[from..from + contiguous]
    }

    /// The first `bytes` of [`Ring::space`] are filled.
    pub fn advance(&mut self, bytes: usize) {
        debug_assert!(self.len() + bytes <= self.buffer.len());
        self.end += bytes as u64;
    }

    /// Append `bytes`, dropping the oldest ones where the limit asks for it.
    pub fn append(&mut self, bytes: &[u8]) {
        let kept = &bytes[bytes.len().saturating_sub(self.limit)..];
        let end = self.end + bytes.len() as u64;
        self.start = self.start.max(end.saturating_sub(self.limit as u64));
        // More than fits came at once: what was held is gone, and so is the head of `bytes`.
        self.end = self.end.max(self.start);
        self.grow(self.len() + kept.len());
        let mut rest = kept;
        while !rest.is_empty() {
            let space = self.space();
            let n = space.len().min(rest.len());
            space[..n].copy_from_slice(&rest[..n]);
            self.advance(n);
            rest = &rest[n..];
        }
    }

    /// Forget bytes before `offset`.
    pub fn discard_to(&mut self, offset: u64) {
        self.start = offset.clamp(self.start, self.end);
    }

    /// The bytes from `offset` on, at most `bytes` of them, in two pieces.
    pub fn slices(&self, offset: u64, bytes: usize) -> [&[u8]; 2] {
        let offset = offset.clamp(self.start, self.end);
        let bytes = bytes.min((self.end - offset) as usize);
        if bytes == 0 {
            return [&[], &[]];
        }
        let from = self.position(offset);
        let first = bytes.min(self.buffer.len() - from);
        [&self.buffer[from..from + first], &self.buffer[..bytes - first]]
    }

    /// Nothing more will come: give back what is not needed to hold the rest.
    pub fn seal(&mut self) {
        self.limit = self.len();
        self.reallocate(self.len());
    }

    fn grow(&mut self, needed: usize) {
        if needed <= self.buffer.len() {
            return;
        }
        let step = [SMALL_BYTES, MEDIUM_BYTES, self.limit].into_iter().find(|step| *step >= needed);
        let size = step.unwrap_or(self.limit).min(self.limit);
        if size > self.buffer.len() {
            self.reallocate(size);
        }
    }

    fn reallocate(&mut self, size: usize) {
        let mut buffer = vec![0; size];
        let mut offset = self.start;
        for piece in self.slices(self.start, self.len()) {
            for piece in split_at_wrap(piece, offset, size).into_iter().filter(|piece| !piece.is_empty()) {
                let at = (offset % size as u64) as usize;
                buffer[at..at + piece.len()].copy_from_slice(piece);
                offset += piece.len() as u64;
            }
        }
        self.buffer = buffer;
    }
}

/// Cut `piece`, which starts at `offset`, where a buffer of `size` wraps.
fn split_at_wrap(piece: &[u8], offset: u64, size: usize) -> [&[u8]; 2] {
    if piece.is_empty() {
        return [&[], &[]];
    }
    let room = size - (offset % size as u64) as usize;
    let (first, second) = piece.split_at(room.min(piece.len()));
    [first, second]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(ring: &Ring) -> Vec<u8> {
        ring.slices(ring.start(), ring.len()).concat()
    }

    #[test]
    fn it_holds_the_newest_bytes_at_their_offsets() {
        for limit in [1, 7, 4096, 20_000, 300_000] {
            let mut ring = Ring::new(limit);
            let mut all = Vec::new();
            for round in 0_usize..200 {
                let bytes: Vec<u8> = (0..(round * 37) % 5000).map(|i| (i * 7 + round) as u8).collect();
                ring.append(&bytes);
                all.extend_from_slice(&bytes);
                assert_eq!(ring.end(), all.len() as u64);
                assert_eq!(ring.start(), all.len().saturating_sub(limit) as u64);
                assert_eq!(content(&ring), all[ring.start() as usize..]);
            }
            let middle = ring.start() + ring.len() as u64 / 2;
            ring.discard_to(middle);
            assert_eq!(content(&ring), all[middle as usize..]);
            ring.seal();
            assert_eq!(content(&ring), all[middle as usize..]);
            assert_eq!(ring.free(), 0);
            assert!(ring.space().is_empty());
        }
    }

    #[test]
    fn writing_in_place_stops_when_it_is_full() {
        let mut ring = Ring::new(100_000);
        let mut written = 0;
        loop {
            let space = ring.space();
            if space.is_empty() {
                break;
            }
            space.fill(written as u8);
            let n = space.len();
            ring.advance(n);
            written += n;
        }
        assert_eq!((written, ring.free()), (100_000, 0));
        ring.discard_to(10);
        assert_eq!(ring.space().len(), 10);
    }
}
