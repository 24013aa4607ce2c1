//! The newest stretch of the log, for those who join with a cursor that lies a little back.
//!
//! ```text
//!      floor                     through
//! ───────┼── ring: every event ────┼──▶
//!          a subscriber may join here
//! ```

use std::collections::VecDeque;
use std::sync::Arc;

use super::event::{Batch, Event};

/// Events and bytes kept at most. Between reading the database and joining pass milliseconds; a slow client's backlog
/// may take a minute.
const EVENTS_MAX: usize = 16 * 1024;
const BYTES_MAX: usize = 16 * 1024 * 1024;

/// Where a cursor lies.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    /// Everything after it is here or still to come.
    Within,
    /// Some of what comes after it is not here any more.
    TooOld,
}

/// How a stretch of the log goes with what was there before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// There was nothing.
    First,
    /// It follows on it.
    Next,
    /// It does not: something is missing between the two, or it is another log.
    Gap,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Window {
    /// None until the first batch.
    span: Option<(u64, u64)>,
    ring: VecDeque<Arc<Event>>,
    bytes: usize,
}

impl Window {
    /// Takes the next stretch of the log. What does not follow on the last one begins a new window.
    pub fn extend(&mut self, batch: &Batch) -> Link {
        let link = match self.span {
            Some((_, through)) if through == batch.after => Link::Next,
            Some(_) => Link::Gap,
            None => Link::First,
        };
        if link != Link::Next {
            self.ring.clear();
            self.bytes = 0;
            self.span = Some((batch.after, batch.after));
        }
        for event in &batch.events {
            self.bytes += event.bytes(false).len();
            self.ring.push_back(Arc::clone(event));
        }
        let mut floor = self.span.map_or(0, |(floor, _)| floor);
        while self.ring.len() > EVENTS_MAX || self.bytes > BYTES_MAX {
            let Some(oldest) = self.ring.pop_front() else { break };
            self.bytes -= oldest.bytes(false).len();
            floor = oldest.seq;
        }
        self.span = Some((floor, batch.through));
        link
    }

    /// How far it goes.
    pub fn through(&self) -> u64 {
        self.span.map_or(0, |(_, through)| through)
    }

    /// Forgets everything: what comes next may not follow on it.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// Whether one can join with this cursor. Before the first batch, that one will tell.
    pub fn place(&self, cursor: u64) -> Place {
        match self.span {
            Some((floor, _)) if cursor < floor => Place::TooOld,
            _ => Place::Within,
        }
    }

    /// The events after a cursor that are here.
    pub fn after(&self, cursor: u64) -> impl Iterator<Item = &Arc<Event>> {
        let from = self.ring.partition_point(|event| event.seq <= cursor);
        self.ring.range(from..)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::streams::event::Record;

    fn batch(after: u64, through: u64) -> Batch {
        let record = |seq: u64| {
            let text = format!(
                r#"{{"seq":{seq},"topic":"t","type":"k","resource_type":"r","resource_id":"i","frame":"data\n\n"}}"#
            );
            serde_json::from_str::<Record>(&text).expect("a record")
        };
        Batch::new(after, through, (after + 1..=through).map(record).collect()).expect("a batch")
    }

    fn seqs(window: &Window, cursor: u64) -> Vec<u64> {
        window.after(cursor).map(|event| event.seq).collect()
    }

    #[test]
    fn gives_what_comes_after_a_cursor() {
        let mut window = Window::default();
        assert_eq!(window.place(0), Place::Within);
        assert_eq!(window.extend(&batch(10, 12)), Link::First);
        assert_eq!(window.extend(&batch(12, 14)), Link::Next);
        assert_eq!(seqs(&window, 11), [12, 13, 14]);
        assert_eq!(seqs(&window, 14), [0; 0]);
        assert_eq!(seqs(&window, 99), [0; 0]);
        assert_eq!((window.place(10), window.place(9)), (Place::Within, Place::TooOld));
    }

    #[test]
    fn forgets_the_oldest() {
        let mut window = Window::default();
        let many = EVENTS_MAX as u64 + 5;
        window.extend(&batch(0, many));
        assert_eq!((window.place(5), window.place(4)), (Place::Within, Place::TooOld));
        assert_eq!(seqs(&window, 5).len(), EVENTS_MAX);
    }

    #[test]
    fn starts_again_after_a_gap() {
        let mut window = Window::default();
        window.extend(&batch(0, 3));
        assert_eq!(window.extend(&batch(7, 8)), Link::Gap);
        assert_eq!((window.place(7), window.place(6)), (Place::Within, Place::TooOld));
        assert_eq!(seqs(&window, 0), [8]);
    }
}
