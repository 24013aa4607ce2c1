//! Durations in buckets, as Prometheus counts them.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::metrics::Count;

/// Upper bounds in microseconds: from a request that a neighbour answers to a download.
const BOUNDS_US: [u64; 16] = [
    250,
    500,
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    10_000_000,
    60_000_000,
    600_000_000,
];

/// The same for one sandbox, of which there may be ten thousand.
const SANDBOX_BOUNDS_US: [u64; 7] = [5_000, 25_000, 100_000, 500_000, 2_500_000, 10_000_000, 60_000_000];

/// What one thread counts and others read.
#[derive(Debug, Default)]
pub struct Histogram {
    counts: [Count; BOUNDS_US.len() + 1],
    sum_us: Count,
}

impl Histogram {
    /// Counts one duration. Only the owning worker may call it.
    pub fn observe(&self, us: u64) {
        self.counts[BOUNDS_US.partition_point(|&bound| bound < us)].add(1);
        self.sum_us.add(us);
    }
}

/// What all threads count.
#[derive(Debug, Default)]
pub struct SandboxHistogram {
    counts: [AtomicU64; SANDBOX_BOUNDS_US.len() + 1],
    sum_us: AtomicU64,
}

impl SandboxHistogram {
    /// Counts one duration.
    pub fn observe(&self, us: u64) {
        let at = SANDBOX_BOUNDS_US.partition_point(|&bound| bound < us);
        self.counts[at].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    /// The figures as they are now.
    pub fn figures(&self) -> Figures {
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        Figures { bounds_us: &SANDBOX_BOUNDS_US, counts, sum_us: self.sum_us.load(Ordering::Relaxed) }
    }
}

/// A histogram at some moment.
#[derive(Clone, Debug)]
pub struct Figures {
    bounds_us: &'static [u64],
    counts: Vec<u64>,
    sum_us: u64,
}

impl Figures {
    /// Of no sandbox yet.
    pub fn of_sandboxes() -> Self {
        Self { bounds_us: &SANDBOX_BOUNDS_US, counts: vec![0; SANDBOX_BOUNDS_US.len() + 1], sum_us: 0 }
    }

    /// Of all workers together.
    pub fn sum<'a>(all: impl Iterator<Item = &'a Histogram>) -> Self {
        let mut found = Self { bounds_us: &BOUNDS_US, counts: vec![0; BOUNDS_US.len() + 1], sum_us: 0 };
        for one in all {
            for (sum, count) in found.counts.iter_mut().zip(&one.counts) {
                *sum += count.get();
            }
            found.sum_us += one.sum_us.get();
        }
        found
    }

    /// Durations counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Adds what `now` has more than `before`.
    pub fn add_growth(&mut self, now: &Self, before: &Self) {
        for (sum, (now, before)) in self.counts.iter_mut().zip(now.counts.iter().zip(&before.counts)) {
            *sum += now.saturating_sub(*before);
        }
        self.sum_us += now.sum_us.saturating_sub(before.sum_us);
    }

    /// Writes the series of one histogram. `label` is `name="value"`, or empty.
    pub fn write(&self, out: &mut String, name: &str, label: &str) {
        let comma = if label.is_empty() { "" } else { "," };
        let braces = if label.is_empty() { String::new() } else { format!("{{{label}}}") };
        let mut count = 0;
        for (bound, in_bucket) in self.bounds_us.iter().zip(&self.counts) {
            count += in_bucket;
            let seconds = *bound as f64 / 1e6;
            let _ = writeln!(out, "{name}_bucket{{{label}{comma}le=\"{seconds}\"}} {count}");
        }
        let (total, sum_s) = (self.count(), self.sum_us as f64 / 1e6);
        let _ = writeln!(out, "{name}_bucket{{{label}{comma}le=\"+Inf\"}} {total}");
        let _ = writeln!(out, "{name}_sum{braces} {sum_s}\n{name}_count{braces} {total}");
    }
}

/// Writes what a metric is.
pub fn write_head(out: &mut String, name: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
}
