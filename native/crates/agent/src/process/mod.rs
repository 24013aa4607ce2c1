//! Processes: one record per `exec`, its retained output, its readers, and how it ended.
//!
//! ```text
//!  starting ──▶ running ──▶ exited ──▶ finished
//!      └──▶ (forgotten: it could not be started)
//! ```
//! *Exited*: the kernel told us the status. *Finished*: its output is over as well, so readers may be told.

mod input;
mod login;
mod output;
mod record;
mod ring;
mod shell;
mod spawn;
mod spawn_unsafe;
mod table;
mod tty;
mod tty_unsafe;

pub use input::Input;
pub use login::Logins;
pub use output::Output;
pub use record::{Exit, Record, signal_from_json};
pub use spawn::{Command, Host, Request, Spawned, spawn, warm_up};
pub use table::{Draft, Processes, Wanted, signal};
pub use tty::{Size, resize};

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use sandgate_frame::WINDOW_BYTES;

/// A stream of a connection, as the process layer knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StreamKey {
    pub conn: u64,
    pub stream: u32,
}

/// How far one reader is on one channel.
#[derive(Clone, Copy, Debug)]
pub struct Cursor {
    /// Offset of the next byte to send.
    pub sent: u64,
    /// Everything before it has reached the reader for good: its credit came back.
    pub confirmed: u64,
    pub credit: u64,
    pub ended: bool,
}

/// A stream attached to a process.
#[derive(Debug)]
pub struct Reader {
    pub key: StreamKey,
    /// Whether it asked by `exec` (and which kind) or by `attach`; decides the shape of the reply.
    pub asked: Asked,
    pub replied: bool,
    /// Wants what comes later too, not only what is there.
    pub follow: bool,
    pub cursors: [Cursor; 4],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Exec { resumed: bool },
    Attach,
}

/// Where a reader wants to start.
#[derive(Clone, Copy, Debug, Default)]
pub struct From {
    pub offsets: [Option<u64>; 4],
    pub tail_bytes: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Starting,
    Running,
    Exited,
    Finished,
}

/// One process.
#[derive(Debug)]
pub struct Process {
    pub serial: u64,
    pub id: String,
    pub name: Option<String>,
    pub command: Command,
    pub cwd: String,
    pub user: String,
    pub background: bool,
    pub timeout_s: Option<f64>,
    pub log_bytes_max: usize,
    pub state: State,
    pub pid: Option<Pid>,
    pub started_at: f64,
    pub started: Instant,
    pub exited_at: Option<f64>,
    pub exit: Option<Exit>,
    pub timed_out: bool,
    /// What it was to be sent when it had no pid yet.
    pub early_signal: Option<Signal>,
    pub input: Input,
    pub outputs: Vec<Output>,
    pub readers: Vec<Reader>,
}

impl Process {
    pub fn is_alive(&self) -> bool {
        self.state == State::Running
    }

    /// Attach a stream. Offsets beyond what was written are refused: they belong to another process.
    pub fn attach(&mut self, key: StreamKey, asked: Asked, follow: bool, from: From) -> Result<(), String> {
        let fresh = Cursor { sent: 0, confirmed: 0, credit: WINDOW_BYTES, ended: false };
        let mut cursors = [fresh; 4];
        for output in &mut self.outputs {
            let (start, end) = (output.ring.start(), output.ring.end());
            let channel = usize::from(output.channel);
            let tail = from.tail_bytes.map(|bytes| end.saturating_sub(bytes));
            let wanted = from.offsets[channel].or(tail).unwrap_or(start);
            if wanted > end {
                return Err(format!("offset {wanted} on channel {channel} is beyond its {end} bytes"));
            }
            let sent = wanted.max(start);
            cursors[channel] = Cursor { sent, confirmed: sent, ..fresh };
            output.lossy = self.background;
        }
        self.readers.push(Reader { key, asked, replied: false, follow, cursors });
        Ok(())
    }

    pub fn reader(&mut self, key: StreamKey) -> Option<&mut Reader> {
        self.readers.iter_mut().find(|reader| reader.key == key)
    }

    pub fn output(&mut self, channel: u8) -> Option<&mut Output> {
        self.outputs.iter_mut().find(|output| output.channel == channel)
    }

    /// Bytes of `channel` that every following reader has for good; none when nobody reads.
    pub fn confirmed(&self, channel: u8) -> Option<u64> {
        let following = self.readers.iter().filter(|reader| reader.follow);
        following.map(|reader| reader.cursors[usize::from(channel)].confirmed).min()
    }

    pub fn written(&self, channel: u8) -> u64 {
        let output = self.outputs.iter().find(|output| output.channel == channel);
        output.map_or(0, |output| output.ring.end())
    }

    /// Bytes of memory its retained output takes.
    pub fn retained(&self) -> usize {
        self.outputs.iter().map(|output| output.ring.len()).sum()
    }
}

/// Unix seconds.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |elapsed| elapsed.as_secs_f64())
}
