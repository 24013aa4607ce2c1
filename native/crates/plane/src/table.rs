//! The route table: what the control socket pushed, as the workers read it.
//!
//! Readers take no lock: each index is split into shards behind an atomic pointer, and a change replaces one shard, so
//! that its cost does not grow with the table. One writer at a time (the control thread).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use sandgate_hosts::access::{Digest, Grant, Key};
use sandgate_hosts::host::SandboxName;

use crate::histogram::SandboxHistogram;
use crate::policy::Policy;
use crate::wake::Wake;

/// How long a removed record is remembered: its hosts say "gone", and a late older push does not revive it.
pub const TOMBSTONE_S: u64 = 3600;
const SHARDS: usize = 256;

/// Whether a sandbox can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its ports answer.
    Running,
    /// Not yet.
    Starting,
    /// In memory, but not scheduled.
    Frozen,
    /// On disk.
    Hibernated,
}

impl State {
    /// Whether it must be woken first.
    pub fn is_asleep(self) -> bool {
        matches!(self, Self::Frozen | Self::Hibernated)
    }
}

/// A port opened as a preview.
#[derive(Debug)]
pub struct PortRule {
    /// The port.
    pub port: u16,
    /// Open to all.
    pub is_public: bool,
    /// Shares of this port.
    pub shares: Vec<Grant>,
    /// What other sites may do with it, unless that is the sandbox's to say.
    pub policy: Option<Policy>,
}

/// What all versions of one sandbox at one address have in common.
#[derive(Debug, Default)]
pub struct Live {
    /// Distinct for every sandbox and address there ever was: pooled connections are filed under it.
    pub incarnation: u64,
    /// Had traffic since the last activity report.
    pub is_active: AtomicBool,
    /// Requests and tunnels open now.
    pub in_flight: AtomicU32,
    /// How long its requests took.
    pub seconds: SandboxHistogram,
}

/// One sandbox as pushed.
#[derive(Debug)]
pub struct Sandbox {
    /// Version of the record, microseconds since the epoch.
    pub v: u64,
    /// UUID as pushed.
    pub id: Box<str>,
    /// Name in preview hosts.
    pub slug: Box<str>,
    /// Workspace.
    pub owner: Box<str>,
    /// Where its ports are.
    pub address: IpAddr,
    /// Whether they answer.
    pub state: State,
    /// Whether a request may wake it.
    pub auto_resume: bool,
    /// Opened ports.
    pub ports: Vec<PortRule>,
    /// Tokens for the sandbox as a whole or one port.
    pub tokens: Vec<Grant>,
    /// Shared with earlier and later versions at this address.
    pub live: Arc<Live>,
    /// Shared with all versions.
    pub wake: Arc<Wake>,
    /// The table's generation when it was pushed.
    pub generation: u64,
    /// The control message that made it, for the journal.
    pub line: Box<str>,
}

impl Sandbox {
    /// The rule of a port, if it was opened.
    pub fn port(&self, port: u16) -> Option<&PortRule> {
        self.ports.iter().find(|rule| rule.port == port)
    }

    /// Notes traffic for the next activity report.
    pub fn touch(&self) {
        if !self.live.is_active.load(Ordering::Relaxed) {
            self.live.is_active.store(true, Ordering::Relaxed);
        }
    }
}

/// A sandbox or what is left of it.
#[derive(Debug)]
pub enum Entry {
    /// It exists.
    Here(Arc<Sandbox>),
    /// It did; its hosts say so until it is forgotten.
    Gone {
        /// Version of the removal.
        v: u64,
        /// Its slug, if it was known.
        slug: Option<Box<str>>,
        /// Unix seconds of the removal.
        at: u64,
    },
}

impl Entry {
    fn v(&self) -> u64 {
        match self {
            Self::Here(sandbox) => sandbox.v,
            Self::Gone { v, .. } => *v,
        }
    }
}

/// An API key, or the memory of one.
#[derive(Clone, Debug)]
pub struct KeyEntry {
    v: u64,
    /// None once it is revoked.
    pub key: Option<Arc<Key>>,
    at: u64,
    generation: u64,
}

/// The answer to a look-up.
pub enum Found {
    /// It exists.
    Sandbox(Arc<Sandbox>),
    /// It existed.
    Gone,
    /// Nothing, or more than one.
    Unknown,
}

