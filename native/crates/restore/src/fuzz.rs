//! What must hold for any bytes; see `native/fuzz`. The seals are made right, or nothing behind them would be reached.
#![allow(clippy::missing_panics_doc)] // To panic is how they tell.

use std::fs;
use std::path::PathBuf;

use crate::pack::{MAGIC as INDEX_MAGIC, parse_index};
use crate::stream::{self, MAGIC as STREAM_MAGIC};

const BYTES_MAX: u64 = 1 << 20;

/// An index is refused, or its chunks make up its files.
pub fn index(input: &[u8]) {
    let _ = parse_index(input);
    let Ok(files) = parse_index(&sealed(INDEX_MAGIC, input)) else { return };
    for file in files {
        assert!(crate::check_name(&file.name).is_ok());
        assert_eq!(file.chunks.iter().map(|chunk| chunk.len as u64).sum::<u64>(), file.size);
    }
}

/// A stream is refused, or becomes plain files within the limit; what was imported exports and imports as the same.
pub fn image(input: &[u8]) {
    let (first, second) = (Scratch::new("a"), Scratch::new("b"));
    let _ = stream::import(input, &first.0, BYTES_MAX);
    let (first, source) = (Scratch::new("a"), sealed(STREAM_MAGIC, input));
    let Ok(manifest) = stream::import(&source[..], &first.0, BYTES_MAX) else { return };
    let files = first.files();
    assert!(files.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>() <= BYTES_MAX);
    let names: Vec<_> = files.iter().map(|(name, _)| name.clone()).collect();
    let mut again = Vec::new();
    stream::export(&mut again, &manifest, &first.0, &names).expect("what was imported can be exported");
    assert_eq!(stream::import(&again[..], &second.0, BYTES_MAX).expect("our own stream"), manifest);
    assert_eq!(second.files(), files);
}

fn sealed(magic: &[u8], input: &[u8]) -> Vec<u8> {
    let mut bytes = [magic, input].concat();
    let seal = blake3::hash(&bytes);
    bytes.extend(seal.as_bytes());
    bytes
}

/// An empty directory that goes with this value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("sandgate-fuzz-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("the temporary directory can be written to");
        Self(path)
    }

    fn files(&self) -> Vec<(String, Vec<u8>)> {
        let entries = fs::read_dir(&self.0).expect("it is there").map(|entry| entry.expect("it is there").path());
        let mut files: Vec<_> = entries
            .map(|path| (path.file_name().expect("a name").to_str().expect("plain").to_owned(), path))
            .map(|(name, path)| (name, fs::read(path).expect("it is there")))
            .collect();
        files.sort();
        files
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_bytes_hold() {
        let empty_image = [0, 0, 0, 0, 0];
        let one_empty_file = [0, 0, 0, 0, 1, b'a', 0, 0, 0, 0, 0];
        for input in [&b""[..], &empty_image, &one_empty_file, &[0xff; 40], b"\x01a\0\0\0\0\0\0\0\0\0\0\0\0"] {
            index(input);
            image(input);
        }
    }
}
