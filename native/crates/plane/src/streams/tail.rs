//! Who publishes the event log, and how far it has come. Lives on the control thread.
//!
//! One API worker at a time publishes, so that the order of the log is the order of what comes. Any of them can: each
//! volunteers when it connects.
//!
//! ```text
//! nobody ──volunteer──▶ appointed ──its first publish──▶ publishing ──leaves, or falls silent──▶ the next one
//! ```

use std::time::{Duration, Instant};

use super::event::Batch;

/// A publisher that says nothing for this long is replaced; it looks at the log at least once a second.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// Tells a connection to publish everything after `after`; none: the latest, and what comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appointment {
    /// The connection.
    pub connection: u64,
    /// How far the log is here.
    pub after: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub struct Tail {
    /// Connections that can publish; the first of them does.
    volunteers: Vec<u64>,
    through: Option<u64>,
    heard_at: Instant,
}

impl Tail {
    /// Nobody publishes yet.
    pub fn new(now: Instant) -> Self {
        Self { volunteers: Vec::new(), through: None, heard_at: now }
    }

    /// A connection can publish.
    pub fn volunteer(&mut self, connection: u64, now: Instant) -> Option<Appointment> {
        if self.volunteers.contains(&connection) {
            return None;
        }
        self.volunteers.push(connection);
        (self.volunteers.len() == 1).then(|| self.appoint(now)).flatten()
    }

    /// A connection has ended.
    pub fn leave(&mut self, connection: u64, now: Instant) -> Option<Appointment> {
        let was_publisher = self.volunteers.first() == Some(&connection);
        self.volunteers.retain(|&other| other != connection);
        was_publisher.then(|| self.appoint(now)).flatten()
    }

    /// Replaces a publisher that hangs, if there is another. Returns which, and who follows.
    pub fn check(&mut self, now: Instant) -> Option<(u64, Appointment)> {
        if self.volunteers.len() < 2 || now.duration_since(self.heard_at) < SILENCE_MAX {
            return None;
        }
        let silent = self.volunteers.remove(0);
        self.volunteers.push(silent);
        Some((silent, self.appoint(now)?))
    }

    fn appoint(&mut self, now: Instant) -> Option<Appointment> {
        let &connection = self.volunteers.first()?;
        self.heard_at = now;
        Some(Appointment { connection, after: self.through })
    }

    /// Whether to pass on what a connection publishes: the publisher's next stretch of the log. `is_start`: it could
    /// not continue where it was asked to.
    pub fn publish(&mut self, connection: u64, batch: &Batch, is_start: bool, now: Instant) -> bool {
        if self.volunteers.first() != Some(&connection) {
            return false;
        }
        self.heard_at = now;
        let is_next = is_start || self.through.is_none_or(|through| through == batch.after);
        if is_next {
            self.through = Some(batch.through);
        }
        is_next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(after: u64, through: u64) -> Batch {
        Batch::new(after, through, Vec::new()).expect("a batch")
    }

    fn asked(connection: u64, after: Option<u64>) -> Appointment {
        Appointment { connection, after }
    }

    #[test]
    fn one_publishes_and_the_next_goes_on_where_it_left() {
        let now = Instant::now();
        let mut tail = Tail::new(now);
        assert_eq!(tail.volunteer(1, now), Some(asked(1, None)));
        assert_eq!(tail.volunteer(2, now), None);
        assert_eq!(tail.volunteer(1, now), None);
        assert!(tail.publish(1, &batch(7, 9), true, now));
        assert!(!tail.publish(2, &batch(9, 10), false, now));
        assert_eq!(tail.leave(1, now), Some(asked(2, Some(9))));
        assert!(!tail.publish(2, &batch(8, 10), false, now));
        assert!(tail.publish(2, &batch(9, 10), false, now));
        assert_eq!(tail.leave(2, now), None);
        assert_eq!(tail.volunteer(3, now), Some(asked(3, Some(10))));
        assert!(tail.publish(3, &batch(2, 2), true, now));
        assert!(!tail.publish(3, &batch(10, 11), false, now));
    }

    #[test]
    fn a_silent_publisher_is_replaced_if_there_is_another() {
        let start = Instant::now();
        let later = start + SILENCE_MAX;
        let mut tail = Tail::new(start);
        tail.volunteer(1, start);
        assert_eq!(tail.check(later), None);
        tail.volunteer(2, start);
        assert_eq!(tail.check(later), Some((1, asked(2, None))));
        assert_eq!(tail.check(later), None);
        assert!(!tail.publish(1, &batch(0, 0), true, later));
        assert_eq!(tail.leave(1, later), None);
    }
}
