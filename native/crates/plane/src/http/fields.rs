//! Header fields: where they lie in a head and which of them mean something to a proxy.

use super::{FIELDS_MAX, Framing, HeadError};

/// Names the proxy acts on. Everything else is [`Name::Other`] and passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    /// Passes through untouched.
    Other,
    /// `Accept`
    Accept,
    /// `Authorization`
    Authorization,
    /// `Connection`
    Connection,
    /// `Content-Length`
    ContentLength,
    /// `Cookie`
    Cookie,
    /// `Expect`
    Expect,
    /// `Host`
    Host,
    /// `Keep-Alive`, `Proxy-Connection`, `Proxy-Authenticate`, `Proxy-Authorization`, `TE`, `HTTP2-Settings`: for this
    /// hop only.
    HopByHop,
    /// `Forwarded`, `X-Forwarded-*`, `X-Real-IP`: ours to say.
    Forwarding,
    /// `X-Sandgate-*`: between our own processes only.
    Private,
    /// `Referer`
    Referer,
    /// `Sec-Fetch-Dest`
    SecFetchDest,
    /// `Set-Cookie`
    SetCookie,
    /// `Transfer-Encoding`
    TransferEncoding,
    /// `Upgrade`
    Upgrade,
    /// `X-API-Key`
    ApiKey,
    /// `X-MIOSA-Preview-Token`
    PreviewToken,
}

impl Name {
    /// Classifies a field name. `_` counts as `-` for names that must not be forged: many servers read them alike.
    fn of(name: &[u8]) -> Self {
        match name.first().map_or(0, |b| b | 0x20) {
            b'a' if is(name, b"accept") => Self::Accept,
            b'a' if is(name, b"authorization") => Self::Authorization,
            b'c' if is(name, b"connection") => Self::Connection,
            b'c' if is(name, b"content-length") => Self::ContentLength,
            b'c' if is(name, b"cookie") => Self::Cookie,
            b'e' if is(name, b"expect") => Self::Expect,
            b'f' if is(name, b"forwarded") => Self::Forwarding,
            b'h' if is(name, b"host") => Self::Host,
            b'h' if is(name, b"http2-settings") => Self::HopByHop,
            b'k' if is(name, b"keep-alive") => Self::HopByHop,
            b'p' if starts(name, b"proxy-") => Self::of_proxy(name),
            b'r' if is(name, b"referer") => Self::Referer,
            b's' if is(name, b"sec-fetch-dest") => Self::SecFetchDest,
            b's' if is(name, b"set-cookie") => Self::SetCookie,
            b't' if is(name, b"te") => Self::HopByHop,
            b't' if is(name, b"transfer-encoding") => Self::TransferEncoding,
            b'u' if is(name, b"upgrade") => Self::Upgrade,
            b'x' => Self::of_extension(name),
            _ => Self::Other,
        }
    }

    fn of_proxy(name: &[u8]) -> Self {
        let names: [&[u8]; 3] = [b"proxy-connection", b"proxy-authenticate", b"proxy-authorization"];
        if names.iter().any(|hop| is(name, hop)) { Self::HopByHop } else { Self::Other }
    }

    fn of_extension(name: &[u8]) -> Self {
        if starts(name, b"x-sandgate-") {
            Self::Private
        } else if starts(name, b"x-forwarded") || is(name, b"x-real-ip") {
            Self::Forwarding
        } else if is(name, b"x-api-key") {
            Self::ApiKey
        } else if is(name, b"x-miosa-preview-token") {
            Self::PreviewToken
        } else {
            Self::Other
        }
    }
}

fn same(a: u8, b: u8) -> bool {
    a.eq_ignore_ascii_case(&b) || (a == b'_' && b == b'-')
}

fn is(name: &[u8], known: &[u8]) -> bool {
    name.len() == known.len() && starts(name, known)
}

fn starts(name: &[u8], known: &[u8]) -> bool {
    name.len() >= known.len() && name.iter().zip(known).all(|(&a, &b)| same(a, b))
}

/// One field: offsets into the head it came from.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Which one, as far as it matters.
    pub name: Name,
    start: u32,
    name_len: u32,
    value_start: u32,
    value_end: u32,
    end: u32,
}

impl Field {
    /// The name as sent.
    pub fn name<'a>(&self, head: &'a [u8]) -> &'a [u8] {
        &head[self.start as usize..(self.start + self.name_len) as usize]
    }

    /// The value without surrounding blanks.
    pub fn value<'a>(&self, head: &'a [u8]) -> &'a [u8] {
        &head[self.value_start as usize..self.value_end as usize]
    }

    /// The whole line with its CR LF.
    pub fn line<'a>(&self, head: &'a [u8]) -> &'a [u8] {
        &head[self.start as usize..self.end as usize]
    }
}

/// Appends the fields of `head` from offset `from` up to the empty line that ends it.
pub fn parse(head: &[u8], from: usize, fields: &mut Vec<Field>) -> Result<(), HeadError> {
    let mut at = from;
    while head.get(at) != Some(&b'\r') {
        let len = line_len(&head[at..])?;
        if fields.len() == FIELDS_MAX {
            return Err(HeadError::TooLarge);
        }
        fields.push(field(head, at, at + len)?);
        at += len;
    }
    if &head[at..] == b"\r\n" { Ok(()) } else { Err(HeadError::Malformed("A line has a bare CR.")) }
}

