//! The control protocol's messages (docs/protocol.md, "Plane control") and what they do to the table.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::IpAddr;

use sandgate_hosts::access::{AGENT_PORT, Digest, Grant, Key};
use serde::{Deserialize, Deserializer, de};
use serde_json::{Value, json};

use crate::policy::Policy;
use crate::streams::event;
use crate::table::{Entry, PortRule, Sandbox, Seen, State, Table};

/// A message from the API.
#[derive(Deserialize)]
pub struct Message {
    /// Number to acknowledge.
    pub n: Option<Value>,
    /// What it says.
    #[serde(flatten)]
    pub body: Body,
}

/// What a message says.
#[derive(Deserialize)]
#[serde(tag = "t", rename_all = "snake_case")]
pub enum Body {
    /// Put one sandbox.
    Sandbox(SandboxRecord),
    /// Remove one.
    SandboxGone {
        /// Version.
        v: u64,
        /// Its id.
        id: String,
        /// Journal only: its slug.
        slug: Option<String>,
        /// Journal only: when, in Unix seconds.
        at: Option<u64>,
    },
    /// Put an API key.
    Key {
        /// Version.
        v: u64,
        /// Hex SHA-256 of the key.
        hash: String,
        /// Workspace.
        owner: String,
        /// Unix seconds.
        expires_at: Option<f64>,
    },
    /// Revoke one.
    KeyGone {
        /// Version.
        v: u64,
        /// Hex SHA-256 of the key.
        hash: String,
        /// Journal only: when, in Unix seconds.
        at: Option<u64>,
    },
    /// A full sync starts.
    SyncBegin,
    /// It ends.
    SyncEnd {
        /// Older records that were not repeated go.
        v: u64,
    },
    /// Pass on to the other connections.
    Poke {
        /// Which log.
        topic: String,
        /// How far it has grown.
        seq: Value,
    },
    /// From a predecessor that has handed over: somebody there waits for a sandbox.
    Wake {
        /// Its id.
        id: String,
    },
    /// A sandbox that was asked for cannot be woken.
    WakeFailed {
        /// Its id.
        id: String,
    },
    /// This connection can publish the event log.
    Volunteer,
    /// The next stretch of the event log.
    Publish {
        /// What comes before it.
        after: u64,
        /// Where it ends.
        through: u64,
        /// It does not go on where the plane asked.
        #[serde(default)]
        start: bool,
        /// The events in it.
        events: Vec<event::Record>,
    },
    /// From a predecessor that has handed over: sandboxes with traffic there.
    Activity {
        /// Their ids.
        ids: Vec<String>,
    },
    /// Asks for figures.
    Stats,
    /// An operator asks for a page of the table.
    Routes {
        /// The `next` of the page before.
        after: Option<String>,
    },
    /// An operator asks who uses the plane.
    Connections,
    /// A successor asks for the listeners.
    HandOver,
}

