//! What one worker counts of its streams.

use std::fmt::Write as _;

use super::subscriber::End;
use crate::metrics::Count;

/// See the module.
#[derive(Debug, Default)]
pub struct StreamCounters {
    /// Clients of event streams.
    pub subscribers: Count,
    /// Events given to them.
    pub events: Count,
    ends: [Count; End::ALL.len()],
    outputs: Count,
    /// Bytes of output streams.
    pub output_bytes: Count,
}

/// An output stream, counted as open as long as it is kept.
pub struct OpenOutput<'a>(&'a StreamCounters);

impl<'a> OpenOutput<'a> {
    /// Counts it.
    pub fn new(counters: &'a StreamCounters) -> Self {
        counters.outputs.add(1);
        Self(counters)
    }
}

impl Drop for OpenOutput<'_> {
    fn drop(&mut self) {
        self.0.outputs.sub(1);
    }
}

impl StreamCounters {
    /// Counts a subscription that has ended.
    pub fn ended(&self, end: End) {
        self.ends[end as usize].add(1);
    }
}

/// Appends the sums over all workers in the Prometheus text format.
pub fn render(out: &mut String, workers: &[&StreamCounters]) {
    let sum = |pick: &dyn Fn(&StreamCounters) -> &Count| {
        workers.iter().fold(0_u64, |sum, worker| sum.wrapping_add(pick(worker).get()))
    };
    push_head(out, "stream_subscribers", "gauge", "Clients of event streams.");
    let _ = writeln!(out, "sandgate_plane_stream_subscribers {}", sum(&|worker| &worker.subscribers));
    push_head(out, "stream_events_total", "counter", "Events delivered to clients of event streams.");
    let _ = writeln!(out, "sandgate_plane_stream_events_total {}", sum(&|worker| &worker.events));
    push_head(out, "stream_outputs", "gauge", "Open streams of processes' output.");
    let _ = writeln!(out, "sandgate_plane_stream_outputs {}", sum(&|worker| &worker.outputs));
    push_head(out, "stream_output_bytes_total", "counter", "Bytes of processes' output sent as events.");
    let _ = writeln!(out, "sandgate_plane_stream_output_bytes_total {}", sum(&|worker| &worker.output_bytes));
    push_head(out, "stream_ends_total", "counter", "Event streams that ended, by reason.");
    for end in End::ALL {
        let count = sum(&|worker| &worker.ends[end as usize]);
        let _ = writeln!(out, "sandgate_plane_stream_ends_total{{reason=\"{}\"}} {count}", end.name());
    }
}

fn push_head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = write!(out, "# HELP sandgate_plane_{name} {help}\n# TYPE sandgate_plane_{name} {kind}\n");
}
