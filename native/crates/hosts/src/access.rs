//! Who may see a port of a sandbox.
//!
//! A public port is open to all. Any other port, opened as a preview or not, is private: it opens for an API key of
//! the sandbox's owner, for a browser token of the sandbox and for a share of that port, each until it expires.

/// SHA-256 of a token or key.
pub type Digest = [u8; 32];

/// The agent's port: never reachable from outside, whatever is pushed.
pub const AGENT_PORT: u16 = 10_700;

/// A token that opens a sandbox, or one port of it, below one path.
#[derive(Clone, Debug, PartialEq)]
pub struct Grant {
    /// SHA-256 of the token.
    pub hash: Digest,
    /// Unix seconds; none for a token that does not expire.
    pub expires_at: Option<f64>,
    /// The only port it opens; none for all.
    pub port: Option<u16>,
    /// The path below which it opens; `/` for all.
    pub path: Box<str>,
}

/// An API key as the plane knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Key {
    /// The workspace it belongs to.
    pub owner: Box<str>,
    /// Unix seconds; none for a key that does not expire.
    pub expires_at: Option<f64>,
}

/// What a request asks to see.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Port inside the sandbox.
    pub port: u16,
    /// Path of the request as sent, without its query.
    pub path: &'a str,
    /// Unix seconds.
    pub now: f64,
}

/// The answer for one credential. The greater of two answers counts: one good token is enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Nothing was presented.
    Missing,
    /// Unknown, revoked, or somebody else's.
    Invalid,
    /// Known, but for another port or path.
    OutOfScope,
    /// Known, but no longer valid.
    Expired,
    /// May pass.
    Open,
}

/// Judges a token against what has been granted.
pub fn judge_token<'a>(hash: &Digest, grants: impl IntoIterator<Item = &'a Grant>, wanted: Wanted<'_>) -> Verdict {
    grants
        .into_iter()
        .filter(|grant| grant.hash == *hash)
        .map(|grant| judge_grant(grant, wanted))
        .max()
        .unwrap_or(Verdict::Invalid)
}

fn judge_grant(grant: &Grant, wanted: Wanted<'_>) -> Verdict {
    if grant.port.is_some_and(|port| port != wanted.port) || !covers(&grant.path, wanted.path) {
        Verdict::OutOfScope
    } else if is_past(grant.expires_at, wanted.now) {
        Verdict::Expired
    } else {
        Verdict::Open
    }
}

/// Judges an API key for a sandbox of `owner`.
pub fn judge_key(key: &Key, owner: &str, now: f64) -> Verdict {
    if *key.owner != *owner {
        Verdict::Invalid
    } else if is_past(key.expires_at, now) {
        Verdict::Expired
    } else {
        Verdict::Open
    }
}

fn is_past(expires_at: Option<f64>, now: f64) -> bool {
    expires_at.is_some_and(|at| at <= now)
}

/// Whether `path` lies at or below `scope`, for every server that may read it.
///
/// A path that some servers would resolve to a place elsewhere (dot segments, encoded dots or slashes, backslashes,
/// empty segments) is covered by `/` only.
pub fn covers(scope: &str, path: &str) -> bool {
    let scope = scope.trim_end_matches('/');
    if scope.is_empty() {
        return true;
    }
    let is_below = path.strip_prefix(scope).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    is_below && !is_ambiguous(path)
}

fn is_ambiguous(path: &str) -> bool {
    let lower = path.to_ascii_lowercase();
    let has_hidden = ["%2e", "%2f", "%5c", "%00", "\\", "//"].iter().any(|needle| lower.contains(needle));
    has_hidden || lower.split('/').any(|segment| matches!(segment.split(';').next(), Some("." | "..")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: Digest = [7; 32];

    fn grant(port: Option<u16>, path: &str, expires_at: Option<f64>) -> Grant {
        Grant { hash: HASH, expires_at, port, path: path.into() }
    }

    fn wanted(port: u16, path: &str) -> Wanted<'_> {
        Wanted { port, path, now: 100.0 }
    }

    #[test]
    fn a_token_opens_its_port_and_path_until_it_expires() {
        let all = [grant(Some(3000), "/docs", Some(101.0))];
        assert_eq!(judge_token(&HASH, &all, wanted(3000, "/docs")), Verdict::Open);
        assert_eq!(judge_token(&HASH, &all, wanted(3000, "/docs/a/b")), Verdict::Open);
        assert_eq!(judge_token(&HASH, &all, wanted(3000, "/docsy")), Verdict::OutOfScope);
        assert_eq!(judge_token(&HASH, &all, wanted(3001, "/docs")), Verdict::OutOfScope);
        assert_eq!(judge_token(&[8; 32], &all, wanted(3000, "/docs")), Verdict::Invalid);
        let past = [grant(None, "/", Some(100.0))];
        assert_eq!(judge_token(&HASH, &past, wanted(1, "/")), Verdict::Expired);
    }

    #[test]
    fn one_good_grant_is_enough() {
        let all = [grant(Some(1), "/", None), grant(Some(2), "/", Some(1.0)), grant(Some(2), "/", None)];
        assert_eq!(judge_token(&HASH, &all, wanted(2, "/")), Verdict::Open);
    }

    #[test]
    fn paths_that_servers_read_differently_are_outside_every_scope() {
        for path in [
            "/docs/../x",
            "/docs/%2e%2e/x",
            "/docs/..;/x",
            "/docs/./",
            "/docs//x",
            "/docs\\..",
            "/docs/%2Fx",
            "/docs/..",
        ] {
            assert!(!covers("/docs", path), "{path}");
            assert!(covers("/", path), "{path}");
        }
        assert!(covers("/docs/", "/docs"));
        assert!(covers("/docs", "/docs/a..b/.hidden"));
    }

    #[test]
    fn a_key_opens_its_owners_sandboxes_only() {
        let key = Key { owner: "w1".into(), expires_at: Some(100.5) };
        assert_eq!(judge_key(&key, "w1", 100.0), Verdict::Open);
        assert_eq!(judge_key(&key, "w1", 100.5), Verdict::Expired);
        assert_eq!(judge_key(&key, "w2", 100.0), Verdict::Invalid);
    }
}
