//! Asking hostd, and again after a break: it may be starting, or have lost the agent for a moment.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::time::timeout;

use super::machine::{Link, Trouble};

/// How long a break may last, and one between hostd and the agent.
const RECOVERY: Duration = Duration::from_secs(30);
const UNREACHABLE_PATIENCE: Duration = Duration::from_secs(2);
const DELAY_MIN: Duration = Duration::from_millis(20);
const DELAY_MAX: Duration = Duration::from_millis(500);

/// How long to go on after breaks.
struct Patience {
    until: Instant,
    unreachable_until: Option<Instant>,
    delay: Duration,
}

impl Patience {
    fn new() -> Self {
        Self { until: Instant::now() + RECOVERY, unreachable_until: None, delay: DELAY_MIN }
    }

    /// Waits before another try, or gives the trouble back when it is no break or time is up.
    async fn after(&mut self, trouble: Trouble) -> Result<(), Trouble> {
        let now = Instant::now();
        let mut until = self.until;
        if trouble.code == "agent_unreachable" {
            until = until.min(*self.unreachable_until.get_or_insert(now + UNREACHABLE_PATIENCE));
        }
        if !trouble.is_break() || now + self.delay > until {
            return Err(trouble);
        }
        tokio::time::sleep(self.delay).await;
        self.delay = (self.delay * 2).min(DELAY_MAX);
        Ok(())
    }

    async fn open(&mut self, socket: &Path, op: &[u8]) -> Result<Link, Trouble> {
        loop {
            let trouble = match Link::open(socket, op).await {
                Ok(link) => return Ok(link),
                // It may be starting; at the deadline it is not there.
                Err(_) if Instant::now() + DELAY_MAX < self.until => Trouble::lost(),
                Err(_) => Trouble::new("host_unreachable", "the host does not answer"),
            };
            self.after(trouble).await?;
        }
    }
}

/// A link that was sent an operation which nobody answers yet.
pub async fn open(socket: &Path, op: &[u8]) -> Result<Link, Trouble> {
    Patience::new().open(socket, op).await
}

/// Puts a link that carries an operation into `link`; what was replied to it.
///
/// The link stands there before the reply has come: whoever leaves meanwhile knows that the operation may be under way.
pub async fn ask(socket: &Path, op: &[u8], link: &mut Option<Link>) -> Result<Value, Trouble> {
    let mut patience = Patience::new();
    loop {
        let opened = link.insert(patience.open(socket, op).await?);
        let left = patience.until.saturating_duration_since(Instant::now());
        let Ok(reply) = timeout(left, opened.reply()).await else {
            return Err(Trouble::new("no_answer", "there was no answer in time"));
        };
        match reply {
            Ok(reply) => return Ok(reply),
            Err(trouble) => {
                *link = None;
                patience.after(trouble).await?;
            }
        }
    }
}
