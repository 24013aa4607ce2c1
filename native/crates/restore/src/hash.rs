//! The hash of a file: BLAKE3 of the BLAKE3 hashes of its segments, so that several threads can share the work.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::{Result, parallel};

/// Large enough that a thread's start does not count, small enough for the processor's cache.
const SEGMENT_BYTES: u64 = 1 << 20;

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileHash {
    /// Bytes.
    pub size: u64,
    /// See the module.
    pub hash: blake3::Hash,
}

/// Hash a file that nobody writes to.
pub fn hash_file(path: &Path) -> Result<FileHash> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let segments = parallel::map(size.div_ceil(SEGMENT_BYTES) as usize, |number| {
        let start = number as u64 * SEGMENT_BYTES;
        let mut bytes = vec![0; SEGMENT_BYTES.min(size - start) as usize];
        file.read_exact_at(&mut bytes, start)?;
        Ok(blake3::hash(&bytes))
    })?;
    let mut hasher = blake3::Hasher::new();
    for segment in segments {
        hasher.update(segment.as_bytes());
    }
    Ok(FileHash { size, hash: hasher.finalize() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash_of(bytes: &[u8]) -> FileHash {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, bytes).unwrap();
        hash_file(&path).unwrap()
    }

    #[test]
    fn every_byte_counts() {
        let mut bytes: Vec<u8> = (0..3_000_000_u32).map(|number| (number / 7) as u8).collect();
        let whole = hash_of(&bytes);
        assert_eq!(whole.size, 3_000_000);
        for position in [0, 1 << 20, 2_999_999] {
            bytes[position] ^= 1;
            assert_ne!(hash_of(&bytes).hash, whole.hash);
            bytes[position] ^= 1;
        }
        assert_eq!(hash_of(&bytes), whole);
        assert_ne!(hash_of(&bytes[..2_999_999]).hash, whole.hash);
        assert_eq!(hash_of(&[]).size, 0);
    }
}
