//! The part of a file that a `Range` asks for.

use serde::Deserialize;

/// From `first` up to and including `last`. No `last`: to the end. No `first`: the last `last` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// See the struct.
    pub first: Option<u64>,
    /// See the struct.
    pub last: Option<u64>,
}

impl<'de> Deserialize<'de> for Span {
    /// Reads `[first, last]`, each a number or null. Both null, or a last before the first, make no part.
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (first, last) = <(Option<u64>, Option<u64>)>::deserialize(deserializer)?;
        let is_part = match (first, last) {
            (Some(first), Some(last)) => first <= last && last < u64::MAX,
            (first, last) => first.or(last).is_some(),
        };
        if is_part { Ok(Self { first, last }) } else { Err(serde::de::Error::custom("no part of a file")) }
    }
}

/// The part that there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where it begins.
    pub offset: u64,
    /// Bytes of it.
    pub length: u64,
}

impl Part {
    /// What a file of `size` bytes has of `length` bytes from `offset` on. None if it has nothing of them.
    pub fn of(offset: u64, length: Option<u64>, size: u64) -> Option<Self> {
        let left = size.checked_sub(offset).filter(|left| *left > 0)?;
        Some(Self { offset, length: length.map_or(left, |length| length.min(left)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_lies_within_its_file() {
        let part = |offset, length, size| Part::of(offset, length, size).map(|part| (part.offset, part.length));
        assert_eq!(part(0, None, 10), Some((0, 10)));
        assert_eq!(part(2, Some(3), 10), Some((2, 3)));
        assert_eq!(part(8, Some(92), 10), Some((8, 2)));
        assert_eq!(part(9, Some(1), 10), Some((9, 1)));
        assert_eq!(part(10, None, 10), None);
        assert_eq!(part(u64::MAX, Some(u64::MAX), 10), None);
        assert_eq!(part(0, None, 0), None);
    }

    #[test]
    fn what_is_no_part_is_refused() {
        for text in ["[null,null]", "[5,4]", "[0,18446744073709551615]", "[-1,2]", "[1]", "{}"] {
            assert!(serde_json::from_str::<Span>(text).is_err(), "{text}");
        }
        for text in ["[0,0]", "[null,5]", "[7,null]"] {
            assert!(serde_json::from_str::<Span>(text).is_ok(), "{text}");
        }
    }
}
