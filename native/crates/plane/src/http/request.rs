//! Request heads.

use std::ops::Range;

use super::fields::{self, ConnectionFields, Field, FramingFields, Name};
use super::{Framing, HeadError};

/// Longest method name accepted.
const METHOD_BYTES_MAX: usize = 24;

/// A request head, by offsets into its bytes.
#[derive(Debug)]
pub struct Request {
    /// The method.
    pub method: Range<usize>,
    /// The target in origin form (`/…`) or `*`.
    pub target: Range<usize>,
    /// The value of the one `Host` field.
    pub host: Range<usize>,
    /// 1 for HTTP/1.1, 0 for HTTP/1.0.
    pub minor: u8,
    /// How the body is delimited.
    pub framing: Framing,
    /// Whether the client will use the connection again.
    pub is_keep_alive: bool,
    /// Whether it asks for another protocol (not for HTTP/2, which nobody gets by upgrade).
    pub is_upgrade: bool,
    /// Whether `Connection` names fields to be dropped.
    pub names_fields: bool,
}

/// Reads a complete head, as measured by [`super::find_end`]; leaves its fields in `fields`.
pub fn parse(head: &[u8], fields: &mut Vec<Field>) -> Result<Request, HeadError> {
    fields.clear();
    let line = fields::line_len(head)?;
    let (method, target, minor) = request_line(&head[..line - 2])?;
    fields::parse(head, line, fields)?;

    let mut framing = FramingFields::default();
    let mut connection = ConnectionFields::default();
    let mut host: Option<&Field> = None;
    let mut upgrade: Option<&[u8]> = None;
    for field in &*fields {
        match field.name {
            Name::ContentLength => framing.content_length(field.value(head))?,
            Name::TransferEncoding => framing.transfer_encoding(field.value(head))?,
            Name::Connection => connection.add(field.value(head)),
            Name::Upgrade if upgrade.is_some() => return Err(HeadError::Malformed("There is more than one Upgrade.")),
            Name::Upgrade => upgrade = Some(field.value(head)),
            Name::Host if host.is_some() => return Err(HeadError::Malformed("There is more than one Host.")),
            Name::Host => host = Some(field),
            _ => {}
        }
    }
    let host = host.ok_or(HeadError::Malformed("The Host header is missing."))?.value(head);
    let target = origin_form(head, &head[method.clone()], target, host)?;
    let framing = framing.finish()?.unwrap_or(Framing::None);
    if framing == Framing::Chunked && minor == 0 {
        return Err(HeadError::Malformed("HTTP/1.0 has no Transfer-Encoding."));
    }
    let is_http2 =
        upgrade.is_some_and(|value| fields::members(value).any(|to| to.to_ascii_lowercase().starts_with(b"h2")));
    let host_start = host.as_ptr() as usize - head.as_ptr() as usize;
    Ok(Request {
        method,
        target,
        host: host_start..host_start + host.len(),
        minor,
        framing,
        is_keep_alive: !connection.is_close && (minor == 1 || connection.is_keep_alive),
        is_upgrade: minor == 1 && connection.is_upgrade && upgrade.is_some() && !is_http2 && framing == Framing::None,
        names_fields: connection.names_fields,
    })
}

fn request_line(line: &[u8]) -> Result<(Range<usize>, Range<usize>, u8), HeadError> {
    let malformed = HeadError::Malformed("The request line is malformed.");
    let method_end = line.iter().position(|&b| !fields::is_token(b)).ok_or(malformed)?;
    if method_end == 0 || method_end > METHOD_BYTES_MAX || line[method_end] != b' ' {
        return Err(malformed);
    }
    let target_start = method_end + 1;
    let target_end = target_start + memchr::memchr(b' ', &line[target_start..]).ok_or(malformed)?;
    // '#' never travels; a server that cuts there would see another path than we judge.
    let is_target = |b: &u8| *b > b' ' && *b != 0x7f && *b != b'#';
    if target_start == target_end || !line[target_start..target_end].iter().all(is_target) {
        return Err(malformed);
    }
    let minor = match &line[target_end + 1..] {
        b"HTTP/1.1" => 1,
        b"HTTP/1.0" => 0,
        version if version.len() == 8 && version.starts_with(b"HTTP/") => return Err(HeadError::Version),
        _ => return Err(malformed),
    };
    Ok((0..method_end, target_start..target_end, minor))
}

/// Reduces a target to origin form. An absolute target must name the same host as `Host` does.
fn origin_form(head: &[u8], method: &[u8], target: Range<usize>, host: &[u8]) -> Result<Range<usize>, HeadError> {
    if method == b"CONNECT" {
        return Err(HeadError::Method);
    }
    let text = &head[target.clone()];
    if text[0] == b'/' || (text == b"*" && method == b"OPTIONS") {
        return Ok(target);
    }
    let malformed = HeadError::Malformed("The request target is malformed.");
    let scheme_len = [&b"http://"[..], b"https://"]
        .iter()
        .find(|scheme| text.len() > scheme.len() && text[..scheme.len()].eq_ignore_ascii_case(scheme))
        .ok_or(malformed)?
        .len();
    let authority_len = text[scheme_len..].iter().position(|&b| b == b'/').ok_or(malformed)?;
    let path = scheme_len + authority_len;
    if !text[scheme_len..path].eq_ignore_ascii_case(host) {
        return Err(HeadError::Malformed("The request target and the Host header name different hosts."));
    }
    Ok(target.start + path..target.end)
}

/// Whether repeating the request does no harm (RFC 9110, 9.2.2).
pub fn is_idempotent(method: &[u8]) -> bool {
    matches!(method, b"GET" | b"HEAD" | b"OPTIONS" | b"TRACE" | b"PUT" | b"DELETE")
}
