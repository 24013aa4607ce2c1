//! The grammar of host names: which of them name a port of a sandbox.
//!
//! ```text
//! <port>-<slug>.sandbox.<domain>      a port of the sandbox with that slug (or full UUID)
//! sbx-<id>-<port>.preview.<domain>    the same by the first 8 or more hex digits of the sandbox's UUID
//! <slug>.<zone>.<domain>              reserved; zone is sandbox, preview, computer or deploy
//! <slug>.<domain>                     reserved, but for the names in `API_NAMES`
//! anything else                       the API
//! ```
//!
//! Letter case, a port after the name and one trailing dot do not matter.

use std::fmt;

/// Longest host name in text form (RFC 1035, 2.3.4, without the root dot).
pub const NAME_BYTES_MAX: usize = 253;
/// Longest label of a host name.
pub const LABEL_BYTES_MAX: usize = 63;
/// Fewest hex digits by which a sandbox may be named.
pub const ID_DIGITS_MIN: usize = 8;

/// First labels directly under a domain that belong to the API and never to a slug.
const API_NAMES: [&str; 4] = ["api", "sandboxes", "stream", "www"];
/// Labels directly under a domain below which no API host can lie.
const ZONES: [&str; 4] = ["sandbox", "preview", "computer", "deploy"];

/// Why a `Host` header cannot be the name of anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostError {
    /// No name before the port.
    Empty,
    /// Longer than DNS permits, as a whole or in one label.
    TooLong,
    /// A character that no host name has, or an empty label.
    BadName,
    /// The part after the colon is no port number.
    BadPort,
}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "the host name is empty",
            Self::TooLong => "the host name is too long",
            Self::BadName => "the host name has a character that does not belong there",
            Self::BadPort => "the host's port is not a number from 0 to 65535",
        })
    }
}

impl std::error::Error for HostError {}

/// A host name in lower case, without port and trailing dot, kept in place (no allocation).
#[derive(Clone)]
pub struct HostName {
    bytes: [u8; NAME_BYTES_MAX],
    len: u8,
}

impl HostName {
    /// Checks and normalises the value of a `Host` header. IPv6 literals keep their brackets.
    pub fn parse(header: &[u8]) -> Result<Self, HostError> {
        let (name, port) = split_port(header)?;
        check_port(port)?;
        let is_literal = name.first() == Some(&b'[');
        let name = if is_literal { name } else { name.strip_suffix(b".").unwrap_or(name) };
        if name.is_empty() {
            return Err(HostError::Empty);
        }
        if name.len() > NAME_BYTES_MAX {
            return Err(HostError::TooLong);
        }
        if is_literal {
            check_literal(name)?;
        } else {
            check_labels(name)?;
        }
        let mut bytes = [0; NAME_BYTES_MAX];
        bytes[..name.len()].copy_from_slice(name);
        bytes[..name.len()].make_ascii_lowercase();
        Ok(Self { bytes, len: name.len() as u8 })
    }

    /// The normalised name.
    pub fn as_str(&self) -> &str {
        // Only ASCII passes `parse`.
        std::str::from_utf8(&self.bytes[..usize::from(self.len)]).unwrap_or_default()
    }
}

impl fmt::Debug for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostName({})", self.as_str())
    }
}

/// How a host name names a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SandboxName<'a> {
    /// Its slug or its full UUID.
    Slug(&'a str),
    /// The first hex digits of its UUID, at least [`ID_DIGITS_MIN`], without dashes.
    IdPrefix(&'a str),
}

/// What a host name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// The API.
    Api,
    /// A port of a sandbox.
    Preview {
        /// TCP port inside the sandbox, 1 to 65535.
        port: u16,
        /// Which sandbox.
        sandbox: SandboxName<'a>,
    },
    /// A form that is kept free for sites, desktops and deployments.
    Reserved,
}

/// Says what a normalised host name stands for. `domains` are lower-case names without a leading dot.
pub fn classify<'a>(name: &'a str, domains: &[String]) -> Target<'a> {
    if domains.iter().any(|domain| domain == name) {
        return Target::Api;
    }
    let longest = domains
        .iter()
        .filter_map(|domain| name.strip_suffix(domain.as_str())?.strip_suffix('.'))
        .min_by_key(|rest| rest.len());
    match longest {
        None => Target::Api,
        Some(rest) => classify_under_domain(rest),
    }
}

fn classify_under_domain(rest: &str) -> Target<'_> {
    match rest.rsplit_once('.') {
        None if API_NAMES.contains(&rest) => Target::Api,
        None => Target::Reserved,
        Some((label, "sandbox")) => slug_form(label).unwrap_or(Target::Reserved),
        Some((label, "preview")) => id_form(label).unwrap_or(Target::Reserved),
        Some((_, zone)) if ZONES.contains(&zone) => Target::Reserved,
        Some(_) => Target::Api,
    }
}

fn slug_form(label: &str) -> Option<Target<'_>> {
    let (port, slug) = label.split_once('-')?;
    let is_slug = !slug.is_empty()
        && !slug.starts_with('-')
        && !slug.ends_with('-')
        && slug.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    let port = parse_port(port)?;
    is_slug.then_some(Target::Preview { port, sandbox: SandboxName::Slug(slug) })
}

fn id_form(label: &str) -> Option<Target<'_>> {
    let (id, port) = label.strip_prefix("sbx-")?.split_once('-')?;
    let is_id = (ID_DIGITS_MIN..=32).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let port = parse_port(port)?;
    is_id.then_some(Target::Preview { port, sandbox: SandboxName::IdPrefix(id) })
}

/// A port as one writes it: decimal, no leading zero, 1 to 65535.
fn parse_port(text: &str) -> Option<u16> {
    let is_plain = !text.starts_with('0') && text.len() <= 5 && text.bytes().all(|b| b.is_ascii_digit());
    if is_plain { text.parse().ok() } else { None }
}

fn split_port(header: &[u8]) -> Result<(&[u8], Option<&[u8]>), HostError> {
    if header.first() == Some(&b'[') {
        let end = header.iter().position(|&b| b == b']').ok_or(HostError::BadName)? + 1;
        return match header[end..].split_first() {
            None => Ok((header, None)),
            Some((b':', port)) => Ok((&header[..end], Some(port))),
            Some(_) => Err(HostError::BadName),
        };
    }
    Ok(match header.iter().position(|&b| b == b':') {
        None => (header, None),
        Some(colon) => (&header[..colon], Some(&header[colon + 1..])),
    })
}

fn check_port(port: Option<&[u8]>) -> Result<(), HostError> {
    let Some(port) = port else { return Ok(()) };
    // RFC 3986 allows an empty port after the colon.
    let is_number = port.len() <= 5 && port.iter().all(u8::is_ascii_digit);
    let value = || port.iter().fold(0u32, |sum, &b| sum * 10 + u32::from(b - b'0'));
    if is_number && value() <= 65535 { Ok(()) } else { Err(HostError::BadPort) }
}

fn check_labels(name: &[u8]) -> Result<(), HostError> {
    for label in name.split(|&b| b == b'.') {
        if label.len() > LABEL_BYTES_MAX {
            return Err(HostError::TooLong);
        }
        let is_label = !label.is_empty() && label.iter().all(|&b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if !is_label {
            return Err(HostError::BadName);
        }
    }
    Ok(())
}

fn check_literal(name: &[u8]) -> Result<(), HostError> {
    let inner = &name[1..name.len() - 1];
    let text = std::str::from_utf8(inner).map_err(|_| HostError::BadName)?;
    text.parse::<std::net::Ipv6Addr>().map(|_| ()).map_err(|_| HostError::BadName)
}
