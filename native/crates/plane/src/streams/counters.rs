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
    /// Open streams of output.
    pub outputs: Count,
    /// Bytes of output streams.
    pub output_bytes: Count,
    /// Files on their way.
    pub files: Count,
    /// Bytes of files, to clients and from them.
    pub file_bytes_down: Count,
    /// See there.
    pub file_bytes_up: Count,
}

/// Something that is counted as open as long as it is kept.
pub struct Open<'a>(&'a Count);

impl<'a> Open<'a> {
    /// Counts it.
    pub fn new(count: &'a Count) -> Self {
        count.add(1);
        Self(count)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.sub(1);
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
    push_head(out, "stream_files", "gauge", "Files on their way into sandboxes or out of them.");
    let _ = writeln!(out, "sandgate_plane_stream_files {}", sum(&|worker| &worker.files));
    push_head(out, "stream_file_bytes_total", "counter", "Bytes of files passed, by direction.");
    let (down, up) = (sum(&|worker| &worker.file_bytes_down), sum(&|worker| &worker.file_bytes_up));
    let _ = writeln!(out, "sandgate_plane_stream_file_bytes_total{{direction=\"down\"}} {down}");
    let _ = writeln!(out, "sandgate_plane_stream_file_bytes_total{{direction=\"up\"}} {up}");
    push_head(out, "stream_ends_total", "counter", "Event streams that ended, by reason.");
    for end in End::ALL {
        let count = sum(&|worker| &worker.ends[end as usize]);
        let _ = writeln!(out, "sandgate_plane_stream_ends_total{{reason=\"{}\"}} {count}", end.name());
    }
}

fn push_head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = write!(out, "# HELP sandgate_plane_{name} {help}\n# TYPE sandgate_plane_{name} {kind}\n");
}