type BySlug = HashMap<Box<str>, Arc<Entry>>;
type ById = BTreeMap<Box<str>, Arc<Entry>>;
type Keys = HashMap<Digest, KeyEntry>;

/// The table.
pub struct Table {
    by_slug: Box<[ArcSwap<BySlug>]>,
    by_id: Box<[ArcSwap<ById>]>,
    keys: Box<[ArcSwap<Keys>]>,
    hasher: RandomState,
    generation: AtomicU64,
    sandboxes: AtomicUsize,
    incarnations: AtomicU64,
    writer: Mutex<()>,
}

impl Default for Table {
    fn default() -> Self {
        fn shards<T: Default>() -> Box<[ArcSwap<T>]> {
            (0..SHARDS).map(|_| ArcSwap::default()).collect()
        }
        Self {
            by_slug: shards(),
            by_id: shards(),
            keys: shards(),
            hasher: RandomState::new(),
            generation: AtomicU64::new(0),
            sandboxes: AtomicUsize::new(0),
            incarnations: AtomicU64::new(0),
            writer: Mutex::new(()),
        }
    }
}

/// A sandbox's id as it stands in host names: lower case, no dashes.
fn id_key(id: &str) -> Box<str> {
    id.chars().filter(|&c| c != '-').map(|c| c.to_ascii_lowercase()).collect()
}

/// Shard of an id: its first two hex digits, which every prefix has too.
fn id_shard(key: &str) -> usize {
    usize::from_str_radix(key.get(..2).unwrap_or("0"), 16).unwrap_or(0)
}

fn change<T: Clone>(shard: &ArcSwap<T>, apply: impl FnOnce(&mut T)) {
    let mut copy = T::clone(&shard.load());
    apply(&mut copy);
    shard.store(Arc::new(copy));
}

impl Table {
    /// Grows with every change; equal generations mean an equal table.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Sandboxes that exist.
    pub fn sandboxes(&self) -> usize {
        self.sandboxes.load(Ordering::Relaxed)
    }

    /// Finds the sandbox that a host names.
    pub fn find(&self, name: SandboxName<'_>) -> Found {
        match name {
            SandboxName::Slug(slug) => match self.by_slug[self.slug_shard(slug)].load().get(slug) {
                Some(entry) => Self::found(entry),
                None if slug.len() == 36 => self.find_id(&id_key(slug)),
                None => Found::Unknown,
            },
            SandboxName::IdPrefix(prefix) => self.find_id(prefix),
        }
    }

    /// Existing sandboxes come before removed ones; two that fit are as good as none.
    fn find_id(&self, prefix: &str) -> Found {
        let shard = self.by_id[id_shard(prefix)].load();
        let mut found = Found::Unknown;
        let from = (Bound::Included(prefix), Bound::Unbounded);
        for (_, entry) in shard.range::<str, _>(from).take_while(|(id, _)| id.starts_with(prefix)) {
            match (&found, Self::found(entry)) {
                (Found::Sandbox(_), Found::Sandbox(_)) => return Found::Unknown,
                (Found::Sandbox(_), _) => {}
                (_, next) => found = next,
            }
        }
        found
    }

    fn found(entry: &Entry) -> Found {
        match entry {
            Entry::Here(sandbox) => Found::Sandbox(Arc::clone(sandbox)),
            Entry::Gone { .. } => Found::Gone,
        }
    }

    /// The sandbox with this id, as it is now.
    pub fn get(&self, id: &str) -> Option<Arc<Sandbox>> {
        let key = id_key(id);
        match self.by_id[id_shard(&key)].load().get(&key).map(|entry| Self::found(entry)) {
            Some(Found::Sandbox(sandbox)) => Some(sandbox),
            _ => None,
        }
    }

    /// An API key that is in force.
    pub fn key(&self, hash: &Digest) -> Option<Arc<Key>> {
        self.keys[usize::from(hash[0])].load().get(hash).and_then(|entry| entry.key.clone())
    }

    /// Whether an API key is revoked or has expired; one that was never pushed is not.
    pub fn is_key_over(&self, hash: &Digest, now: f64) -> bool {
        self.keys[usize::from(hash[0])].load().get(hash).is_some_and(|entry| {
            entry.key.as_ref().is_none_or(|key| key.expires_at.is_some_and(|expires_at| expires_at <= now))
        })
    }

    /// Calls `visit` for every entry.
    pub fn each_entry(&self, mut visit: impl FnMut(&str, &Entry)) {
        for shard in &self.by_id {
            for (id, entry) in shard.load().iter() {
                visit(id, entry);
            }
        }
    }

