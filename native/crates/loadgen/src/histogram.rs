//! Durations in buckets that grow with them: 64 to each doubling, so a percentile is off by at most 1.6 %.

use serde_json::{Value, json};

const SUB_BITS: u32 = 6;
const SUB: u64 = 1 << SUB_BITS;

/// Counts of durations in nanoseconds.
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    max: u64,
}

impl Histogram {
    pub fn new() -> Self {
        Self { buckets: vec![0; ((64 - SUB_BITS + 1) as usize) << SUB_BITS], count: 0, max: 0 }
    }

    pub fn record(&mut self, ns: u64) {
        self.buckets[index(ns)] += 1;
        self.count += 1;
        self.max = self.max.max(ns);
    }

    /// The smallest duration that `share` of all do not exceed, rounded up to its bucket's end.
    pub fn percentile(&self, share: f64) -> u64 {
        let rank = ((share * self.count as f64).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return upper(index).min(self.max);
            }
        }
        self.max
    }

    /// The usual percentiles in microseconds.
    pub fn summary(&self) -> Value {
        let us = |ns: u64| ns as f64 / 1e3;
        json!({
            "count": self.count,
            "p50": us(self.percentile(0.5)),
            "p90": us(self.percentile(0.9)),
            "p99": us(self.percentile(0.99)),
            "p99.9": us(self.percentile(0.999)),
            "max": us(self.max),
        })
    }
}

fn index(ns: u64) -> usize {
    if ns < SUB {
        return ns as usize;
    }
    let shift = ns.ilog2() - SUB_BITS;
    ((u64::from(shift) << SUB_BITS) + (ns >> shift)) as usize
}

/// The largest duration of a bucket.
fn upper(index: usize) -> u64 {
    let index = index as u64;
    if index < 2 * SUB {
        return index;
    }
    let shift = (index >> SUB_BITS) - 1;
    (((index & (SUB - 1)) + SUB + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_lies_in_its_bucket() {
        for ns in (0..200).chain((7..60).flat_map(|bit| [(1 << bit) - 1, 1 << bit, (1 << bit) + 12_345])) {
            assert!(upper(index(ns)) >= ns, "{ns}");
            assert!(index(ns) == 0 || upper(index(ns) - 1) < ns, "{ns}");
        }
    }

    #[test]
    fn percentiles_are_close() {
        let mut histogram = Histogram::new();
        (1..=1000).for_each(|us| histogram.record(us * 1000));
        for (share, us) in [(0.5, 500.0), (0.99, 990.0), (0.999, 999.0), (1.0, 1000.0)] {
            let got = histogram.percentile(share) as f64 / 1e3;
            assert!((us..us * 1.016 + 1.0).contains(&got), "{share}: {got}");
        }
    }
}
