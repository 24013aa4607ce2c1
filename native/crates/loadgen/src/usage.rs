//! Processor time of the processes that are measured, and of everything else.

use std::fs;
use std::time::Instant;

use serde_json::{Map, Value, json};

/// Processes to account for.
#[derive(clap::Args)]
pub struct Watched {
    /// A process of the proxy, with its children; may be given several times.
    #[arg(long = "proxy-pid")]
    proxy: Vec<u32>,
    /// Another process of the benchmark.
    #[arg(long = "aside-pid")]
    aside: Vec<u32>,
}

/// Readings at one moment, in seconds.
pub struct Usage {
    at: Instant,
    proxy: f64,
    proxy_user: f64,
    aside: f64,
    busy: f64,
}

impl Usage {
    pub fn now(watched: &Watched) -> Self {
        let proxy: Vec<u32> = watched.proxy.iter().flat_map(|&pid| family(pid)).collect();
        let sum = |pids: &[u32]| pids.iter().map(|&pid| run_time(pid)).sum::<f64>();
        Self {
            at: Instant::now(),
            proxy: sum(&proxy),
            proxy_user: proxy.iter().map(|&pid| user_time(pid)).sum(),
            aside: sum(&watched.aside) + run_time(std::process::id()),
            busy: busy_time(),
        }
    }

    /// What was used since `earlier`. `foreign_cores` is what neither proxy nor benchmark used.
    pub fn since(&self, earlier: &Self) -> Map<String, Value> {
        let seconds = (self.at - earlier.at).as_secs_f64();
        let proxy = self.proxy - earlier.proxy;
        let aside = self.aside - earlier.aside;
        let foreign = (self.busy - earlier.busy - proxy - aside).max(0.0) / seconds;
        let fields = [
            ("seconds", seconds),
            ("proxy_cpu_s", proxy),
            ("proxy_user_s", self.proxy_user - earlier.proxy_user),
            ("aside_cpu_s", aside),
            ("foreign_cores", foreign),
        ];
        fields.into_iter().map(|(name, value)| (name.to_owned(), json!(value))).collect()
    }
}

/// A process and its children, theirs included: some proxies make one for each connection.
fn family(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children = text.split_ascii_whitespace().filter_map(|child| child.parse().ok());
    std::iter::once(pid).chain(children.flat_map(family)).collect()
}

/// The time that all threads of a process have run, by the scheduler's clock: utime and stime add up to it, but are
/// told in ticks of 10 ms.
fn run_time(pid: u32) -> f64 {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0.0 };
    let ns = |thread: fs::DirEntry| -> Option<f64> {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split_ascii_whitespace().next()?.parse().ok()
    };
    threads.flatten().filter_map(ns).sum::<f64>() / 1e9
}

/// A kernel's tick as /proc tells it; the same on every Linux that we run on.
const TICKS_PER_S: f64 = 100.0;

fn user_time(pid: u32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name before it may hold anything, even spaces and parentheses.
    let fields = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    fields.split_ascii_whitespace().nth(11).and_then(|ticks| ticks.parse::<f64>().ok()).unwrap_or(0.0) / TICKS_PER_S
}

/// All cores' time that was neither idle nor stolen.
fn busy_time() -> f64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks = text.lines().next().unwrap_or_default().split_ascii_whitespace().skip(1);
    let ticks: Vec<f64> = ticks.filter_map(|field| field.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal
    [0, 1, 2, 5, 6].iter().filter_map(|&at| ticks.get(at)).sum::<f64>() / TICKS_PER_S
}
