//! The heads the plane sends: what came in, without what must not pass, with what only we may say.

use std::borrow::Cow;

use crate::admit::{self, Credentials};
use crate::http::Framing;
use crate::http::fields::{Field, Name, is_named_by_connection};
use crate::http::request::Request;
use crate::http::response::Response;
use crate::policy::Terms;
use crate::trust::Client;

/// Protocol of a plain listener, as `X-Forwarded-Proto` says it.
pub const HTTP: &str = "http";
/// Protocol of a TLS listener.
pub const HTTPS: &str = "https";

/// The connection as an upstream is told of it.
#[derive(Clone)]
pub struct Peer {
    /// The client's address, for `X-Forwarded-For`.
    pub address: Box<str>,
    /// The same as `Forwarded` spells it: IPv6 quoted in brackets.
    pub forwarded_for: Box<str>,
    /// `http` or `https`.
    pub proto: &'static str,
    /// A proxy whose word about the client counts.
    pub is_trusted: bool,
}

impl Peer {
    /// A client that speaks `proto`. Without an address it is `unknown` (RFC 7239, 6.2).
    pub fn new(client: Client, proto: &'static str) -> Self {
        let is_v6 = client.is_some_and(|address| address.is_ipv6());
        let address = client.map_or(Cow::Borrowed("unknown"), |address| address.to_string().into());
        let address = address.into_owned().into_boxed_str();
        let forwarded_for = if is_v6 { format!("\"[{address}]\"").into() } else { address.clone() };
        Self { address, forwarded_for, proto, is_trusted: false }
    }

    /// Whether nobody on the way to us can listen.
    pub fn is_secure(&self) -> bool {
        self.proto == HTTPS
    }
}

/// Path and query of a target.
pub fn split_query(target: &[u8]) -> (&[u8], &[u8]) {
    match memchr::memchr(b'?', target) {
        Some(at) => (&target[..at], &target[at + 1..]),
        None => (target, &[]),
    }
}

/// Appends a target without tokens of ours.
pub fn push_target(out: &mut Vec<u8>, target: &[u8]) {
    let (path, query) = split_query(target);
    if !admit::parameters(query).any(|parameter| admit::query_token(parameter).is_some()) {
        return out.extend_from_slice(target);
    }
    out.extend_from_slice(path);
    let mut separator = b'?';
    for parameter in admit::parameters(query).filter(|parameter| admit::query_token(parameter).is_none()) {
        out.push(separator);
        out.extend_from_slice(parameter);
        separator = b'&';
    }
}

