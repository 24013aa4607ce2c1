//! Counters. Each worker writes its own; a scrape adds them up.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::failure::{CODES, Code};
use crate::histogram::{self, Figures, Histogram};
use crate::streams::counters::{self, StreamCounters};
use crate::table::Table;
use crate::watch::{Phase, TIMEOUTS};

/// A number that one thread writes and others read.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds. Only the owning worker may call it: a plain load and store, no locked instruction.
    pub fn add(&self, amount: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
    }

    /// Subtracts, under the same rule.
    pub fn sub(&self, amount: u64) {
        self.add(amount.wrapping_neg());
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Where a request went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Nowhere: refused before it had a target.
    None,
    /// The API.
    Api,
    /// A sandbox.
    Preview,
}

const CLASSES: [(Class, &str); 3] = [(Class::None, "none"), (Class::Api, "api"), (Class::Preview, "preview")];

/// `none`: the request ended without an answer.
const STATUS_CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];

/// What one worker counts.
#[derive(Debug, Default)]
pub struct Counters {
    requests: [[Count; 6]; 3],
    failures: [Count; CODES],
    timeouts: [Count; TIMEOUTS.len() + 1],
    durations: [Histogram; 3],
    first_bytes: [Histogram; 3],
    /// How long requests waited for their sandbox to wake up.
    pub wake_waits: Histogram,
    /// Connections accepted.
    pub accepted: Count,
    /// Connections open.
    pub connections: Count,
    /// TLS connections established, and those that failed before they were.
    pub tls_handshakes: Count,
    /// See there.
    pub tls_failures: Count,
    /// Connections that speak HTTP/2.
    pub http2_connections: Count,
    /// Upgraded connections open.
    pub tunnels: Count,
    /// Bytes from clients to upstreams, heads left out.
    pub bytes_up: Count,
    /// Bytes from upstreams to clients, heads left out.
    pub bytes_down: Count,
    /// Those of both that went from socket to socket within the kernel.
    pub bytes_spliced: Count,
    /// Connections to upstreams opened.
    pub connects: Count,
    /// Requests sent again because a pooled connection turned out to be closed.
    pub retries: Count,
    /// Connections ended because access was revoked.
    pub revoked: Count,
    /// Sandboxes that this worker was the first to want awake.
    pub wakes: Count,
    /// Requests that wait for a sandbox to wake up.
    pub waiting: Count,
    /// Streams that the API has ordered.
    pub streams: StreamCounters,
}

impl Counters {
    /// Counts an answered request.
    pub fn request(&self, class: Class, status: u16) {
        self.requests[class as usize][usize::from(status / 100).min(5)].add(1);
    }

    /// Counts how long a request took, and how long until its response began.
    pub fn took(&self, class: Class, first_byte_us: u64, whole_us: u64) {
        self.first_bytes[class as usize].observe(first_byte_us);
        self.durations[class as usize].observe(whole_us);
    }

    /// Whether any connection is open.
    pub fn has_connections(&self) -> bool {
        self.connections.get() != 0
    }

    /// Counts a time-out.
    pub fn timeout(&self, phase: Phase) {
        self.timeouts[phase as usize].add(1);
    }

    /// Counts an answer of our own.
    pub fn failure(&self, code: Code) {
        self.failures[code as usize].add(1);
    }
}

/// All workers' counters.
pub struct Metrics {
    workers: Vec<Arc<Counters>>,
}

impl Metrics {
    /// For so many workers.
    pub fn new(workers: usize) -> Self {
        Self { workers: (0..workers).map(|_| Arc::default()).collect() }
    }

    /// One worker's.
    pub fn worker(&self, index: usize) -> Arc<Counters> {
        Arc::clone(&self.workers[index])
    }

    fn sum(&self, pick: impl Fn(&Counters) -> &Count) -> u64 {
        self.workers.iter().fold(0, |sum, worker| sum.wrapping_add(pick(worker).get()))
    }

    /// Connections open.
    pub fn connections(&self) -> u64 {
        self.sum(|worker| &worker.connections)
    }

    /// Upgraded connections open.
    pub fn tunnels(&self) -> u64 {
        self.sum(|worker| &worker.tunnels)
    }

    /// Requests that wait for a sandbox to wake up.
    pub fn waiting(&self) -> u64 {
        self.sum(|worker| &worker.waiting)
    }

    /// Requests answered.
    pub fn requests(&self) -> u64 {
        self.workers.iter().flat_map(|worker| worker.requests.iter().flatten()).map(Count::get).sum()
    }