/// A sandbox as pushed.
#[derive(Deserialize)]
pub struct SandboxRecord {
    v: u64,
    id: String,
    slug: String,
    owner: String,
    address: IpAddr,
    state: StateName,
    #[serde(default = "yes")]
    auto_resume: bool,
    #[serde(default)]
    ports: HashMap<String, PortRecord>,
    #[serde(default)]
    tokens: Vec<GrantRecord>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum StateName {
    Running,
    Starting,
    Frozen,
    Hibernated,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
struct PortRecord {
    visibility: Visibility,
    #[serde(default)]
    shares: Vec<GrantRecord>,
    policy: Option<PolicyRecord>,
}

#[derive(Deserialize)]
struct PolicyRecord {
    allowed_origins: Option<Vec<String>>,
    #[serde(default)]
    allow_credentials: bool,
    frame_ancestors: Option<Vec<String>>,
}

impl PolicyRecord {
    fn policy(self) -> Result<Policy, Refusal> {
        Ok(Policy::new(self.allowed_origins, self.allow_credentials, self.frame_ancestors.as_deref())?)
    }
}

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Visibility {
    Public,
    Private,
}

#[derive(Deserialize)]
struct GrantRecord {
    hash: String,
    expires_at: Option<f64>,
    path: Option<String>,
    port: Option<u16>,
}

/// Why a message cannot be obeyed; fit to be told.
pub type Refusal = String;

fn digest(hex: &str) -> Result<Digest, Refusal> {
    let bytes = hex.as_bytes();
    let mut digest = [0; 32];
    if bytes.len() != 64 {
        return Err("hash is not 64 hex digits".into());
    }
    for (byte, pair) in digest.iter_mut().zip(bytes.chunks_exact(2)) {
        let digit = |b: u8| (b as char).to_digit(16).ok_or_else(|| Refusal::from("hash is not 64 hex digits"));
        *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Ok(digest)
}

/// Reads a digest that may be absent.
pub fn optional_digest<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Digest>, D::Error> {
    let hex = Option::<String>::deserialize(deserializer)?;
    hex.map(|hex| digest(&hex).map_err(de::Error::custom)).transpose()
}

fn hex(digest: &Digest) -> String {
    digest.iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl GrantRecord {
    fn grant(self, port: Option<u16>) -> Result<Grant, Refusal> {
        let path = self.path.unwrap_or_else(|| "/".into());
        // It becomes the attribute of a cookie.
        if !path.starts_with('/') || !path.bytes().all(|b| b > b' ' && b < 0x7f && b != b';') {
            return Err("path does not start with / or has a character that no path has".into());
        }
        Ok(Grant { hash: digest(&self.hash)?, expires_at: self.expires_at, port, path: path.into() })
    }
}

impl SandboxRecord {
    fn port_rules(ports: HashMap<String, PortRecord>) -> Result<Vec<PortRule>, Refusal> {
        let rule = |(port, record): (String, PortRecord)| {
            let port = port.parse().ok().filter(|&port| port != 0 && port != AGENT_PORT);
            let port: u16 = port.ok_or("a port is not a number from 1 to 65535, or is the agent's")?;
            let shares = record.shares.into_iter().map(|share| share.grant(Some(port))).collect::<Result<_, _>>()?;
            let policy = record.policy.map(PolicyRecord::policy).transpose()?;
            Ok(PortRule { port, is_public: record.visibility == Visibility::Public, shares, policy })
        };
        ports.into_iter().map(rule).collect()
    }

    fn apply(self, table: &Table, line: &str) -> Result<(), Refusal> {
        let ports = Self::port_rules(self.ports)?;
        let grant = |token: GrantRecord| {
            let port = token.port;
            token.grant(port)
        };
        let tokens = self.tokens.into_iter().map(grant).collect::<Result<_, _>>()?;
        let state = match self.state {
            StateName::Running => State::Running,
            StateName::Starting => State::Starting,
            StateName::Frozen => State::Frozen,
            StateName::Hibernated => State::Hibernated,
        };
        table.put_sandbox(self.v, &self.id, self.address, |live, wake, generation| Sandbox {
            v: self.v,
            id: self.id.as_str().into(),
            slug: self.slug.into(),
            owner: self.owner.into(),
            address: self.address,
            state,
            auto_resume: self.auto_resume,
            ports,
            tokens,
            live,
            wake,
            generation,
            line: line.into(),
        });
        Ok(())
    }
}

/// Applies a message that changes the table; says whether it was one. `line` is its text, `sync` what the connection's
/// full sync has repeated so far.
pub fn apply(body: Body, line: &str, table: &Table, sync: &mut Option<Seen>, now: u64) -> Result<bool, Refusal> {
    match body {
        Body::Sandbox(record) => {
            let id = record.id.clone();
            record.apply(table, line)?;
            if let Some(seen) = sync {
                seen.sandbox(&id);
            }
        }
        Body::SandboxGone { v, id, slug, at } => table.drop_sandbox(v, &id, slug.as_deref(), at.unwrap_or(now)),
        Body::Key { v, hash, owner, expires_at } => {
            let hash = digest(&hash)?;
            table.put_key(v, hash, Some(Key { owner: owner.into(), expires_at }), now);
            if let Some(seen) = sync {
                seen.key(hash);
            }
        }
        Body::KeyGone { v, hash, at } => table.put_key(v, digest(&hash)?, None, at.unwrap_or(now)),
        Body::SyncBegin => *sync = Some(Seen::new(table)),
        Body::SyncEnd { v } => match sync.take() {
            Some(seen) => table.retain(v, &seen, now),
            None => return Err("sync_end without sync_begin".into()),
        },
        Body::Poke { .. }
        | Body::Wake { .. }
        | Body::WakeFailed { .. }
        | Body::Activity { .. }
        | Body::Stats
        | Body::Routes { .. }
        | Body::Connections
        | Body::Volunteer
        | Body::Publish { .. }
        | Body::HandOver => return Ok(false),
    }
    Ok(true)
}

/// The whole table as messages, one per line: applied to an empty table they give this one.
pub fn dump(table: &Table) -> Vec<u8> {
    let mut out = Vec::new();
    let mut push = |line: &str| {
        out.extend_from_slice(line.as_bytes());
        out.push(b'\n');
    };
    table.each_entry(|id, entry| match entry {
        Entry::Here(sandbox) => push(&sandbox.line),
        Entry::Gone { v, slug, at } => {
            push(&json!({"t": "sandbox_gone", "v": v, "id": id, "slug": slug, "at": at}).to_string());
        }
    });
    table.each_key(|hash, v, key, at| {
        push(
            &match key {
                Some(key) => {
                    json!({"t": "key", "v": v, "hash": hex(hash), "owner": key.owner, "expires_at": key.expires_at})
                }
                None => json!({"t": "key_gone", "v": v, "hash": hex(hash), "at": at}),
            }
            .to_string(),
        );
    });
    out
}