    /// Calls `visit` for every key, its version and, for a revoked one, the time.
    pub fn each_key(&self, mut visit: impl FnMut(&Digest, u64, Option<&Key>, u64)) {
        for shard in &self.keys {
            for (hash, entry) in shard.load().iter() {
                visit(hash, entry.v, entry.key.as_deref(), entry.at);
            }
        }
    }

    /// Puts a sandbox unless a newer record is known. `make` receives what it shares with the versions before
    /// and the generation to note.
    pub fn put_sandbox(
        &self,
        v: u64,
        id: &str,
        address: IpAddr,
        make: impl FnOnce(Arc<Live>, Arc<Wake>, u64) -> Sandbox,
    ) {
        let _writer = self.lock();
        let key = id_key(id);
        let before = self.by_id[id_shard(&key)].load().get(&key).cloned();
        if before.as_ref().is_some_and(|entry| entry.v() > v) {
            return;
        }
        let (same_address, wake) = match before.as_deref() {
            Some(Entry::Here(old)) => ((old.address == address).then_some(old), Arc::clone(&old.wake)),
            _ => (None, Arc::default()),
        };
        let fresh =
            || Arc::new(Live { incarnation: self.incarnations.fetch_add(1, Ordering::Relaxed), ..Live::default() });
        let live = same_address.map_or_else(fresh, |old| Arc::clone(&old.live));
        let mut sandbox = make(live, Arc::clone(&wake), self.generation());
        // Hibernation ended every connection, even if the address is the same afterwards.
        if same_address.is_some_and(|old| old.state == State::Hibernated) && sandbox.state != State::Hibernated {
            sandbox.live = fresh();
        }
        let is_asleep = sandbox.state.is_asleep() && sandbox.auto_resume;
        self.replace(key, before.as_ref(), Some(Arc::new(Entry::Here(Arc::new(sandbox)))));
        wake.note(v, is_asleep);
    }

    /// Removes a sandbox unless a newer record is known. `slug` is used if the sandbox itself is not known.
    pub fn drop_sandbox(&self, v: u64, id: &str, slug: Option<&str>, at: u64) {
        let _writer = self.lock();
        self.bury(id_key(id), v, slug, at);
    }

    fn bury(&self, key: Box<str>, v: u64, slug: Option<&str>, at: u64) {
        let before = self.by_id[id_shard(&key)].load().get(&key).cloned();
        if before.as_ref().is_some_and(|entry| entry.v() > v) {
            return;
        }
        let slug = match before.as_deref() {
            Some(Entry::Here(old)) => Some(old.slug.clone()),
            Some(Entry::Gone { slug: Some(slug), .. }) => Some(slug.clone()),
            _ => slug.map(Into::into),
        };
        self.replace(key, before.as_ref(), Some(Arc::new(Entry::Gone { v, slug, at })));
        if let Some(Entry::Here(old)) = before.as_deref() {
            old.wake.note(v, false);
        }
    }

    /// Exchanges an entry in both indexes. New names appear before old ones vanish.
    fn replace(&self, key: Box<str>, before: Option<&Arc<Entry>>, after: Option<Arc<Entry>>) {
        let old_slug = before.and_then(|entry| slug_of(entry));
        let new_slug = after.as_deref().and_then(slug_of).map(Box::<str>::from);
        let count = |entry: Option<&Entry>| usize::from(matches!(entry, Some(Entry::Here(_))));
        let (had, has) = (count(before.map(|entry| &**entry)), count(after.as_deref()));
        if let (Some(slug), Some(entry)) = (&new_slug, &after) {
            change(&self.by_slug[self.slug_shard(slug)], |shard| {
                // A tombstone does not take a slug that somebody else uses by now.
                let is_taken =
                    matches!(shard.get(slug).map(|e| &**e), Some(Entry::Here(other)) if id_key(&other.id) != key);
                if has == 1 || !is_taken {
                    shard.insert(slug.clone(), Arc::clone(entry));
                }
            });
        }
        change(&self.by_id[id_shard(&key)], |shard| match after {
            Some(entry) => drop(shard.insert(key, entry)),
            None => drop(shard.remove(&key)),
        });
        if let (Some(slug), Some(before)) = (old_slug, before)
            && new_slug.as_deref() != Some(slug)
        {
            change(&self.by_slug[self.slug_shard(slug)], |shard| {
                if shard.get(slug).is_some_and(|entry| Arc::ptr_eq(entry, before)) {
                    shard.remove(slug);
                }
            });
        }
        self.sandboxes.fetch_add(has, Ordering::Relaxed);
        self.sandboxes.fetch_sub(had, Ordering::Relaxed);
        self.changed();
    }

