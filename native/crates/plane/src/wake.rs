//! Sandboxes that sleep: requests wait while the API is asked, once, to wake theirs.
//!
//! ```text
//! worker: request or bytes for a sandbox asleep ──knock──▶ control thread ──wake──▶ one api connection
//!         held ◀──────────── its record has changed ◀──── sandbox … running ◀──────┤  another after 2 s
//!         refused ◀───────────────────────────────────────── wake_failed ◀─────────┘
//! ```
//!
//! A frozen one need not wait for the API: see [`crate::rouse`].
//!
//! A wake that fails for good is not asked for again at once: first for a second, then twice as long after each failure
//! in a row, everybody is refused.
//!
//! Not for deciding whether a sandbox may be woken: its record says so.

use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::timeout;

use crate::control::Control;
use crate::table::Table;
use crate::worker::wall_clock_s;

/// After this long without an effect somebody else is asked.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// Between two attempts while nobody can be asked.
const ASK_SOON: Duration = Duration::from_millis(100);
/// The rest after a first failure; it doubles so many times.
const REST_S: u32 = 1;
const REST_DOUBLINGS: u32 = 6;
/// How long hostd's word that a sandbox runs stands against a record that says it sleeps; the next visitor asks again.
const ROUSED_MS: u64 = 1000;
/// For a successor to take a line.
const RELAY_TIMEOUT: Duration = Duration::from_secs(1);

/// What all versions of one sandbox have in common, whatever its address.
#[derive(Debug, Default)]
pub struct Wake {
    /// What the newest record says, and its version.
    is_asleep: AtomicBool,
    v: AtomicU64,
    is_asked: AtomicBool,
    waiting: AtomicU32,
    /// Failures there ever were, and those since it last was awake.
    failures: AtomicU32,
    failures_in_row: AtomicU32,
    /// Unix milliseconds.
    rests_until: AtomicU64,
    /// The record that hostd knows better than, and until when (Unix milliseconds).
    roused_v: AtomicU64,
    roused_until: AtomicU64,
    changed: Notify,
}

fn now_ms() -> u64 {
    (wall_clock_s() * 1e3) as u64
}

impl Wake {
    /// Whether the newest record says that it sleeps and may be woken, and hostd does not know better.
    pub fn is_asleep(&self) -> bool {
        self.is_asleep.load(Ordering::SeqCst) && !self.is_roused(self.v.load(Ordering::SeqCst))
    }

    /// Whether it runs, although its record of that version says that it sleeps.
    pub fn is_roused(&self, v: u64) -> bool {
        self.roused_v.load(Ordering::SeqCst) == v && now_ms() < self.roused_until.load(Ordering::SeqCst)
    }

    /// Notes that it runs where its record of that version says, and lets everybody who waits pass.
    pub fn rouse(&self, v: u64) {
        self.roused_until.store(now_ms() + ROUSED_MS, Ordering::SeqCst);
        self.roused_v.store(v, Ordering::SeqCst);
        self.is_asked.store(false, Ordering::SeqCst);
        self.changed.notify_waiters();
    }

    /// True for the first to ask, until the sandbox has been awake.
    pub fn ask(&self) -> bool {
        !self.is_asked.load(Ordering::SeqCst) && !self.is_asked.swap(true, Ordering::SeqCst)
    }

    /// Notes a new record, or the end, of the sandbox and lets everybody who waits look at it.
    pub fn note(&self, v: u64, is_asleep: bool) {
        self.is_asleep.store(is_asleep, Ordering::SeqCst);
        self.v.store(v, Ordering::SeqCst);
        if !is_asleep {
            self.is_asked.store(false, Ordering::SeqCst);
            self.failures_in_row.store(0, Ordering::SeqCst);
            self.rests_until.store(0, Ordering::SeqCst);
        }
        self.changed.notify_waiters();
    }

    /// Notes that it cannot be woken, and lets everybody who waits hear of it.
    pub fn fail(&self) {
        let before = self.failures_in_row.fetch_add(1, Ordering::SeqCst);
        let rest_ms = u64::from(REST_S << before.min(REST_DOUBLINGS)) * 1000;
        self.rests_until.store(now_ms() + rest_ms, Ordering::SeqCst);
        self.failures.fetch_add(1, Ordering::SeqCst);
        self.is_asked.store(false, Ordering::SeqCst);
        self.changed.notify_waiters();
    }

