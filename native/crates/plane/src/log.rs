//! The process's own log: JSON lines on standard error.

use std::fmt::Display;

use serde_json::json;

use crate::worker::wall_clock_s;

fn line(level: &str, event: &str, detail: &dyn Display) {
    eprintln!(
        "{}",
        json!({"ts": wall_clock_s(), "level": level, "logger": "plane", "event": event, "detail": detail.to_string()})
    );
}

/// Life-cycle.
pub fn info(event: &str, detail: &dyn Display) {
    line("info", event, detail);
}

/// We recovered from something.
pub fn warning(event: &str, detail: &dyn Display) {
    line("warning", event, detail);
}

/// The process cannot go on.
pub fn fatal(event: &str, detail: &dyn Display) -> ! {
    line("error", event, detail);
    std::process::exit(1);
}