/// Length of the first line with its CR LF; refuses one that ends otherwise.
pub fn line_len(data: &[u8]) -> Result<usize, HeadError> {
    match memchr::memchr(b'\n', data) {
        Some(at) if at > 0 && data[at - 1] == b'\r' => Ok(at + 1),
        _ => Err(HeadError::Malformed("A line does not end with CR LF.")),
    }
}

fn field(head: &[u8], start: usize, end: usize) -> Result<Field, HeadError> {
    let line = &head[start..end - 2];
    let name_len = line.iter().position(|&b| !is_token(b)).unwrap_or(line.len());
    if name_len == 0 || line.get(name_len) != Some(&b':') {
        return Err(HeadError::Malformed("A header field has a bad name, or is folded."));
    }
    // Without an early exit, so that it is done for many bytes at once.
    if line[name_len + 1..].iter().fold(false, |is_bad, &b| is_bad | !is_value(b)) {
        return Err(HeadError::Malformed("A header field has a control character."));
    }
    let name = Name::of(&line[..name_len]);
    // Who reads `_` as `-` would frame the message by this field, who does not would skip it.
    if matches!(name, Name::ContentLength | Name::TransferEncoding) && line[..name_len].contains(&b'_') {
        return Err(HeadError::Malformed("A header field has a bad name, or is folded."));
    }
    let is_blank = |b: &u8| *b == b' ' || *b == b'\t';
    let value = &line[name_len + 1..];
    let lead = value.iter().position(|b| !is_blank(b)).unwrap_or(value.len());
    let trail = value[lead..].iter().rev().position(|b| !is_blank(b)).unwrap_or(0);
    Ok(Field {
        name,
        start: start as u32,
        name_len: name_len as u32,
        value_start: (start + name_len + 1 + lead) as u32,
        value_end: (end - 2 - trail) as u32,
        end: end as u32,
    })
}

/// A character of a token (RFC 9110, 5.6.2).
pub fn is_token(b: u8) -> bool {
    TOKEN[b as usize]
}

const TOKEN: [bool; 256] = {
    let mut table = [false; 256];
    let mut b = 0;
    while b < table.len() {
        table[b] = matches!(b as u8, b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z')
            || matches!(b as u8, b'!' | b'#'..=b'\'' | b'*' | b'+' | b'-' | b'.' | b'^'..=b'`' | b'|' | b'~');
        b += 1;
    }
    table
};

fn is_value(b: u8) -> bool {
    b >= b' ' && b != 0x7f || b == b'\t'
}

/// The members of a comma-separated list, trimmed, empty ones left out.
pub fn members(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|&b| b == b',').map(<[u8]>::trim_ascii).filter(|member| !member.is_empty())
}

/// What the fields say about framing, gathered while they are read.
#[derive(Default)]
pub struct FramingFields {
    length: Option<u64>,
    is_chunked: bool,
}

impl FramingFields {
    /// Takes a `Content-Length`. A second one is refused, even an equal one.
    pub fn content_length(&mut self, value: &[u8]) -> Result<(), HeadError> {
        let is_number = !value.is_empty() && value.len() <= 19 && value.iter().all(u8::is_ascii_digit);
        if !is_number || self.length.is_some() {
            return Err(HeadError::Malformed("Content-Length is not one number."));
        }
        self.length = Some(value.iter().fold(0, |sum, b| sum * 10 + u64::from(b - b'0')));
        Ok(())
    }

    /// Takes a `Transfer-Encoding`: `chunked`, once, and nothing else.
    pub fn transfer_encoding(&mut self, value: &[u8]) -> Result<(), HeadError> {
        if self.is_chunked || !value.eq_ignore_ascii_case(b"chunked") {
            return Err(HeadError::Malformed("Transfer-Encoding is not chunked."));
        }
        self.is_chunked = true;
        Ok(())
    }

    /// The framing, if the fields agree; none when they say nothing.
    pub fn finish(&self) -> Result<Option<Framing>, HeadError> {
        match (self.length, self.is_chunked) {
            (Some(_), true) => Err(HeadError::Malformed("Content-Length and Transfer-Encoding contradict each other.")),
            (Some(length), false) => Ok(Some(Framing::Length(length))),
            (None, true) => Ok(Some(Framing::Chunked)),
            (None, false) => Ok(None),
        }
    }
}

/// What `Connection` fields say.
#[allow(clippy::struct_excessive_bools)] // A set of flags, as the header is.
#[derive(Default, Clone, Copy)]
pub struct ConnectionFields {
    /// `close`
    pub is_close: bool,
    /// `keep-alive`
    pub is_keep_alive: bool,
    /// `upgrade`
    pub is_upgrade: bool,
    /// Names other fields, which are then for this hop only.
    pub names_fields: bool,
}

impl ConnectionFields {
    /// Takes the value of one field.
    pub fn add(&mut self, value: &[u8]) {
        for member in members(value) {
            if member.eq_ignore_ascii_case(b"close") {
                self.is_close = true;
            } else if member.eq_ignore_ascii_case(b"keep-alive") {
                self.is_keep_alive = true;
            } else if member.eq_ignore_ascii_case(b"upgrade") {
                self.is_upgrade = true;
            } else {
                self.names_fields = true;
            }
        }
    }
}

/// Whether a `Connection` field of this head names `field`, which is therefore for this hop only. `Upgrade` always is
/// and has rules of its own.
pub fn is_named_by_connection(head: &[u8], fields: &[Field], field: &Field) -> bool {
    if field.name == Name::Upgrade {
        return false;
    }
    let name = field.name(head);
    fields
        .iter()
        .filter(|other| other.name == Name::Connection)
        .any(|other| members(other.value(head)).any(|member| member.eq_ignore_ascii_case(name)))
}
