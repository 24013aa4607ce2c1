//! A request of HTTP/2 in the words of HTTP/1.1.
//!
//! The result goes through the parser that every request passes, so only what HTTP/2 adds is judged here (RFC 9113,
//! 8.2 and 8.3).

use http::header::{CONNECTION, CONTENT_LENGTH, COOKIE, HOST, TE, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, Method, Request};

/// A head for HTTP/1.1.
#[derive(Debug)]
pub struct Head {
    /// All of it.
    pub bytes: Vec<u8>,
    /// Whether it announces a chunked body.
    pub is_chunked: bool,
}

/// The head for a request, or none if it is malformed. `has_body`: content may follow.
pub fn head<T>(request: &Request<T>, has_body: bool) -> Option<Head> {
    let fields = request.headers();
    if is_hop_by_hop(fields) {
        return None;
    }
    let mut out = Vec::with_capacity(512);
    out.extend_from_slice(request.method().as_str().as_bytes());
    out.push(b' ');
    out.extend_from_slice(target(request).as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
    push(&mut out, &HOST, host(request)?);
    let is_own = |name: &HeaderName| name == HOST || name == COOKIE || name == TE;
    for (name, value) in fields.iter().filter(|(name, _)| !is_own(name)) {
        push(&mut out, name, value.as_bytes());
    }
    push_cookies(&mut out, fields);
    let is_chunked = has_body && !fields.contains_key(CONTENT_LENGTH);
    if is_chunked {
        push(&mut out, &TRANSFER_ENCODING, b"chunked");
    }
    out.extend_from_slice(b"\r\n");
    Some(Head { bytes: out, is_chunked })
}

/// Appends a field.
pub fn push(out: &mut Vec<u8>, name: &HeaderName, value: &[u8]) {
    out.extend_from_slice(name.as_str().as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Whether a field speaks of the connection, which in HTTP/2 no field may.
fn is_hop_by_hop(fields: &HeaderMap) -> bool {
    let names = [CONNECTION, TRANSFER_ENCODING, UPGRADE].map(|name| fields.contains_key(name));
    names.contains(&true)
        || fields.contains_key("keep-alive")
        || fields.contains_key("proxy-connection")
        || fields.get_all(TE).iter().any(|value| value != "trailers")
}

fn target<T>(request: &Request<T>) -> &str {
    let uri = request.uri();
    match uri.path_and_query() {
        Some(target) => target.as_str(),
        // Only CONNECT has none; the parser refuses it by its method.
        None if request.method() == Method::CONNECT => uri.authority().map_or("*", |authority| authority.as_str()),
        None => "/",
    }
}

/// The one host that the request is for: `:authority`, `Host`, or both if they agree.
fn host<T>(request: &Request<T>) -> Option<&[u8]> {
    let mut named = request.headers().get_all(HOST).iter().map(http::HeaderValue::as_bytes);
    let field = named.next();
    let authority = request.uri().authority().map(|authority| authority.as_str().as_bytes());
    match (authority, field, named.next()) {
        (_, _, Some(_)) => None,
        (Some(authority), Some(field), None) => authority.eq_ignore_ascii_case(field).then_some(authority),
        (authority, field, None) => authority.or(field),
    }
}

/// Browsers send each cookie in a field of its own; HTTP/1.1 wants one field (RFC 9113, 8.2.3).
fn push_cookies(out: &mut Vec<u8>, fields: &HeaderMap) {
    let mut lead: &[u8] = b"cookie: ";
    for value in fields.get_all(COOKIE) {
        out.extend_from_slice(lead);
        out.extend_from_slice(value.as_bytes());
        lead = b"; ";
    }
    if lead == b"; " {
        out.extend_from_slice(b"\r\n");
    }
}