fn push_field(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Appends a `Cookie` field without our own cookie, or nothing if it held no other.
fn push_cookies(out: &mut Vec<u8>, line: &[u8], value: &[u8]) {
    if memchr::memmem::find(value, admit::COOKIE).is_none() {
        return out.extend_from_slice(line);
    }
    let mut lead: &[u8] = b"Cookie: ";
    for pair in admit::cookies(value).filter(|pair| admit::cookie_token(pair).is_none()) {
        out.extend_from_slice(lead);
        out.extend_from_slice(pair);
        lead = b"; ";
    }
    if lead == b"; " {
        out.extend_from_slice(b"\r\n");
    }
}

/// Appends the head for the upstream. `credentials` is none towards the API, which judges for itself.
pub fn request(
    out: &mut Vec<u8>,
    head: &[u8],
    fields: &[Field],
    request: &Request,
    credentials: Option<&Credentials>,
    peer: &Peer,
) {
    let host = &head[request.host.clone()];
    let target = &head[request.target.clone()];
    out.extend_from_slice(&head[request.method.clone()]);
    out.push(b' ');
    match credentials {
        Some(_) => push_target(out, target),
        None => out.extend_from_slice(target),
    }
    out.extend_from_slice(b" HTTP/1.1\r\n");
    push_field(out, b"Host", host);
    for field in fields {
        if request.names_fields && is_named_by_connection(head, fields, field) {
            continue;
        }
        push_request_field(out, head, field, request, credentials);
    }
    if request.is_upgrade {
        out.extend_from_slice(b"Connection: Upgrade\r\n");
    }
    push_framing(out, request.framing);
    push_field(out, b"X-Forwarded-For", peer.address.as_bytes());
    push_field(out, b"X-Forwarded-Proto", peer.proto.as_bytes());
    push_field(out, b"X-Forwarded-Host", host);
    push_field(out, b"X-Real-IP", peer.address.as_bytes());
    out.extend_from_slice(b"Forwarded: for=");
    out.extend_from_slice(peer.forwarded_for.as_bytes());
    out.extend_from_slice(b";proto=");
    out.extend_from_slice(peer.proto.as_bytes());
    out.extend_from_slice(b";host=\"");
    out.extend_from_slice(host);
    out.extend_from_slice(b"\"\r\n\r\n");
}

fn push_request_field(
    out: &mut Vec<u8>,
    head: &[u8],
    field: &Field,
    request: &Request,
    credentials: Option<&Credentials>,
) {
    let line = field.line(head);
    let is_passed = match field.name {
        Name::HopByHop
        | Name::Private
        // These are said anew, in our words.
        | Name::Connection
        | Name::ContentLength
        | Name::Forwarding
        | Name::Host
        | Name::TransferEncoding => false,
        Name::Upgrade => request.is_upgrade,
        // A client of HTTP/1.0 could not be told to go on.
        Name::Expect => request.minor == 1,
        Name::Authorization => credentials.is_none_or(|found| !found.is_authorization_ours),
        Name::ApiKey => credentials.is_none_or(|found| !found.is_api_key_ours),
        Name::PreviewToken => credentials.is_none(),
        Name::Cookie if credentials.is_some() => return push_cookies(out, line, field.value(head)),
        Name::Referer if credentials.is_some() => {
            out.extend_from_slice(b"Referer: ");
            push_target(out, field.value(head));
            return out.extend_from_slice(b"\r\n");
        }
        Name::Accept | Name::Cookie | Name::Other | Name::Referer | Name::SecFetchDest | Name::SetCookie => true,
    };
    if is_passed {
        out.extend_from_slice(line);
    }
}

fn push_framing(out: &mut Vec<u8>, framing: Framing) {
    match framing {
        Framing::None | Framing::UntilClose => {}
        Framing::Length(length) => push_length(out, length),
        Framing::Chunked => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
    }
}

fn push_length(out: &mut Vec<u8>, length: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    let mut left = length;
    loop {
        at -= 1;
        digits[at] = b'0' + (left % 10) as u8;
        left /= 10;
        if left == 0 {
            break;
        }
    }
    push_field(out, b"Content-Length", &digits[at..]);
}

/// How the client is to be answered.
#[allow(clippy::struct_excessive_bools)] // Independent properties of one response.
#[derive(Clone, Copy, Debug)]
pub struct Reply<'a> {
    /// 1 for a client of HTTP/1.1, 0 for one of HTTP/1.0.
    pub minor: u8,
    /// Whether the connection stays open afterwards.
    pub is_keep_alive: bool,
    /// Whether this is the head that switches protocols.
    pub is_switch: bool,
    /// Whether the body's chunks are unwrapped, for a client that cannot read them.
    pub is_unchunked: bool,
    /// Whether a sandbox speaks, whose cookies stay on its own host.
    pub is_preview: bool,
    /// Fields to be replaced.
    pub terms: Option<&'a Terms>,
}

/// Appends a `Set-Cookie` field without `Domain`: a sandbox must not plant cookies on other sandboxes' hosts.
fn push_set_cookie(out: &mut Vec<u8>, value: &[u8]) {
    let is_domain = |attribute: &[u8]| {
        let name = attribute.split(|&b| b == b'=').next().unwrap_or_default();
        name.trim_ascii().eq_ignore_ascii_case(b"domain")
    };
    let mut parts = value.split(|&b| b == b';');
    out.extend_from_slice(b"Set-Cookie: ");
    out.extend_from_slice(parts.next().unwrap_or_default());
    for attribute in parts.filter(|attribute| !is_domain(attribute)) {
        out.push(b';');
        out.extend_from_slice(attribute);
    }
    out.extend_from_slice(b"\r\n");
}

/// Appends the head for the client.
pub fn response(out: &mut Vec<u8>, head: &[u8], fields: &[Field], response: &Response, reply: Reply<'_>) {
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(&head[9..response.line_len]);
    // 1xx and 204 have no body by definition; a length there confuses some clients (RFC 9110, 8.6).
    let is_bodiless = response.status < 200 || response.status == 204;
    for field in fields {
        let is_passed = match field.name {
            Name::Connection | Name::HopByHop | Name::Private => false,
            Name::Upgrade => reply.is_switch,
            Name::SetCookie if reply.is_preview => {
                push_set_cookie(out, field.value(head));
                false
            }
            Name::ContentLength => !is_bodiless,
            Name::TransferEncoding => !is_bodiless && reply.minor == 1 && !reply.is_unchunked,
            _ => true,
        };
        if let Some(line) = reply.terms.and_then(|terms| terms.replaced(field.name(head), field.value(head))) {
            out.extend_from_slice(&line);
            continue;
        }
        if is_passed && !(response.names_fields && is_named_by_connection(head, fields, field)) {
            out.extend_from_slice(field.line(head));
        }
    }
    if let Some(terms) = reply.terms.filter(|_| response.status >= 200) {
        out.extend_from_slice(terms.lines());
    }
    if reply.is_switch {
        out.extend_from_slice(b"Connection: Upgrade\r\n");
    } else if response.status >= 200 && !reply.is_keep_alive {
        out.extend_from_slice(b"Connection: close\r\n");
    } else if response.status >= 200 && reply.minor == 0 {
        out.extend_from_slice(b"Connection: keep-alive\r\n");
    }
    out.extend_from_slice(b"\r\n");
}
