//! Shell-style patterns, as Python's `fnmatch` understands them: `*`, `?`, `[abc]`, `[a-z]`, `[!abc]`.

use serde::{Deserialize, Deserializer};

/// A compiled pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Any,
    One,
    Char(char),
    Set { ranges: Vec<(char, char)>, is_negated: bool },
}

impl Part {
    fn takes(&self, c: char) -> bool {
        match self {
            Self::Any | Self::One => true,
            Self::Char(own) => *own == c,
            Self::Set { ranges, is_negated } => {
                ranges.iter().any(|(low, high)| (*low..=*high).contains(&c)) != *is_negated
            }
        }
    }
}

impl Pattern {
    /// Compiles a pattern; every text is one.
    pub fn new(text: &str) -> Self {
        let chars: Vec<char> = text.chars().collect();
        let mut parts = Vec::with_capacity(chars.len());
        let mut at = 0;
        while let Some(&c) = chars.get(at) {
            at += 1;
            let part = match c {
                '*' => Part::Any,
                '?' => Part::One,
                '[' => match set_end(&chars, at) {
                    Some(end) => {
                        let part = set(&chars[at..end]);
                        at = end + 1;
                        part
                    }
                    None => Part::Char('['),
                },
                c => Part::Char(c),
            };
            // A run of stars says no more than one, and would only cost time.
            if part != Part::Any || parts.last() != Some(&Part::Any) {
                parts.push(part);
            }
        }
        Self(parts)
    }

    /// Whether the whole of `text` fits. Takes time in proportion to both lengths' product at worst.
    pub fn matches(&self, text: &str) -> bool {
        let (mut at, mut rest) = (0, text.chars());
        // Where to go on when what follows the last star does not fit.
        let mut retry: Option<(usize, std::str::Chars<'_>)> = None;
        loop {
            if self.0.get(at) == Some(&Part::Any) {
                at += 1;
                retry = Some((at, rest.clone()));
                continue;
            }
            let mut after = rest.clone();
            match (self.0.get(at), after.next()) {
                (None, None) => return true,
                (Some(part), Some(c)) if part.takes(c) => {
                    at += 1;
                    rest = after;
                }
                _ => {
                    let Some((star, from)) = &mut retry else { return false };
                    if from.next().is_none() {
                        return false;
                    }
                    (at, rest) = (*star, from.clone());
                }
            }
        }
    }
}

/// Where the set that begins at `at` ends; a `]` right at its start is a member.
fn set_end(chars: &[char], at: usize) -> Option<usize> {
    let mut first = at;
    if chars.get(first) == Some(&'!') {
        first += 1;
    }
    if chars.get(first) == Some(&']') {
        first += 1;
    }
    chars.get(first..)?.iter().position(|&c| c == ']').map(|offset| first + offset)
}

/// The set of what stands between brackets. A hyphen between two members makes a range of them.
fn set(members: &[char]) -> Part {
    let is_negated = members.first() == Some(&'!');
    let mut rest = &members[usize::from(is_negated)..];
    let mut ranges = Vec::new();
    while let [first, tail @ ..] = rest {
        let (last, after) = if let ['-', last, after @ ..] = tail { (last, after) } else { (first, tail) };
        ranges.push((*first, *last));
        rest = after;
    }
    Part::Set { ranges, is_negated }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        std::borrow::Cow::<'de, str>::deserialize(deserializer).map(|text| Self::new(&text))
    }
}

#[cfg(test)]
mod tests {
    use super::Pattern;

    /// The same table as in `tests/vectors/patterns.json`, which Python's own `fnmatch` is held against.
    #[test]
    fn matches_as_fnmatch_does() {
        let text = include_str!("../../../../../tests/vectors/patterns.json");
        let rows: Vec<(String, String, bool)> = serde_json::from_str(text).expect("the table");
        for (pattern, name, expected) in rows {
            assert_eq!(Pattern::new(&pattern).matches(&name), expected, "{pattern} and {name}");
        }
    }

    #[test]
    fn many_stars_take_no_time() {
        let pattern = Pattern::new(&"*a".repeat(500));
        assert!(!pattern.matches(&"a".repeat(499)));
        assert!(!pattern.matches(&format!("{}b", "a".repeat(2000))));
    }
}
