//! Where to cut a file of memory pages, so that two images of one machine have most chunks in common.
//!
//! A page that came or went shifts all that follow, so the cuts depend on what is in a page and not on where it lies:
//! content-defined chunking with a page as the smallest unit.

/// The unit that contents shift by.
pub const PAGE_BYTES: usize = 4096;
const PAGES_MIN: usize = 16;
/// The largest chunk, in pages; also what a reader of chunks must be ready for.
pub const PAGES_MAX: usize = 256;
/// A page ends a chunk with a chance of one in this many.
const CUT_EVERY: u64 = 64;

/// Length of the chunk at the start of `bytes`, which hold at least `PAGES_MAX` pages unless the file ends with them.
pub fn next(bytes: &[u8]) -> usize {
    for (number, page) in bytes.chunks(PAGE_BYTES).enumerate().take(PAGES_MAX) {
        if number + 1 >= PAGES_MIN && mix(page) % CUT_EVERY == 0 {
            return number * PAGE_BYTES + page.len();
        }
    }
    bytes.len().min(PAGES_MAX * PAGE_BYTES)
}

/// A hash that only has to be fast and to spread: chunks are named by a real one.
fn mix(page: &[u8]) -> u64 {
    let mut state = 0xcbf2_9ce4_8422_2325_u64;
    for word in page.chunks_exact(8) {
        let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
        state = (state ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
    state ^ (state >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn pages(count: usize, seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        (0..count * PAGE_BYTES)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state as u8
            })
            .collect()
    }

    fn chunks(mut bytes: &[u8]) -> Vec<&[u8]> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let (chunk, rest) = bytes.split_at(next(bytes));
            found.push(chunk);
            bytes = rest;
        }
        found
    }

    #[test]
    fn chunks_are_the_file_and_within_their_bounds() {
        let bytes = pages(2000, 1);
        let found = chunks(&bytes);
        assert_eq!(found.concat(), bytes);
        assert!(found.iter().all(|chunk| chunk.len() <= PAGES_MAX * PAGE_BYTES));
        assert!(found[..found.len() - 1].iter().all(|chunk| chunk.len() >= PAGES_MIN * PAGE_BYTES));
        assert!(chunks(&bytes[..5]).len() == 1);
    }

    #[test]
    fn a_page_more_changes_few_chunks() {
        let before = pages(2000, 2);
        let mut after = before.clone();
        after.splice(300 * PAGE_BYTES..300 * PAGE_BYTES, pages(1, 3));
        let known: HashSet<_> = chunks(&before).into_iter().collect();
        let new = chunks(&after).into_iter().filter(|chunk| !known.contains(chunk)).count();
        assert!(new <= 3, "{new} new chunks");
    }
}
