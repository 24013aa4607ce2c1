//! Who is let in: the credentials of a request, and what they open.
//!
//! Tokens come as `?preview_token=`, `?mt=`, `?mp=`, as `X-MIOSA-Preview-Token` or as the cookie that the plane itself
//! has set; API keys as `Authorization: Bearer` or `X-API-Key`. None of them is passed on to the sandbox.

use std::sync::Arc;

use sandgate_hosts::access::{self, Digest, Verdict, Wanted};
use sha2::{Digest as _, Sha256};

use crate::http::fields::{Field, Name};
use crate::table::{Sandbox, State, Table};

/// The cookie in which a browser keeps its token.
pub const COOKIE: &[u8] = b"sandgate_preview";
/// How every API key starts.
const KEY_PREFIX: &[u8] = b"msk_";
/// How every token starts. `mt` and `mp` are short names that an application may use for itself: they are ours only
/// with such a value.
const TOKEN_PREFIXES: [&[u8]; 2] = [b"mp_", b"miosa_pv_"];
/// Longer values are none of ours and not worth hashing.
const SECRET_BYTES_MAX: usize = 256;

/// What a request shows to be let in.
#[derive(Default)]
pub struct Credentials {
    tokens: Vec<Digest>,
    keys: Vec<Digest>,
    /// A token came in the query.
    pub is_in_query: bool,
    /// `Authorization` holds a key of ours.
    pub is_authorization_ours: bool,
    /// `X-API-Key` holds a key of ours.
    pub is_api_key_ours: bool,
}

fn hash(secret: &[u8]) -> Digest {
    Sha256::digest(secret).into()
}

impl Credentials {
    /// Gathers them from a request's fields and query.
    pub fn gather(head: &[u8], fields: &[Field], query: &[u8], table: &Table) -> Self {
        let mut found = Self::default();
        for field in fields {
            let value = field.value(head);
            match field.name {
                Name::PreviewToken => found.token(value),
                Name::Cookie => cookies(value).filter_map(cookie_token).for_each(|token| found.token(token)),
                Name::Authorization => {
                    if let Some(key) = bearer(value) {
                        found.is_authorization_ours |= found.key(key, table);
                    }
                }
                Name::ApiKey => found.is_api_key_ours |= found.key(value, table),
                _ => {}
            }
        }
        for token in parameters(query).filter_map(query_token) {
            found.is_in_query = true;
            found.token(token);
        }
        found
    }

    fn token(&mut self, value: &[u8]) {
        if value.len() <= SECRET_BYTES_MAX {
            self.tokens.push(hash(value));
        }
    }

    /// Whether the value is a key of ours, known or not; remembers it if so.
    fn key(&mut self, value: &[u8], table: &Table) -> bool {
        if value.len() > SECRET_BYTES_MAX {
            return false;
        }
        let digest = hash(value);
        let is_ours = value.starts_with(KEY_PREFIX) || table.key(&digest).is_some();
        if is_ours {
            self.keys.push(digest);
        }
        is_ours
    }
}

/// The key in `Bearer <key>`.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, rest) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| rest.trim_ascii())
}

/// The pairs of a `Cookie` field.
pub fn cookies(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|&b| b == b';').map(<[u8]>::trim_ascii).filter(|pair| !pair.is_empty())
}

/// The token in our own cookie.
pub fn cookie_token(pair: &[u8]) -> Option<&[u8]> {
    pair.strip_prefix(COOKIE)?.strip_prefix(b"=")
}

/// The parameters of a query.
pub fn parameters(query: &[u8]) -> impl Iterator<Item = &[u8]> {
    query.split(|&b| b == b'&').filter(|parameter| !parameter.is_empty())
}

/// The token in a parameter of ours.
pub fn query_token(parameter: &[u8]) -> Option<&[u8]> {
    let at = memchr::memchr(b'=', parameter)?;
    let (name, value) = (&parameter[..at], &parameter[at + 1..]);
    let is_ours = match name {
        b"preview_token" => true,
        b"mt" | b"mp" => TOKEN_PREFIXES.iter().any(|prefix| value.starts_with(prefix)),
        _ => false,
    };
    is_ours.then_some(value)
}

/// Why a request was let in; checked again while its connection lasts.
#[derive(Debug)]
pub struct Admission {
    sandbox: Arc<Sandbox>,
    port: u16,
    via: Via,
}

#[derive(Debug)]
enum Via {
    Public,
    Key(Digest),
    Token { hash: Digest, path: Box<str> },
}

impl Admission {
    /// Decides on a request. On refusal says why, for the best of its credentials.
    pub fn decide(
        table: &Table,
        sandbox: &Arc<Sandbox>,
        wanted: Wanted<'_>,
        credentials: &Credentials,
    ) -> Result<Self, Verdict> {
        let admission = |via| Self { sandbox: Arc::clone(sandbox), port: wanted.port, via };
        if sandbox.port(wanted.port).is_some_and(|rule| rule.is_public) {
            return Ok(admission(Via::Public));
        }
        let mut best = Verdict::Missing;
        for hash in &credentials.keys {
            match judge_key(table, sandbox, hash, wanted.now) {
                Verdict::Open => return Ok(admission(Via::Key(*hash))),
                verdict => best = best.max(verdict),
            }
        }
        for hash in &credentials.tokens {
            match judge_token(sandbox, hash, wanted) {
                Verdict::Open => return Ok(admission(Via::Token { hash: *hash, path: wanted.path.into() })),
                verdict => best = best.max(verdict),
            }
        }
        Err(best)
    }

    /// Whether it would be decided the same way now.
    pub fn holds(&self, table: &Table, now: f64) -> bool {
        let Some(sandbox) = table.get(&self.sandbox.id) else { return false };
        let is_same = Arc::ptr_eq(&sandbox.live, &self.sandbox.live) && sandbox.state != State::Starting;
        let is_public = sandbox.port(self.port).is_some_and(|rule| rule.is_public);
        let is_open = || match &self.via {
            Via::Public => false,
            Via::Key(hash) => judge_key(table, &sandbox, hash, now) == Verdict::Open,
            Via::Token { hash, path } => {
                judge_token(&sandbox, hash, Wanted { port: self.port, path, now }) == Verdict::Open
            }
        };
        is_same && (is_public || is_open())
    }

    /// The sandbox, as it was then.
    pub fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// For a request let in by a token: until when it is good (Unix seconds, if ever) and below which path.
    pub fn token_scope(&self) -> Option<(Option<f64>, &str)> {
        let Via::Token { hash, path } = &self.via else { return None };
        grants(&self.sandbox, self.port)
            .find(|grant| grant.hash == *hash && access::covers(&grant.path, path))
            .map(|grant| (grant.expires_at, &*grant.path))
    }
}

fn judge_key(table: &Table, sandbox: &Sandbox, hash: &Digest, now: f64) -> Verdict {
    table.key(hash).map_or(Verdict::Invalid, |key| access::judge_key(&key, &sandbox.owner, now))
}

fn judge_token(sandbox: &Sandbox, hash: &Digest, wanted: Wanted<'_>) -> Verdict {
    // A share of another port is reported as such, not as unknown.
    let all = sandbox.ports.iter().flat_map(|rule| &rule.shares).chain(&sandbox.tokens);
    access::judge_token(hash, all, wanted)
}

fn grants(sandbox: &Sandbox, port: u16) -> impl Iterator<Item = &access::Grant> {
    let shares = sandbox.ports.iter().flat_map(|rule| &rule.shares).chain(&sandbox.tokens);
    shares.filter(move |grant| grant.port.is_none_or(|only| only == port))
}
