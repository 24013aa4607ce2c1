//! Images at rest: each file a list of chunks, each chunk compressed and stored once for all images.
//!
//! ```text
//! <image>/index        magic, then per file: name length u8, name, size u64, chunk count u32, chunks
//!                      (length u32, BLAKE3 of the content: 32 bytes), then the BLAKE3 of all before; little endian
//! <chunks>/ab/ab12…    one chunk, zstd, named by the BLAKE3 of what it holds
//! ```
//!
//! A chunk is written under another name and renamed, so one that is there is whole. One that nobody refers to is
//! removed by `collect`; packing and collecting in the same chunk directory must not run at once.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::chunk::{self, PAGE_BYTES, PAGES_MAX};
use crate::{Error, Result, check_name, parallel};

/// Name of the index in an image's directory.
pub const INDEX: &str = "index";

pub(crate) const MAGIC: &[u8; 8] = b"sgindex1";
const HASH_BYTES: usize = 32;
const CHUNK_BYTES_MAX: usize = PAGES_MAX * PAGE_BYTES;
/// The fastest: what matters is that an image can wake soon, and most of the gain is there already.
const ZSTD_LEVEL: i32 = 1;
/// 16 GiB in the smallest chunks that there are.
const INDEX_BYTES_MAX: u64 = 16 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    offset: u64,
    pub(crate) len: usize,
    hash: blake3::Hash,
}

/// A file as an index has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Its name in the image.
    pub name: String,
    /// Its bytes.
    pub size: u64,
    pub(crate) chunks: Vec<Chunk>,
}

/// Store the files of an image as chunks and write its index. Returns the bytes that this added to `chunks`.
///
/// The files stay: whoever calls removes them once everything is synced.
pub fn pack(image: &Path, names: &[String], chunks: &Path) -> Result<u64> {
    let (mut index, mut added) = (MAGIC.to_vec(), 0);
    for name in names {
        check_name(name)?;
        let file = File::open(image.join(name))?;
        let size = file.metadata()?.len();
        let cuts = cut(&file, size)?;
        let stored = parallel::map(cuts.len(), |number| store(&file, cuts[number], chunks))?;
        index.push(name.len() as u8);
        index.extend(name.as_bytes());
        index.extend(size.to_le_bytes());
        index.extend((stored.len() as u32).to_le_bytes());
        for (&(_, len), (hash, bytes)) in cuts.iter().zip(stored) {
            index.extend((len as u32).to_le_bytes());
            index.extend(hash.as_bytes());
            added += bytes;
        }
    }
    let seal = blake3::hash(&index);
    index.extend(seal.as_bytes());
    replace(&image.join(INDEX), &index)?;
    Ok(added)
}

/// Write the files of an image again, from its index. Every chunk is checked against its hash.
pub fn unpack(image: &Path, chunks: &Path) -> Result<()> {
    for packed in read_index(&image.join(INDEX))? {
        let draft = image.join(format!("{}.new", packed.name));
        let file = File::create(&draft)?;
        file.set_len(packed.size)?;
        parallel::map(packed.chunks.len(), |number| {
            let chunk = &packed.chunks[number];
            file.write_all_at(&load(chunk, chunks)?, chunk.offset)?;
            Ok(())
        })?;
        fs::rename(draft, image.join(packed.name))?;
    }
    Ok(())
}

/// Remove every chunk that no index refers to. Returns the bytes freed.
pub fn collect(indexes: &[PathBuf], chunks: &Path) -> Result<u64> {
    let mut used = HashSet::new();
    for path in indexes {
        used.extend(read_index(path)?.into_iter().flat_map(|file| file.chunks).map(|chunk| chunk.hash));
    }
    let used: HashSet<_> = used.into_iter().map(|hash| hash.to_hex().to_string()).collect();
    let mut freed = 0;
    for shelf in entries(chunks)? {
        for path in entries(&shelf)? {
            if path.file_name().and_then(|name| name.to_str()).is_none_or(|name| !used.contains(name)) {
                freed += path.metadata()?.len();
                fs::remove_file(path)?;
            }
        }
    }
    Ok(freed)
}