    /// Puts (`Some`) or revokes (`None`) an API key unless a newer record is known.
    pub fn put_key(&self, v: u64, hash: Digest, key: Option<Key>, at: u64) {
        let _writer = self.lock();
        change(&self.keys[usize::from(hash[0])], |shard| {
            if shard.get(&hash).is_none_or(|entry| entry.v <= v) {
                let generation = self.generation();
                shard.insert(hash, KeyEntry { v, key: key.map(Arc::new), at, generation });
            }
        });
        self.changed();
    }

    /// Ends a full sync: records older than `v` that were not repeated are dropped, unless somebody pushed them after
    /// it had begun. Such a one may have been written too late for the sync's reader to see.
    pub fn retain(&self, v: u64, seen: &Seen, at: u64) {
        let _writer = self.lock();
        let mut stale = Vec::new();
        self.each_entry(|id, entry| {
            if let Entry::Here(sandbox) = entry
                && sandbox.v < v
                && sandbox.generation < seen.since
                && !seen.ids.contains(id)
            {
                stale.push(Box::<str>::from(id));
            }
        });
        for key in stale {
            self.bury(key, v, None, at);
        }
        for shard in &self.keys {
            let is_stale = |hash: &Digest, entry: &KeyEntry| {
                let is_old = entry.v < v && entry.generation < seen.since;
                entry.key.is_some() && is_old && !seen.keys.contains(hash)
            };
            if shard.load().iter().any(|(hash, entry)| is_stale(hash, entry)) {
                change(shard, |keys| {
                    for (hash, entry) in keys.iter_mut() {
                        if is_stale(hash, entry) {
                            *entry = KeyEntry { v, key: None, at, generation: self.generation() };
                        }
                    }
                });
            }
        }
        self.changed();
    }

    /// Forgets what was removed before `until` (Unix seconds).
    pub fn forget(&self, until: u64) {
        let _writer = self.lock();
        let mut old = Vec::new();
        for shard in &self.by_id {
            for (key, entry) in shard.load().iter() {
                if matches!(**entry, Entry::Gone { at, .. } if at < until) {
                    old.push((key.clone(), Arc::clone(entry)));
                }
            }
        }
        for (key, entry) in old {
            self.replace(key, Some(&entry), None);
        }
        for shard in &self.keys {
            let is_old = |entry: &KeyEntry| entry.key.is_none() && entry.at < until;
            if shard.load().values().any(is_old) {
                change(shard, |keys| keys.retain(|_, entry| !is_old(entry)));
            }
        }
    }

    /// Ids of the sandboxes with traffic since the last call.
    pub fn take_active(&self) -> Vec<Box<str>> {
        let mut ids = Vec::new();
        self.each_entry(|_, entry| {
            if let Entry::Here(sandbox) = entry
                && sandbox.live.is_active.load(Ordering::Relaxed)
            {
                sandbox.live.is_active.store(false, Ordering::Relaxed);
                ids.push(sandbox.id.clone());
            }
        });
        ids
    }

    fn slug_shard(&self, slug: &str) -> usize {
        self.hasher.hash_one(slug) as usize % SHARDS
    }

    fn changed(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn slug_of(entry: &Entry) -> Option<&str> {
    match entry {
        Entry::Here(sandbox) => Some(&sandbox.slug),
        Entry::Gone { slug, .. } => slug.as_deref(),
    }
}

/// What was repeated in the course of a full sync.
#[derive(Debug)]
pub struct Seen {
    since: u64,
    ids: HashSet<Box<str>>,
    keys: HashSet<Digest>,
}

impl Seen {
    /// For a sync that begins now.
    pub fn new(table: &Table) -> Self {
        Self { since: table.generation(), ids: HashSet::new(), keys: HashSet::new() }
    }

    /// Notes a sandbox.
    pub fn sandbox(&mut self, id: &str) {
        self.ids.insert(id_key(id));
    }

    /// Notes a key.
    pub fn key(&mut self, hash: Digest) {
        self.keys.insert(hash);
    }
}