    /// The Prometheus text format.
    pub fn render(&self, table: &Table) -> String {
        let mut out = String::with_capacity(4096);
        let _ = writeln!(
            out,
            "# HELP sandgate_plane_requests_total Requests answered.\n# TYPE sandgate_plane_requests_total counter"
        );
        for (class, name) in CLASSES {
            for (index, status) in STATUS_CLASSES.into_iter().enumerate() {
                let count = self.sum(|worker| &worker.requests[class as usize][index]);
                let _ = writeln!(out, "sandgate_plane_requests_total{{class=\"{name}\",status=\"{status}\"}} {count}");
            }
        }
        let _ = writeln!(
            out,
            "# HELP sandgate_plane_failures_total Answers of the plane itself, by code.\n# TYPE sandgate_plane_failures_total counter"
        );
        for code in Code::ALL {
            let count = self.sum(|worker| &worker.failures[code as usize]);
            let _ = writeln!(out, "sandgate_plane_failures_total{{code=\"{}\"}} {count}", code.name());
        }
        let _ = writeln!(
            out,
            "# HELP sandgate_plane_timeouts_total Waits that took too long, by what was waited for.\n# TYPE sandgate_plane_timeouts_total counter"
        );
        for (phase, name) in TIMEOUTS {
            let count = self.sum(|worker| &worker.timeouts[phase as usize]);
            let _ = writeln!(out, "sandgate_plane_timeouts_total{{wait=\"{name}\"}} {count}");
        }
        self.render_histograms(&mut out);
        let mut one = |name: &str, kind: &str, help: &str, value: u64| {
            let _ = writeln!(
                out,
                "# HELP sandgate_plane_{name} {help}\n# TYPE sandgate_plane_{name} {kind}\nsandgate_plane_{name} {value}"
            );
        };
        one("connections_total", "counter", "Connections accepted.", self.sum(|w| &w.accepted));
        one("connections", "gauge", "Connections open.", self.connections());
        one("tls_handshakes_total", "counter", "TLS connections established.", self.sum(|w| &w.tls_handshakes));
        one("tls_failures_total", "counter", "TLS connections that failed before.", self.sum(|w| &w.tls_failures));
        one("http2_connections_total", "counter", "Connections by HTTP/2.", self.sum(|w| &w.http2_connections));
        one("tunnels", "gauge", "Upgraded connections open.", self.tunnels());
        one("upload_bytes_total", "counter", "Body bytes from clients to upstreams.", self.sum(|w| &w.bytes_up));
        one("download_bytes_total", "counter", "Body bytes from upstreams to clients.", self.sum(|w| &w.bytes_down));
        one("spliced_bytes_total", "counter", "Those of both that were never copied.", self.sum(|w| &w.bytes_spliced));
        one("upstream_connects_total", "counter", "Connections to upstreams opened.", self.sum(|w| &w.connects));
        one(
            "upstream_retries_total",
            "counter",
            "Requests sent again after a stale connection.",
            self.sum(|w| &w.retries),
        );
        one("revoked_total", "counter", "Connections ended because access was revoked.", self.sum(|w| &w.revoked));
        one("wakes_total", "counter", "Wakes asked for.", self.sum(|w| &w.wakes));
        one("waiting", "gauge", "Requests that wait for a sandbox to wake up.", self.waiting());
        one("sandboxes", "gauge", "Sandboxes in the route table.", table.sandboxes() as u64);
        one("table_generation", "counter", "Changes of the route table.", table.generation());
        let streams: Vec<_> = self.workers.iter().map(|worker| &worker.streams).collect();
        counters::render(&mut out, &streams);
        out
    }
}

impl Metrics {
    fn render_histograms(&self, out: &mut String) {
        let mut by_class = |name: &str, help: &str, pick: fn(&Counters) -> &[Histogram; 3]| {
            histogram::write_head(out, name, help);
            for (class, label) in CLASSES {
                let figures = Figures::sum(self.workers.iter().map(|worker| &pick(worker)[class as usize]));
                figures.write(out, name, &format!("class=\"{label}\""));
            }
        };
        by_class(
            "sandgate_plane_request_seconds",
            "Time from a request's header to the end of its response.",
            |worker| &worker.durations,
        );
        by_class(
            "sandgate_plane_first_byte_seconds",
            "Time from a request's header to the header of its response.",
            |worker| &worker.first_bytes,
        );
        let name = "sandgate_plane_wake_seconds";
        histogram::write_head(out, name, "Time requests waited for their sandbox to wake up.");
        Figures::sum(self.workers.iter().map(|worker| &worker.wake_waits)).write(out, name, "");
    }
}

impl Class {
    /// As logs and metrics spell it.
    pub fn name(self) -> &'static str {
        CLASSES[self as usize].1
    }
}