/// Read an index, whoever wrote it.
pub fn parse_index(bytes: &[u8]) -> Result<Vec<Packed>> {
    let Some((body, seal)) = bytes.split_last_chunk::<HASH_BYTES>() else { return Err(Error::corrupt("a cut index")) };
    if blake3::hash(body).as_bytes() != seal {
        return Err(Error::corrupt("an index with another hash"));
    }
    let mut rest = Reader(body.strip_prefix(MAGIC).ok_or_else(|| Error::corrupt("no index of this version"))?);
    let mut files = Vec::new();
    while !rest.0.is_empty() {
        let len = usize::from(rest.take(1)?[0]);
        let name = std::str::from_utf8(rest.take(len)?).map_err(|_| Error::corrupt("an improper name"))?.to_owned();
        check_name(&name)?;
        let size = rest.u64()?;
        let count = rest.u32()? as usize;
        let (mut chunks, mut offset) = (Vec::new(), 0_u64);
        for _ in 0..count {
            let len = rest.u32()? as usize;
            if len == 0 || len > CHUNK_BYTES_MAX {
                return Err(Error::corrupt("a chunk of an improper size"));
            }
            let hash =
                blake3::Hash::from_slice(rest.take(HASH_BYTES)?).map_err(|_| Error::corrupt("an improper hash"))?;
            chunks.push(Chunk { offset, len, hash });
            offset += len as u64;
        }
        if offset != size {
            return Err(Error::corrupt("chunks that do not make up their file"));
        }
        files.push(Packed { name, size, chunks });
    }
    Ok(files)
}

fn read_index(path: &Path) -> Result<Vec<Packed>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(INDEX_BYTES_MAX).read_to_end(&mut bytes)?;
    parse_index(&bytes)
}

/// Where the chunks of a file begin, and how long they are.
fn cut(file: &File, size: u64) -> Result<Vec<(u64, usize)>> {
    let (mut cuts, mut offset) = (Vec::new(), 0);
    let mut window = Vec::new();
    while offset < size {
        window.resize((CHUNK_BYTES_MAX as u64).min(size - offset) as usize, 0);
        file.read_exact_at(&mut window, offset)?;
        let len = chunk::next(&window);
        cuts.push((offset, len));
        offset += len as u64;
    }
    Ok(cuts)
}

/// Store one chunk unless it is there. Returns its hash and the bytes added.
fn store(file: &File, (offset, len): (u64, usize), chunks: &Path) -> Result<(blake3::Hash, u64)> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset)?;
    let hash = blake3::hash(&bytes);
    let path = place(&hash, chunks);
    if path.exists() {
        return Ok((hash, 0));
    }
    if let Some(shelf) = path.parent() {
        fs::create_dir_all(shelf)?;
    }
    let packed = zstd::bulk::compress(&bytes, ZSTD_LEVEL)?;
    replace(&path, &packed)?;
    Ok((hash, packed.len() as u64))
}

fn load(chunk: &Chunk, chunks: &Path) -> Result<Vec<u8>> {
    let packed = match fs::read(place(&chunk.hash, chunks)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::corrupt("a missing chunk")),
        other => other?,
    };
    let bytes = zstd::bulk::decompress(&packed, chunk.len).map_err(|_| Error::corrupt("a broken chunk"))?;
    if bytes.len() != chunk.len || blake3::hash(&bytes) != chunk.hash {
        return Err(Error::corrupt("a chunk with another hash"));
    }
    Ok(bytes)
}

fn place(hash: &blake3::Hash, chunks: &Path) -> PathBuf {
    let name = hash.to_hex();
    chunks.join(&name[..2]).join(name.as_str())
}

