//! Output as text in frames: one per line, whatever the borders of the chunks it comes in.
//!
//! What is no UTF-8 becomes U+FFFD, one for each maximal part of a sequence, as Python's decoder does it. What is
//! written is JSON as `orjson` writes it.

/// An unfinished line longer than this goes out in parts.
const PARTIAL_BYTES_MAX: usize = 256 * 1024;
const REPLACEMENT: &str = "\u{fffd}";

/// One channel of output on its way into frames.
#[derive(Debug)]
pub struct Lines {
    /// What stands before and after the line in each frame.
    around: (Box<str>, Box<str>),
    /// The start of a character whose rest has not come.
    carry: Vec<u8>,
    /// The unfinished line, escaped already.
    partial: Vec<u8>,
}

impl Lines {
    /// Frames consist of the two texts with the escaped line between.
    pub fn new(around: (Box<str>, Box<str>)) -> Self {
        Self { around, carry: Vec::new(), partial: Vec::new() }
    }

    /// Whether something of a line waits for its end.
    pub fn has_partial(&self) -> bool {
        !self.partial.is_empty()
    }

    /// Takes bytes; appends the frames of the lines that end in them.
    pub fn feed(&mut self, data: &[u8], out: &mut Vec<u8>) {
        if self.carry.is_empty() {
            return self.decode(data, out);
        }
        let mut joined = std::mem::take(&mut self.carry);
        joined.extend_from_slice(data);
        self.decode(&joined, out);
    }

    /// Appends the unfinished line as a frame. `is_final`: half a character will not be completed any more.
    pub fn flush(&mut self, is_final: bool, out: &mut Vec<u8>) {
        if is_final && !std::mem::take(&mut self.carry).is_empty() {
            self.take(REPLACEMENT, out);
        }
        if self.has_partial() {
            self.push_frame(b"", b"", out);
        }
    }

    fn decode(&mut self, data: &[u8], out: &mut Vec<u8>) {
        let mut rest = data;
        loop {
            let error = match std::str::from_utf8(rest) {
                Ok(text) => return self.take(text, out),
                Err(error) => error,
            };
            let (valid, after) = rest.split_at(error.valid_up_to());
            // It was just found to be valid.
            self.take(std::str::from_utf8(valid).unwrap_or_default(), out);
            let Some(length) = error.error_len() else {
                self.carry.extend_from_slice(after);
                return;
            };
            self.take(REPLACEMENT, out);
            rest = &after[length..];
        }
    }

    fn take(&mut self, text: &str, out: &mut Vec<u8>) {
        let mut rest = text.as_bytes();
        while let Some(at) = memchr::memchr(b'\n', rest) {
            self.push_frame(&rest[..at], b"\\n", out);
            rest = &rest[at + 1..];
        }
        escape(rest, &mut self.partial);
        if self.partial.len() > PARTIAL_BYTES_MAX {
            self.push_frame(b"", b"", out);
        }
    }

    fn push_frame(&mut self, line: &[u8], end: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(self.around.0.as_bytes());
        out.append(&mut self.partial);
        escape(line, out);
        out.extend_from_slice(end);
        out.extend_from_slice(self.around.1.as_bytes());
    }
}

/// Which bytes a JSON string cannot hold as they are.
const SPECIAL: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 0x20 {
        table[byte] = true;
        byte += 1;
    }
    table[b'"' as usize] = true;
    table[b'\\' as usize] = true;
    table
};

/// Appends text as it stands between the quotes of a JSON string.
pub fn escape(text: &[u8], out: &mut Vec<u8>) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut rest = text;
    while let Some(at) = rest.iter().position(|&byte| SPECIAL[usize::from(byte)]) {
        out.extend_from_slice(&rest[..at]);
        match rest[at] {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            0x08 => out.extend_from_slice(b"\\b"),
            0x0c => out.extend_from_slice(b"\\f"),
            byte => {
                out.extend_from_slice(b"\\u00");
                out.extend_from_slice(&[HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
            }
        }
        rest = &rest[at + 1..];
    }
    out.extend_from_slice(rest);
}

/// The text with each `$name` replaced by its value, escaped for a JSON string.
pub fn fill(template: &str, values: &[(&str, &str)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(template.len() + 64);
    let mut rest = template;
    while let Some(at) = rest.find('$') {
        out.extend_from_slice(&rest.as_bytes()[..at]);
        rest = &rest[at + 1..];
        match values.iter().find(|(name, _)| rest.starts_with(name)) {
            Some((name, value)) => {
                escape(value.as_bytes(), &mut out);
                rest = &rest[name.len()..];
            }
            None => out.push(b'$'),
        }
    }
    out.extend_from_slice(rest.as_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines() -> Lines {
        Lines::new(("<".into(), ">".into()))
    }

    #[test]
    fn frames_are_as_in_the_table_made_by_python() {
        let text = include_str!("../../../../../tests/vectors/output_lines.json");
        let rows: Vec<(Vec<Vec<u8>>, String)> = serde_json::from_str(text).expect("the table");
        for (pieces, expected) in rows {
            let mut lines = lines();
            let mut out = Vec::new();
            for piece in &pieces {
                lines.feed(piece, &mut out);
            }
            lines.flush(true, &mut out);
            assert_eq!(String::from_utf8(out).expect("JSON is UTF-8"), expected, "{pieces:?}");
        }
    }

    #[test]
    fn an_endless_line_goes_out_in_parts() {
        let mut lines = lines();
        let mut out = Vec::new();
        for _ in 0..64 {
            lines.feed(&[b'x'; 8192], &mut out);
        }
        assert!(out.len() >= PARTIAL_BYTES_MAX);
        assert!(lines.partial.len() <= PARTIAL_BYTES_MAX);
    }

    #[test]
    fn half_a_character_waits_for_its_rest() {
        let mut lines = lines();
        let mut out = Vec::new();
        lines.feed("aé".as_bytes().split_last().expect("bytes").1, &mut out);
        lines.flush(false, &mut out);
        lines.feed(&[0xa9, b'\n'], &mut out);
        assert_eq!(out, "<a><é\\n>".as_bytes());
    }

    #[test]
    fn values_are_put_in_once() {
        let filled = fill(r#"{"a":"$message","b":$code,"c":"$"}"#, &[("code", "7"), ("message", "say \"$code\"")]);
        assert_eq!(filled, br#"{"a":"say \"$code\"","b":7,"c":"$"}"#);
    }
}
