//! Response heads.

use super::fields::{self, ConnectionFields, Field, FramingFields, Name};
use super::{Framing, HeadError};

/// A response head.
#[derive(Debug)]
pub struct Response {
    /// Status code, 100 to 999.
    pub status: u16,
    /// Where the reason phrase starts (the byte after `HTTP/1.x SSS`), up to the end of the line.
    pub line_len: usize,
    /// How the body is delimited, for a request that was not `HEAD`.
    pub framing: Framing,
    /// Whether the server will use the connection again.
    pub is_keep_alive: bool,
    /// Whether `Connection` names fields to be dropped.
    pub names_fields: bool,
}

/// Reads a complete head, as measured by [`super::find_end`]; leaves its fields in `fields`.
pub fn parse(head: &[u8], is_head_request: bool, fields: &mut Vec<Field>) -> Result<Response, HeadError> {
    fields.clear();
    let line_len = fields::line_len(head)?;
    let (status, minor) = status_line(&head[..line_len - 2])?;
    fields::parse(head, line_len, fields)?;
    let mut framing = FramingFields::default();
    let mut connection = ConnectionFields::default();
    for field in &*fields {
        match field.name {
            Name::ContentLength => framing.content_length(field.value(head))?,
            Name::TransferEncoding => framing.transfer_encoding(field.value(head))?,
            Name::Connection => connection.add(field.value(head)),
            _ => {}
        }
    }
    let said = framing.finish()?;
    let has_no_body = is_head_request || status < 200 || status == 204 || status == 304;
    let framing = if has_no_body { Framing::None } else { said.unwrap_or(Framing::UntilClose) };
    Ok(Response {
        status,
        line_len,
        framing,
        is_keep_alive: !connection.is_close
            && (minor == 1 || connection.is_keep_alive)
            && framing != Framing::UntilClose,
        names_fields: connection.names_fields,
    })
}

fn status_line(line: &[u8]) -> Result<(u16, u8), HeadError> {
    let malformed = HeadError::Malformed("The status line is malformed.");
    let minor = match line.get(..9) {
        Some(b"HTTP/1.1 ") => 1,
        Some(b"HTTP/1.0 ") => 0,
        _ => return Err(malformed),
    };
    let code = line.get(9..12).ok_or(malformed)?;
    let is_code = code.iter().all(u8::is_ascii_digit) && code[0] != b'0';
    let is_reason = line[12..].first().is_none_or(|&b| b == b' ')
        && line[12..].iter().all(|&b| b >= b' ' && b != 0x7f || b == b'\t');
    if !is_code || !is_reason {
        return Err(malformed);
    }
    Ok((code.iter().fold(0, |sum, b| sum * 10 + u16::from(b - b'0')), minor))
}