    /// Failures there ever were; with one more, a wait is over.
    pub fn failures(&self) -> u32 {
        self.failures.load(Ordering::SeqCst)
    }

    /// After a failure: whole seconds until somebody may be asked again.
    pub fn rest_s(&self) -> Option<u32> {
        let left_ms = self.rests_until.load(Ordering::SeqCst).saturating_sub(now_ms());
        (left_ms > 0).then_some(left_ms.div_ceil(1000) as u32)
    }

    /// Ends with the next record, or failure. To be enabled before the present one is looked at.
    pub fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }

    /// Requests that wait now.
    pub fn waiting(&self) -> u32 {
        self.waiting.load(Ordering::SeqCst)
    }
}

/// A place among the requests that wait for one sandbox; free again when dropped.
pub struct Place(Arc<Wake>);

impl Place {
    /// None if as many wait as may.
    pub fn take(wake: &Arc<Wake>, max: u32) -> Option<Self> {
        let place = Self(Arc::clone(wake));
        (wake.waiting.fetch_add(1, Ordering::SeqCst) < max).then_some(place)
    }

    /// The sandbox.
    pub fn wake(&self) -> &Wake {
        &self.0
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A sandbox that somebody has been asked to wake.
struct Asked {
    first: Instant,
    again: Instant,
    /// The connection that was asked last.
    connection: Option<u64>,
}

/// Asks for what the workers want, again and again until it is there or nobody wants it any more.
/// `patience`: how long bytes of a tunnel, which do not wait, are worth asking.
pub async fn serve(
    control: Rc<Control>,
    table: Arc<Table>,
    mut knocks: UnboundedReceiver<Box<str>>,
    patience: Duration,
) {
    let mut asked: HashMap<Box<str>, Asked> = HashMap::new();
    loop {
        let due = asked.values().map(|one| one.again).min();
        let idle = async {
            match due {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            knock = knocks.recv() => {
                // The senders are the workers: without them the process ends.
                let Some(id) = knock else { return };
                let now = Instant::now();
                asked.insert(id, Asked { first: now, again: now, connection: None });
            }
            () = idle => {}
        }
        let now = Instant::now();
        asked.retain(|id, one| is_wanted(&table, id, one, now, patience));
        for (id, one) in asked.iter_mut().filter(|(_, one)| one.again <= now) {
            one.connection = control.ask_to_wake(id, one.connection).await;
            one.again = now + if one.connection.is_some() { ASK_AGAIN } else { ASK_SOON };
        }
    }
}

/// Whether the sandbox still sleeps and somebody is still interested; if not, the next knock counts as the first.
fn is_wanted(table: &Table, id: &str, one: &Asked, now: Instant, patience: Duration) -> bool {
    let Some(sandbox) = table.get(id) else { return false };
    let wake = &sandbox.wake;
    if !wake.is_asked.load(Ordering::SeqCst) {
        return false;
    }
    if wake.is_asleep() && (wake.waiting() > 0 || now < one.first + patience) {
        return true;
    }
    wake.is_asked.store(false, Ordering::SeqCst);
    // One that came between the two looks has not knocked.
    wake.is_asleep() && wake.waiting() > 0 && wake.ask()
}

/// The message that asks for a wake.
pub fn line(id: &str) -> String {
    json!({"t": "wake", "id": id}).to_string()
}

/// Tells the successor at its control socket something. Whether it took it.
pub async fn relay(socket: &Path, line: &str) -> bool {
    let send = async {
        let mut stream = UnixStream::connect(socket).await?;
        stream.write_all(format!("{line}\n").as_bytes()).await?;
        stream.shutdown().await?;
        // It closes once it has read the line.
        stream.read_to_end(&mut Vec::new()).await.map(drop)
    };
    matches!(timeout(RELAY_TIMEOUT, send).await, Ok(Ok(())))
}
