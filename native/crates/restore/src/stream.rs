//! An image as one stream, to be kept elsewhere or restored on another host.
//!
//! ```text
//! magic; manifest: length u32, bytes; per file: name length u8 (0 ends the list), name, blocks; seal
//! a block: length of the content u32 (0 ends the file), length as stored u32, zstd
//! the seal: BLAKE3 of everything before
//! ```
//!
//! Little endian. It comes from outside: nothing in it is believed before it is checked, and nothing larger than a block
//! is held in memory.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;

use crate::{Error, Result, check_name};

pub(crate) const MAGIC: &[u8; 8] = b"sgimage1";
const BLOCK_BYTES: usize = 1 << 20;
const MANIFEST_BYTES_MAX: usize = 64 << 10;
const FILES_MAX: usize = 16;
const ZSTD_LEVEL: i32 = 1;
const HASH_BYTES: usize = 32;

/// Write a manifest and the files of an image to `target`.
pub fn export(target: impl Write, manifest: &[u8], image: &Path, names: &[String]) -> Result<()> {
    let mut sealed = Sealed { inner: BufWriter::new(target), hasher: blake3::Hasher::new() };
    sealed.write_all(MAGIC)?;
    sealed.write_all(&(manifest.len() as u32).to_le_bytes())?;
    sealed.write_all(manifest)?;
    for name in names {
        check_name(name)?;
        sealed.write_all(&[name.len() as u8])?;
        sealed.write_all(name.as_bytes())?;
        send(&mut sealed, &File::open(image.join(name))?)?;
    }
    sealed.write_all(&[0])?;
    let seal = sealed.hasher.finalize();
    sealed.inner.write_all(seal.as_bytes())?;
    sealed.inner.flush()?;
    Ok(())
}

/// Read a stream into an empty directory; returns the manifest. On an error the caller removes what was written.
pub fn import(source: impl Read, image: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let mut sealed = Sealed { inner: BufReader::new(source), hasher: blake3::Hasher::new() };
    if &sealed.array::<8>()? != MAGIC {
        return Err(Error::corrupt("not an image of this version"));
    }
    let len = sealed.u32()?;
    if len > MANIFEST_BYTES_MAX {
        return Err(Error::corrupt("a manifest of an improper size"));
    }
    let mut manifest = vec![0; len];
    sealed.read_exact(&mut manifest)?;
    let (mut files, mut left) = (0, bytes_max);
    loop {
        let [len] = sealed.array()?;
        if len == 0 {
            break;
        }
        files += 1;
        if files > FILES_MAX {
            return Err(Error::corrupt("too many files"));
        }
        let mut name = vec![0; usize::from(len)];
        sealed.read_exact(&mut name)?;
        let name = String::from_utf8(name).map_err(|_| Error::corrupt("a file with an improper name"))?;
        check_name(&name)?;
        receive(&mut sealed, File::create_new(image.join(name))?, &mut left)?;
    }
    let seal = sealed.hasher.finalize();
    if &sealed.array::<HASH_BYTES>()? != seal.as_bytes() {
        return Err(Error::corrupt("the stream has another hash"));
    }
    Ok(manifest)
}

fn send(sealed: &mut Sealed<impl Write>, file: &File) -> Result<()> {
    let mut block = Vec::with_capacity(BLOCK_BYTES);
    loop {
        block.clear();
        file.take(BLOCK_BYTES as u64).read_to_end(&mut block)?;
        sealed.write_all(&(block.len() as u32).to_le_bytes())?;
        if block.is_empty() {
            return Ok(());
        }
        let packed = zstd::bulk::compress(&block, ZSTD_LEVEL)?;
        sealed.write_all(&(packed.len() as u32).to_le_bytes())?;
        sealed.write_all(&packed)?;
    }
}

fn receive(sealed: &mut Sealed<impl Read>, mut file: File, left: &mut u64) -> Result<()> {
    loop {
        let len = sealed.u32()?;
        if len == 0 {
            return Ok(());
        }
        let stored = sealed.u32()?;
        if len > BLOCK_BYTES || stored > zstd::zstd_safe::compress_bound(BLOCK_BYTES) {
            return Err(Error::corrupt("a block of an improper size"));
        }
        *left = left.checked_sub(len as u64).ok_or(Error::TooLarge)?;
        let mut packed = vec![0; stored];
        sealed.read_exact(&mut packed)?;
        let block = zstd::bulk::decompress(&packed, len).map_err(|_| Error::corrupt("a broken block"))?;
        if block.len() != len {
            return Err(Error::corrupt("a block of another size"));
        }
        file.write_all(&block)?;
    }
}

/// Hashes what passes.
struct Sealed<T> {
    inner: T,
    hasher: blake3::Hasher,
}

impl<T: Write> Write for Sealed<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<T: Read> Read for Sealed<T> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }
}

impl<T: Read> Sealed<T> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<usize> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn exported(files: &[(&str, &[u8])]) -> Vec<u8> {
        let image = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            fs::write(image.path().join(name), bytes).unwrap();
        }
        let names: Vec<_> = files.iter().map(|(name, _)| (*name).to_owned()).collect();
        let mut stream = Vec::new();
        export(&mut stream, b"{\"manifest\": 1}", image.path(), &names).unwrap();
        stream
    }

    fn imported(stream: &[u8], bytes_max: u64) -> Result<Vec<(String, Vec<u8>)>> {
        let image = tempfile::tempdir().unwrap();
        let manifest = import(stream, image.path(), bytes_max)?;
        assert_eq!(manifest, b"{\"manifest\": 1}");
        let mut files: Vec<_> = fs::read_dir(image.path())?
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
            .collect();
        files.sort();
        Ok(files)
    }

    #[test]
    fn what_is_exported_can_be_imported() {
        let large: Vec<u8> = (0..3_000_000_u32).map(|number| (number / 5) as u8).collect();
        let stream = exported(&[("a.img", &large), ("b.img", b"")]);
        assert!(stream.len() < large.len());
        assert_eq!(imported(&stream, 3_000_000).unwrap(), [("a.img".into(), large), ("b.img".into(), Vec::new())]);
        assert!(matches!(imported(&stream, 2_999_999), Err(Error::TooLarge)));
    }

    #[test]
    fn any_change_is_noticed() {
        let stream = exported(&[("a.img", b"some content"), ("b.img", b"more")]);
        for position in 0..stream.len() {
            let mut changed = stream.clone();
            changed[position] ^= 1;
            assert!(import(&changed[..], tempfile::tempdir().unwrap().path(), 1 << 20).is_err(), "at {position}");
            assert!(imported(&stream[..position], 1 << 20).is_err());
        }
    }

    #[test]
    fn names_stay_in_the_directory() {
        for name in ["../a", "/etc/passwd", ".hidden", "A", ""] {
            assert!(check_name(name).is_err());
        }
        assert!(check_name("pages_meta.img").is_ok());
    }
}
