//! What came of an order, for the API, which answers the client accordingly.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::machine::Trouble;

/// The header of a report.
const HEADER: &str = "X-Sandgate-Report";

/// Says what the agent replied.
pub fn replied(reply: &Value) -> String {
    line(&json!({ "reply": reply }))
}

/// Says what went wrong.
pub fn failed(trouble: &Trouble) -> String {
    line(&json!({"error": {"code": trouble.code, "message": trouble.message, "detail": trouble.detail}}))
}

/// A header line; in ASCII, since a header has no encoding of its own.
fn line(report: &Value) -> String {
    let mut out = format!("{HEADER}: ");
    for character in report.to_string().chars() {
        if matches!(character, ' '..='~') {
            out.push(character);
            continue;
        }
        // JSON has escaped the other control characters already, but for DEL.
        for unit in character.encode_utf16(&mut [0; 2]) {
            let _ = write!(out, "\\u{unit:04x}");
        }
    }
    out.push_str("\r\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_one_line_of_ascii() {
        let line = replied(&json!({"path": "/ü/🎉\r\n\"\u{7f}"}));
        assert!(line.is_ascii());
        let text = line.strip_prefix("X-Sandgate-Report: ").and_then(|line| line.strip_suffix("\r\n"));
        let text = text.expect("a header line");
        assert!(!text.contains(['\r', '\n']));
        let read: Value = serde_json::from_str(text).expect("JSON");
        assert_eq!(read["reply"]["path"], "/ü/🎉\r\n\"\u{7f}");
    }
}
