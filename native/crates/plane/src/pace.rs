//! How fast a client takes or sends what somebody waits to move.
//!
//! Only the time counts in which the plane had bytes for the client, or was owed some: an idle stream, or one whose
//! other side is slow, has no pace. Not for clients that move nothing at all: a deadline ends those.

use std::cell::Cell;

/// The least that is put up with.
#[derive(Clone, Copy, Debug)]
pub struct Floor {
    /// Bytes per second; 0: none.
    pub bytes_per_s: u64,
    /// So much waiting is judged at a time: a line may be worse for a while.
    pub window_ms: u64,
}

/// What one client has moved in the window so far.
#[derive(Debug, Default)]
pub struct Pace {
    waited_ms: Cell<u64>,
    bytes: Cell<u64>,
}

impl Pace {
    /// Notes that bytes moved after a wait. Whether a window has ended with too few of them.
    pub fn is_too_slow(&self, bytes: usize, waited_ms: u64, floor: Floor) -> bool {
        let waited_ms = self.waited_ms.get() + waited_ms;
        let bytes = self.bytes.get() + bytes as u64;
        let is_due = waited_ms >= floor.window_ms;
        self.waited_ms.set(if is_due { 0 } else { waited_ms });
        self.bytes.set(if is_due { 0 } else { bytes });
        is_due && bytes.saturating_mul(1000) < floor.bytes_per_s.saturating_mul(waited_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOOR: Floor = Floor { bytes_per_s: 100, window_ms: 10_000 };

    #[test]
    fn a_window_is_judged_as_a_whole() {
        for (bytes, is_slow) in [(999, true), (1000, false), (1001, false)] {
            let pace = Pace::default();
            assert!(!pace.is_too_slow(0, 9_999, FLOOR), "not before its end");
            assert_eq!(pace.is_too_slow(bytes, 1, FLOOR), is_slow, "{bytes} bytes");
        }
    }

    #[test]
    fn each_window_counts_for_itself() {
        let pace = Pace::default();
        assert!(!pace.is_too_slow(1_000_000, 10_000, FLOOR));
        assert!(pace.is_too_slow(1, 10_000, FLOOR), "what was taken before is no credit");
    }

    #[test]
    fn without_waiting_nobody_is_slow() {
        let pace = Pace::default();
        assert!((0..100_000).all(|_| !pace.is_too_slow(1, 0, FLOOR)));
    }

    #[test]
    fn without_a_floor_nobody_is_slow() {
        assert!(!Pace::default().is_too_slow(0, u64::MAX / 2, Floor { bytes_per_s: 0, ..FLOOR }));
    }
}
