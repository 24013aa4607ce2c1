//! How a process is described to clients (docs/protocol.md, "process record").

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use serde::Serialize;
use serde_json::{Value, json};

use super::{Command, Process, State};
use crate::error::{OpError, OpResult};
use sandgate_frame::{CHANNEL_PTY, CHANNEL_STDERR, CHANNEL_STDOUT};

/// What `timeout(1)` reports.
const TIMEOUT_EXIT_CODE: i32 = 124;

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    pub code: i32,
    pub signal: Option<&'static str>,
    pub reason: &'static str,
    pub duration_ms: u64,
}

impl Exit {
    /// `None` for a status that is no end, such as a stop.
    pub fn of_status(status: WaitStatus, timed_out: bool, duration_ms: u64) -> Option<Self> {
        let (code, signal) = match status {
            WaitStatus::Exited(_, code) => (code, None),
            WaitStatus::Signaled(_, signal, _) => (128 + signal as i32, Some(signal.as_str())),
            _ => return None,
        };
        let (exit_code, reason) = match (timed_out, signal) {
            (true, _) => (TIMEOUT_EXIT_CODE, "timeout"),
            (false, Some(_)) => (code, "signaled"),
            (false, None) => (code, "exited"),
        };
        Some(Self { code: exit_code, signal, reason, duration_ms })
    }

    /// Payload of the `EVENT` frame.
    pub fn to_event(&self) -> Value {
        json!({"type": "exit", "exit_code": self.code, "signal": self.signal, "reason": self.reason,
               "duration_ms": self.duration_ms})
    }
}

#[derive(Serialize)]
pub struct Record<'a> {
    id: &'a str,
    pid: Option<i32>,
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    argv: Option<&'a [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    shell: Option<&'a str>,
    cwd: &'a str,
    user: &'a str,
    state: &'static str,
    exit_code: Option<i32>,
    signal: Option<&'static str>,
    reason: Option<&'static str>,
    started_at: f64,
    exited_at: Option<f64>,
    duration_ms: u64,
    background: bool,
    stdin_bytes: u64,
    stdout_bytes: u64,
    stderr_bytes: u64,
}

impl<'a> Record<'a> {
    pub fn of(process: &'a Process) -> Self {
        let (argv, shell) = match &process.command {
            Command::Argv(argv) => (Some(argv.as_slice()), None),
            Command::Shell(line) => (None, Some(line.as_str())),
        };
        let exit = process.exit.as_ref();
        let running = matches!(process.state, State::Starting | State::Running);
        Self {
            id: &process.id,
            pid: process.pid.map(nix::unistd::Pid::as_raw),
            name: process.name.as_deref(),
            argv,
            shell,
            cwd: &process.cwd,
            user: &process.user,
            state: if running { "running" } else { "exited" },
            exit_code: exit.map(|exit| exit.code),
            signal: exit.and_then(|exit| exit.signal),
            reason: exit.map(|exit| exit.reason),
            started_at: process.started_at,
            exited_at: process.exited_at,
            duration_ms: exit.map_or_else(|| process.started.elapsed().as_millis() as u64, |exit| exit.duration_ms),
            background: process.background,
            stdin_bytes: process.input.received(),
            stdout_bytes: process.written(CHANNEL_STDOUT) + process.written(CHANNEL_PTY),
            stderr_bytes: process.written(CHANNEL_STDERR),
        }
    }
}

/// A signal by name (with or without `SIG`) or number.
pub fn signal_from_json(value: &Value) -> OpResult<Signal> {
    let unknown = || OpError::bad_request(format!("{value} is not a signal"));
    if let Some(number) = value.as_i64() {
        return i32::try_from(number).ok().and_then(|n| Signal::try_from(n).ok()).ok_or_else(unknown);
    }
    let name = value.as_str().ok_or_else(unknown)?.to_ascii_uppercase();
    if let Ok(number) = name.parse::<i32>() {
        return Signal::try_from(number).map_err(|_| unknown());
    }
    let full = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    full.parse().map_err(|_| unknown())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::Pid;

    #[test]
    fn signals_have_names_and_numbers() {
        for value in [json!("SIGINT"), json!("int"), json!(2), json!("2")] {
            assert_eq!(signal_from_json(&value).unwrap(), Signal::SIGINT);
        }
        for value in [json!("SIGNONE"), json!(0), json!(-1), json!(1_u64 << 40), json!(null), json!([])] {
            assert!(signal_from_json(&value).is_err(), "{value}");
        }
    }

    #[test]
    fn exit_codes_are_those_of_a_shell() {
        let pid = Pid::from_raw(1);
        let killed = WaitStatus::Signaled(pid, Signal::SIGKILL, false);
        let exit = Exit::of_status(killed, false, 5).unwrap();
        assert_eq!((exit.code, exit.signal, exit.reason), (137, Some("SIGKILL"), "signaled"));
        assert_eq!(Exit::of_status(killed, true, 5).unwrap().code, 124);
        assert_eq!(Exit::of_status(WaitStatus::Exited(pid, 7), false, 5).unwrap().code, 7);
        assert_eq!(Exit::of_status(WaitStatus::Continued(pid), false, 5), None);
    }
}
