//! All processes, and what happens to them: started, spoke, exited, finished, forgotten.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use serde::Deserialize;

use super::output::Filled;
use super::{Exit, Input, Output, Process, Spawned, State, StreamKey, now};
use crate::error::{Code, OpError, OpResult};
use crate::poller::{Interest, Poller, Token};
use crate::timers::{Timer, Timers};
use sandgate_frame::{CHANNEL_PTY, CHANNEL_STDERR, CHANNEL_STDOUT};

/// Ended processes remembered, unless acknowledged earlier.
const FINISHED_MAX: usize = 1000;
/// Output of ended processes kept in all; the oldest go first, their offsets stay.
const FINISHED_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Starting and running ones. Beyond it something is out of control.
const ALIVE_MAX: usize = 4096;
/// Between `SIGTERM` and `SIGKILL` of a timeout.
const KILL_DELAY: Duration = Duration::from_secs(2);
/// How long output may outlast its process before the exit is reported without it.
const PIPE_GRACE: Duration = Duration::from_millis(200);
/// How long a process with a full buffer waits for a reader.
const READER_WAIT: Duration = Duration::from_secs(60);
/// What a pipe may have held when its process exited.
const PIPE_BYTES_MAX: u64 = 1024 * 1024 + 64 * 1024;
const SCRATCH_BYTES: usize = 256 * 1024;

/// A process named by its caller's id or by its pid.
#[derive(Clone, Debug, Deserialize)]
pub struct Wanted {
    pub id: Option<String>,
    pub pid: Option<i32>,
}

pub struct Processes {
    by_serial: HashMap<u64, Process>,
    by_id: HashMap<String, u64>,
    by_pid: HashMap<Pid, u64>,
    finished: VecDeque<u64>,
    /// Pipes whose process is over but which somebody still writes to: read and dropped, so that nobody is killed for it.
    drains: HashMap<(u64, u8), OwnedFd>,
    /// Children that exited before their start was reported back by its thread.
    early: HashMap<Pid, WaitStatus>,
    starting: usize,
    /// Outputs to read from before the loop sleeps.
    hot: Vec<(u64, u8)>,
    /// Streams that may have something to send.
    wakeups: Vec<StreamKey>,
    scratch: Vec<u8>,
    next_serial: u64,
}

impl Processes {
    pub fn new() -> Self {
        Self {
            by_serial: HashMap::new(),
            by_id: HashMap::new(),
            by_pid: HashMap::new(),
            finished: VecDeque::new(),
            drains: HashMap::new(),
            early: HashMap::new(),
            starting: 0,
            hot: Vec::new(),
            wakeups: Vec::new(),
            scratch: vec![0; SCRATCH_BYTES],
            next_serial: 1,
        }
    }

    pub fn get(&mut self, serial: u64) -> Option<&mut Process> {
        self.by_serial.get_mut(&serial)
    }

    pub fn serial_of(&self, id: &str) -> Option<u64> {
        self.by_id.get(id).copied()
    }

    pub fn find(&mut self, wanted: &Wanted) -> OpResult<&mut Process> {
        let serial = match (&wanted.id, wanted.pid) {
            (Some(id), _) => self.by_id.get(id),
            (None, Some(pid)) => self.by_pid.get(&Pid::from_raw(pid)),
            (None, None) => return Err(OpError::bad_request("neither id nor pid is given")),
        };
        let process = serial.and_then(|serial| self.by_serial.get_mut(serial));
        process.ok_or_else(|| OpError::new(Code::NoSuchProcess, "no such process"))
    }

    /// Every known process, oldest first.
    pub fn all(&self) -> Vec<&Process> {
        let mut all: Vec<&Process> = self.by_serial.values().collect();
        all.sort_unstable_by_key(|process| process.serial);
        all
    }

    pub fn has_hot(&self) -> bool {
        !self.hot.is_empty()
    }

    pub fn take_wakeups(&mut self) -> Vec<StreamKey> {
        std::mem::take(&mut self.wakeups)
    }

    /// A new process is on its way. `build` gets its serial number.
    pub fn begin(&mut self, build: impl FnOnce(u64) -> Process) -> OpResult<u64> {
        if self.by_serial.len() - self.finished.len() >= ALIVE_MAX {
            return Err(OpError::new(Code::TooMany, format!("{ALIVE_MAX} processes are running")));
        }
        let serial = self.next_serial;
        self.next_serial += 1;
        self.starting += 1;
        let process = build(serial);
        self.by_id.insert(process.id.clone(), serial);
        self.by_serial.insert(serial, process);
        Ok(serial)
    }

