//! What the machine uses, as seen from inside.

use std::fs;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::statvfs::statvfs;
use nix::sys::time::TimeValLike;
use nix::unistd::{SysconfVar, sysconf};
use serde::Serialize;

use crate::error::{OpError, OpResult};

#[derive(Debug, Serialize)]
pub struct Metrics {
    cpu_seconds: f64,
    memory_used_bytes: u64,
    memory_total_bytes: u64,
    disk_used_bytes: u64,
    disk_total_bytes: u64,
    processes: usize,
    uptime_s: f64,
    load1: f64,
}

pub fn measure() -> OpResult<Metrics> {
    let stats = process_stats();
    let (used, total) = memory(&read("/proc/meminfo")?);
    let disk = statvfs("/").map_err(|errno| OpError::of_errno(errno, "/"))?;
    let block = disk.fragment_size();
    Ok(Metrics {
        cpu_seconds: cpu_seconds(&stats),
        memory_used_bytes: used,
        memory_total_bytes: total,
        disk_used_bytes: disk.blocks().saturating_sub(disk.blocks_free()) * block,
        disk_total_bytes: disk.blocks() * block,
        processes: stats.len(),
        uptime_s: first_number(&read("/proc/uptime")?),
        load1: first_number(&read("/proc/loadavg")?),
    })
}

fn read(path: &str) -> OpResult<String> {
    fs::read_to_string(path).map_err(|error| OpError::of_io(&error, path))
}

fn first_number(text: &str) -> f64 {
    text.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0.0)
}

fn memory(meminfo: &str) -> (u64, u64) {
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map_or(0, |value| first_number(value) as u64 * 1024)
    };
    let total = field("MemTotal");
    (total.saturating_sub(field("MemAvailable")), total)
}

/// `/proc/<pid>/stat` of every process.
fn process_stats() -> Vec<String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = entries.filter(|entry| entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit));
    processes.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok()).collect()
}

/// Time of the running processes and of those that ended below us. gVisor leaves `/proc/stat` at zero, so it is summed.
fn cpu_seconds(stats: &[String]) -> f64 {
    let ticks_per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64;
    let running: u64 = stats.iter().map(|stat| ticks(stat)).sum();
    let reaped = getrusage(UsageWho::RUSAGE_CHILDREN)
        .map_or(0.0, |usage| (usage.user_time() + usage.system_time()).num_milliseconds() as f64 / 1000.0);
    running as f64 / ticks_per_second + reaped
}

/// User and system time of one process, without its ended children: those of ours are counted apart.
fn ticks(stat: &str) -> u64 {
    // The name in parentheses may contain anything, so count from its end.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_in_use_is_what_is_not_available() {
        let meminfo = "MemTotal:    2048 kB\nMemFree:  10 kB\nMemAvailable:   1024 kB\n";
        assert_eq!(memory(meminfo), (1024 * 1024, 2048 * 1024));
    }

    #[test]
    fn times_are_read_after_the_name_whatever_it_is() {
        let stat = "7 (a) b) c) S 1 7 7 0 -1 0 0 0 0 0 30 12 5 6 20 0 1 0 100 0 0";
        assert_eq!(ticks(stat), 42);
        assert_eq!(ticks("nonsense"), 0);
    }

    #[test]
    fn this_machine_can_be_measured() {
        let metrics = measure().unwrap();
        assert!(metrics.memory_total_bytes > 0 && metrics.memory_used_bytes <= metrics.memory_total_bytes);
        assert!(metrics.disk_total_bytes > 0 && metrics.processes > 0 && metrics.uptime_s > 0.0);
    }
}