/// Write a file that is either not there or whole. Two threads may write the same one.
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let draft = path.with_extension(format!("{:?}.new", std::thread::current().id()));
    fs::write(&draft, bytes).and_then(|()| fs::rename(&draft, path)).inspect_err(|_| drop(fs::remove_file(&draft)))?;
    Ok(())
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => Ok(other?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?),
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or_else(|| Error::corrupt("a cut index"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("four bytes")))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().expect("eight bytes")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Shelf {
        root: tempfile::TempDir,
    }

    impl Shelf {
        fn new() -> Self {
            Self { root: tempfile::tempdir().unwrap() }
        }

        fn chunks(&self) -> PathBuf {
            self.root.path().join("chunks")
        }

        fn image(&self, name: &str, bytes: &[u8]) -> PathBuf {
            let image = self.root.path().join(name);
            fs::create_dir_all(&image).unwrap();
            fs::write(image.join("pages.img"), bytes).unwrap();
            fs::write(image.join("empty.img"), b"").unwrap();
            image
        }

        fn pack(&self, image: &Path) -> u64 {
            pack(image, &["pages.img".into(), "empty.img".into()], &self.chunks()).unwrap()
        }
    }

    fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        let mut bytes = vec![0; len];
        hasher.finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn what_is_packed_comes_back() {
        let shelf = Shelf::new();
        for len in [0, 1, PAGE_BYTES, 5_000_000] {
            let bytes = noise(len, 1);
            let image = shelf.image(&format!("image{len}"), &bytes);
            shelf.pack(&image);
            fs::remove_file(image.join("pages.img")).unwrap();
            unpack(&image, &shelf.chunks()).unwrap();
            assert_eq!(fs::read(image.join("pages.img")).unwrap(), bytes);
            assert_eq!(fs::read(image.join("empty.img")).unwrap(), b"");
        }
    }

    #[test]
    fn a_second_image_adds_only_what_is_new() {
        let shelf = Shelf::new();
        let bytes = noise(8_000_000, 2);
        let first = shelf.pack(&shelf.image("a", &bytes));
        let mut other = bytes.clone();
        other.splice(2_000_000 / PAGE_BYTES * PAGE_BYTES..2_000_000 / PAGE_BYTES * PAGE_BYTES, noise(PAGE_BYTES, 3));
        let second = shelf.pack(&shelf.image("b", &other));
        assert!(second < first / 3, "{second} of {first}");
    }

    #[test]
    fn only_what_nobody_refers_to_is_collected() {
        let shelf = Shelf::new();
        let (a, b) = (shelf.image("a", &noise(3_000_000, 4)), shelf.image("b", &noise(3_000_000, 5)));
        shelf.pack(&a);
        shelf.pack(&b);
        assert_eq!(collect(&[a.join(INDEX), b.join(INDEX)], &shelf.chunks()).unwrap(), 0);
        assert!(collect(&[a.join(INDEX)], &shelf.chunks()).unwrap() > 2_000_000);
        unpack(&a, &shelf.chunks()).unwrap();
        assert!(matches!(unpack(&b, &shelf.chunks()), Err(Error::Corrupt(_))));
    }

    #[test]
    fn a_changed_chunk_is_noticed() {
        let shelf = Shelf::new();
        let image = shelf.image("a", &noise(100_000, 6));
        shelf.pack(&image);
        let path = entries(&shelf.chunks()).unwrap().iter().flat_map(|shelf| entries(shelf).unwrap()).next().unwrap();
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(matches!(unpack(&image, &shelf.chunks()), Err(Error::Corrupt(_))));
    }

    #[test]
    fn a_changed_index_is_noticed() {
        let shelf = Shelf::new();
        let image = shelf.image("a", &noise(100_000, 7));
        shelf.pack(&image);
        let index = fs::read(image.join(INDEX)).unwrap();
        assert_eq!(parse_index(&index).unwrap()[0].size, 100_000);
        for position in 0..index.len() {
            let mut changed = index.clone();
            changed[position] ^= 1;
            assert!(parse_index(&changed).is_err());
            assert!(parse_index(&index[..position]).is_err());
        }
    }
}