    /// Its thread has started it.
    pub fn started(&mut self, serial: u64, spawned: Spawned, poller: &Poller, timers: &mut Timers) {
        self.starting -= 1;
        let Some(process) = self.by_serial.get_mut(&serial) else { return };
        process.state = State::Running;
        process.pid = Some(spawned.pid);
        process.user = spawned.user;
        process.cwd = spawned.cwd;
        let is_pty = spawned.pty.is_some();
        let ends = [(CHANNEL_STDOUT, spawned.stdout), (CHANNEL_STDERR, spawned.stderr), (CHANNEL_PTY, spawned.pty)];
        for (channel, fd) in ends {
            let Some(fd) = fd else { continue };
            poller.watch(&fd, Interest::Reading, Token::Output { serial, channel });
            process.outputs.push(Output::new(channel, fd, process.log_bytes_max, process.background));
        }
        if let Some(fd) = &spawned.stdin {
            poller.watch(fd, Interest::Writing, Token::Input { serial });
        }
        process.input.open(spawned.stdin, is_pty);
        if let Some(limit) = process.timeout_s {
            timers.after(Duration::try_from_secs_f64(limit).unwrap_or(Duration::MAX), Timer::Timeout(serial));
        }
        self.by_pid.insert(spawned.pid, serial);
        self.wakeups.extend(process.readers.iter().map(|reader| reader.key));
        if let Some(status) = self.early.remove(&spawned.pid) {
            self.exited(serial, status, timers);
        } else if let Some(which) = process.early_signal.take() {
            signal(process, which, true);
        }
        if self.starting == 0 {
            self.early.clear();
        }
    }

    /// It could not be started: forget it, and say who asked.
    pub fn failed(&mut self, serial: u64) -> Vec<StreamKey> {
        self.starting -= 1;
        if self.starting == 0 {
            self.early.clear();
        }
        let Some(process) = self.by_serial.remove(&serial) else { return Vec::new() };
        self.by_id.remove(&process.id);
        process.readers.iter().map(|reader| reader.key).collect()
    }

    /// The kernel has something on this output.
    pub fn readable(&mut self, serial: u64, channel: u8, hung_up: bool) {
        if let Some(output) = self.by_serial.get_mut(&serial).and_then(|process| process.output(channel)) {
            output.readable = true;
            output.hung_up |= hung_up;
        }
        self.hot.push((serial, channel));
    }

    /// Read from every output that has something. What remains stays for the next turn.
    pub fn fill(&mut self, timers: &mut Timers) {
        for (serial, channel) in std::mem::take(&mut self.hot) {
            self.fill_one(serial, channel, timers);
            self.drain(serial, channel);
        }
    }

    fn fill_one(&mut self, serial: u64, channel: u8, timers: &mut Timers) {
        let Some(process) = self.by_serial.get_mut(&serial) else { return };
        let confirmed = process.confirmed(channel);
        let Some(output) = process.output(channel).filter(|output| !output.is_over()) else { return };
        let (filled, bytes) = output.fill(confirmed, &mut self.scratch);
        match filled {
            Filled::More => self.hot.push((serial, channel)),
            Filled::Blocked if confirmed.is_none() && !output.waiting => {
                output.waiting = true;
                timers.after(READER_WAIT, Timer::ReaderWait(serial));
            }
            Filled::Blocked | Filled::Drained | Filled::Ended => {}
        }
        if bytes > 0 || filled == Filled::Ended {
            self.wakeups.extend(process.readers.iter().map(|reader| reader.key));
        }
        if filled == Filled::Ended {
            self.finish_if_over(serial);
        }
    }

    fn drain(&mut self, serial: u64, channel: u8) {
        let Some(fd) = self.drains.get(&(serial, channel)) else { return };
        match nix::unistd::read(fd, &mut self.scratch) {
            Ok(0) => drop(self.drains.remove(&(serial, channel))),
            Ok(_) | Err(Errno::EINTR) => self.hot.push((serial, channel)),
            Err(Errno::EAGAIN) => {}
            Err(_) => drop(self.drains.remove(&(serial, channel))),
        }
    }

    /// A reader took bytes in, so a blocked output may go on.
    pub fn confirmed(&mut self, serial: u64, channel: u8) {
        let output = self.by_serial.get_mut(&serial).and_then(|process| process.output(channel));
        if output.is_some_and(|output| output.readable) {
            self.hot.push((serial, channel));
        }
    }

