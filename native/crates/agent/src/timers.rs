//! Deadlines of the event loop. A timer that is no longer wanted just fires into nothing: its owner checks.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What to look at when a deadline passes; the number is the owner's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timer {
    /// The process used up its `timeout_s`.
    Timeout(u64),
    /// The process had its two seconds after `SIGTERM`.
    Kill(u64),
    /// The process exited, but somebody still holds its pipes.
    PipeGrace(u64),
    /// Nobody has read the process's output for a while.
    ReaderWait(u64),
    /// The connection must have said who it is by now.
    Auth(u64),
    /// The connection holds frames that were worth waiting with.
    Flush(u64),
    /// Accepting failed for want of descriptors; try again.
    Accept,
}

#[derive(Default)]
pub struct Timers {
    due: BTreeMap<(Instant, u64), Timer>,
    sequence: u64,
}

impl Timers {
    pub fn after(&mut self, delay: Duration, timer: Timer) {
        self.sequence += 1;
        // A delay too long for the clock is one that never ends.
        if let Some(at) = Instant::now().checked_add(delay) {
            self.due.insert((at, self.sequence), timer);
        }
    }

    /// Time until the next deadline, `None` without one.
    pub fn wait(&self) -> Option<Duration> {
        let ((at, _), _) = self.due.first_key_value()?;
        Some(at.saturating_duration_since(Instant::now()))
    }

    /// Take one timer whose deadline has passed.
    pub fn pop_due(&mut self, now: Instant) -> Option<Timer> {
        let entry = self.due.first_entry()?;
        (entry.key().0 <= now).then(|| entry.remove())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_fire_in_order_and_not_before_their_time() {
        let mut timers = Timers::default();
        timers.after(Duration::from_secs(20), Timer::Kill(2));
        timers.after(Duration::from_secs(10), Timer::Timeout(1));
        timers.after(Duration::MAX, Timer::Accept);
        let now = Instant::now();
        assert_eq!(timers.pop_due(now), None);
        let later = now + Duration::from_secs(30);
        assert_eq!(timers.pop_due(later), Some(Timer::Timeout(1)));
        assert_eq!(timers.pop_due(later), Some(Timer::Kill(2)));
        assert_eq!(timers.pop_due(later), None);
    }
}