    /// Reading may go on where it was blocked for want of readers.
    pub fn reader_came(&mut self, serial: u64) {
        for channel in [CHANNEL_STDOUT, CHANNEL_STDERR, CHANNEL_PTY] {
            self.confirmed(serial, channel);
        }
    }

    /// The process can take more input.
    pub fn writable(&mut self, serial: u64) {
        let Some(process) = self.by_serial.get_mut(&serial) else { return };
        process.input.flush();
        self.wakeups.extend(process.readers.iter().map(|reader| reader.key));
    }

    /// Collect every child that has ended, ours and the orphans that fell to us.
    pub fn reap(&mut self, timers: &mut Timers) {
        while let Some(status) = self.next_ended() {
            let Some(pid) = status.pid() else { return };
            if let Some(serial) = self.alive(pid).map(|process| process.serial) {
                self.exited(serial, status, timers);
            } else if self.starting > 0 {
                self.early.insert(pid, status);
            }
        }
    }

    /// The running process with this number; an ended one may have had it before.
    fn alive(&self, pid: Pid) -> Option<&Process> {
        self.by_serial.get(self.by_pid.get(&pid)?).filter(|process| process.is_alive())
    }

    fn next_ended(&mut self) -> Option<WaitStatus> {
        loop {
            // Looked at before it is reaped: while the leader is a zombie its group's number cannot be given away.
            let peek = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
            match waitid(Id::All, peek) {
                Ok(WaitStatus::StillAlive) => return None,
                Ok(status) => {
                    let pid = status.pid()?;
                    if self.alive(pid).is_some_and(|process| process.timed_out) {
                        // Its children were told to go by the same SIGTERM; those that ignored it go now.
                        let _ = killpg(pid, Signal::SIGKILL);
                    }
                    match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
                        Ok(WaitStatus::StillAlive) | Err(_) => return None,
                        Ok(status) => return Some(status),
                    }
                }
                Err(Errno::EINTR) => {}
                Err(_) => return None,
            }
        }
    }

    fn exited(&mut self, serial: u64, status: WaitStatus, timers: &mut Timers) {
        let Some(process) = self.by_serial.get_mut(&serial) else { return };
        let duration_ms = process.started.elapsed().as_millis() as u64;
        let Some(exit) = Exit::of_status(status, process.timed_out, duration_ms) else { return };
        process.exit = Some(exit);
        process.exited_at = Some(now());
        process.state = State::Exited;
        process.input.close();
        for output in process.outputs.iter_mut().filter(|output| !output.is_over()) {
            output.last_offset = output.ring.end() + PIPE_BYTES_MAX;
        }
        if process.outputs.iter().any(|output| !output.is_over()) {
            timers.after(PIPE_GRACE, Timer::PipeGrace(serial));
        }
        self.finish_if_over(serial);
    }

    /// The grace after the exit is over: somebody else holds the pipes. Take what is in them and leave it at that.
    pub fn pipe_grace_over(&mut self, serial: u64, timers: &mut Timers) {
        for channel in [CHANNEL_STDOUT, CHANNEL_STDERR, CHANNEL_PTY] {
            self.fill_one(serial, channel, timers);
            let Some(process) = self.by_serial.get_mut(&serial) else { return };
            let Some(output) = process.output(channel).filter(|output| !output.is_over()) else { continue };
            if output.readable && output.ring.end() < output.last_offset {
                // Full, and its reader is slow: what the process itself wrote must not be lost.
                timers.after(PIPE_GRACE, Timer::PipeGrace(serial));
                continue;
            }
            let fd = output.end();
            // A terminal is hung up, as closing a window does; a pipe's writers are left alone.
            if let (Some(fd), false) = (fd, channel == CHANNEL_PTY) {
                self.drains.insert((serial, channel), fd);
                self.hot.push((serial, channel));
            }
        }
        self.finish_if_over(serial);
    }

    fn finish_if_over(&mut self, serial: u64) {
        let Some(process) = self.by_serial.get_mut(&serial) else { return };
        if process.state != State::Exited || process.outputs.iter().any(|output| !output.is_over()) {
            return;
        }
        process.state = State::Finished;
        self.wakeups.extend(process.readers.iter().map(|reader| reader.key));
        self.finished.push_back(serial);
        self.trim();
    }

    fn trim(&mut self) {
        while self.finished.len() > FINISHED_MAX {
            if let Some(oldest) = self.finished.front().copied() {
                self.forget(oldest);
            }
        }
        let mut retained: usize = 0;
        for serial in self.finished.iter().rev() {
            let Some(process) = self.by_serial.get_mut(serial) else { continue };
            retained += process.retained();
            if retained > FINISHED_BYTES_MAX && process.readers.is_empty() {
                for output in &mut process.outputs {
                    output.ring.discard_to(output.ring.end());
                    output.ring.seal();
                }
            }
        }
    }

    /// The client has the exit status: a foreground process has served its purpose.
    pub fn acknowledged(&mut self, serial: u64) {
        let done = self.by_serial.get(&serial).is_some_and(|p| p.state == State::Finished && !p.background);
        if done {
            self.forget(serial);
        }
    }

    /// Nobody will ask for it any more.
    pub fn dismiss(&mut self, serial: u64) {
        if self.get(serial).is_some_and(|process| process.state == State::Finished) {
            self.forget(serial);
        }
    }

    fn forget(&mut self, serial: u64) {
        self.finished.retain(|other| *other != serial);
        let Some(process) = self.by_serial.remove(&serial) else { return };
        self.wakeups.extend(process.readers.iter().map(|reader| reader.key));
        if self.by_id.get(&process.id) == Some(&serial) {
            self.by_id.remove(&process.id);
        }
        if let Some(pid) = process.pid.filter(|pid| self.by_pid.get(pid) == Some(&serial)) {
            self.by_pid.remove(&pid);
        }
    }

    /// The stream is gone; the process goes on.
    pub fn detach(&mut self, serial: u64, key: StreamKey, timers: &mut Timers) {
        let Some(process) = self.by_serial.get_mut(&serial) else { return };
        process.readers.retain(|reader| reader.key != key);
        // Another reader may have waited for this one's confirmations, or none is left to wait for.
        let channels: HashSet<u8> = process.outputs.iter().filter(|o| o.readable).map(|o| o.channel).collect();
        for channel in channels {
            self.fill_one(serial, channel, timers);
        }
    }

    /// Nobody came within the minute: let it overwrite its oldest output rather than stand still.
    pub fn reader_wait_over(&mut self, serial: u64) {
        let Some(process) = self.by_serial.get_mut(&serial) else { return };
        let nobody_reads = !process.readers.iter().any(|reader| reader.follow);
        for output in process.outputs.iter_mut().filter(|output| output.waiting) {
            output.waiting = false;
            output.lossy |= nobody_reads;
            self.hot.push((serial, output.channel));
        }
    }

    /// The time limit is up.
    pub fn timeout(&mut self, serial: u64, timers: &mut Timers) {
        let Some(process) = self.by_serial.get_mut(&serial).filter(|process| process.is_alive()) else { return };
        process.timed_out = true;
        timers.after(KILL_DELAY, Timer::Kill(serial));
        signal(process, Signal::SIGTERM, true);
        // A stopped process would only learn of it once continued.
        signal(process, Signal::SIGCONT, true);
    }

    pub fn kill(&mut self, serial: u64) {
        if let Some(process) = self.by_serial.get(&serial).filter(|process| process.is_alive()) {
            signal(process, Signal::SIGKILL, true);
        }
    }

    /// End every process we started; for an agent that is not PID 1 and is about to leave.
    pub fn kill_all(&self) {
        for process in self.by_serial.values().filter(|process| process.is_alive()) {
            signal(process, Signal::SIGKILL, true);
        }
    }
}

/// Send `which` to the process or its whole group. It is alive or a zombie of ours, so the number is still its own.
pub fn signal(process: &Process, which: Signal, group: bool) {
    let Some(pid) = process.pid else { return };
    // ESRCH means that it is just exiting, which the reaper will tell.
    let _ = if group { killpg(pid, which) } else { kill(pid, which) };
}

/// A process that has been asked for and not yet started.
pub struct Draft {
    pub id: String,
    pub name: Option<String>,
    pub command: super::Command,
    pub background: bool,
    pub timeout_s: Option<f64>,
    pub log_bytes_max: usize,
}

impl Draft {
    pub fn into_process(self, serial: u64) -> Process {
        Process {
            serial,
            id: self.id,
            name: self.name,
            command: self.command,
            cwd: String::new(),
            user: String::new(),
            background: self.background,
            timeout_s: self.timeout_s,
            log_bytes_max: self.log_bytes_max,
            state: State::Starting,
            pid: None,
            started_at: now(),
            started: Instant::now(),
            exited_at: None,
            exit: None,
            timed_out: false,
            early_signal: None,
            input: Input::default(),
            outputs: Vec::new(),
            readers: Vec::new(),
        }
    }
}
