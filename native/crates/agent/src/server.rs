//! The event loop: it waits for the kernel, hands each report to its owner, and lets every connection write once.

use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;

use crate::conn::Conn;
use crate::core::{Core, Done, Outcome};
use crate::poller::{Event, Interest, Token};
use crate::process::{StreamKey, warm_up};
use crate::timers::Timer;

const CONNS_MAX: usize = 256;
/// Connections that have not shown the token yet; the oldest makes room, so that nobody inside can lock the host out.
const STRANGERS_MAX: usize = 32;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub struct Server {
    core: Core,
    listener: TcpListener,
    signals: SignalFd,
    conns: HashMap<u64, Conn>,
    /// Connections to settle at the end of this turn.
    touched: HashSet<u64>,
    /// Connections with more to read than one turn allows.
    unread: HashSet<u64>,
    is_init: bool,
}

impl Server {
    pub fn new(core: Core, listener: TcpListener, signals: SignalFd) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        core.poller.watch(&listener, Interest::Reading, Token::Listener);
        core.poller.watch(&signals, Interest::Reading, Token::Signals);
        core.poller.watch(core.pool.wake_fd(), Interest::Reading, Token::Pool);
        Ok(Self {
            core,
            listener,
            signals,
            conns: HashMap::new(),
            touched: HashSet::new(),
            unread: HashSet::new(),
            is_init: std::process::id() == 1,
        })
    }

    /// Prepare what the first command would otherwise wait for, while the host is still connecting.
    pub fn warm_up(&self) {
        let (host, identity) = (Arc::clone(&self.core.host), Arc::clone(&self.core.identity));
        let key = StreamKey { conn: 0, stream: 0 };
        self.core.call(key, move || {
            warm_up(&host, &identity);
            Ok(Vec::new())
        });
    }

    /// Serve until told to stop, which PID 1 never is.
    pub fn run(mut self) -> nix::Result<()> {
        loop {
            let busy = self.core.processes.has_hot() || !self.unread.is_empty();
            let timeout = if busy { Some(Duration::ZERO) } else { self.core.timers.wait() };
            for event in self.core.poller.wait(timeout)? {
                if self.on_event(event) == Stop::Yes {
                    self.core.processes.kill_all();
                    return Ok(());
                }
            }
            let now = Instant::now();
            while let Some(timer) = self.core.timers.pop_due(now) {
                self.on_timer(timer);
            }
            for id in std::mem::take(&mut self.unread) {
                self.receive(id);
            }
            self.core.processes.fill(&mut self.core.timers);
            self.settle();
        }
    }

    fn on_event(&mut self, event: Event) -> Stop {
        match event.token {
            Token::Listener => self.accept(),
            Token::Signals => return self.on_signals(),
            Token::Pool => self.on_done(),
            Token::Input { serial } => self.core.processes.writable(serial),
            Token::Output { serial, channel } => self.core.processes.readable(serial, channel, event.hung_up),
            Token::Conn { id } => self.on_conn(id, event),
            Token::Watch { serial } => {
                let Some(key) = self.core.watches.get(&serial).copied() else { return Stop::No };
                if let Some(conn) = self.conns.get_mut(&key.conn) {
                    conn.on_watch(key.stream);
                    self.touched.insert(key.conn);
                }
            }
        }
        Stop::No
    }

    fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok((socket, _)) => {
                    self.make_room();
                    let id = self.core.next_id();
                    match Conn::new(id, socket, &mut self.core) {
                        Ok(conn) => drop(self.conns.insert(id, conn)),
                        Err(error) => eprintln!("agent: a connection could not be set up: {error}"),
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(error) => {
                    eprintln!("agent: cannot accept: {error}");
                    self.core.timers.after(ACCEPT_PAUSE, Timer::Accept);
                    return;
                }
            }
        }
    }

    fn make_room(&mut self) {
        let strangers = self.conns.values().filter(|conn| !conn.is_trusted()).map(|conn| conn.id);
        let (count, oldest) = (strangers.clone().count(), strangers.min());
        if count >= STRANGERS_MAX {
            self.close(oldest.unwrap_or_default());
        }
        if self.conns.len() >= CONNS_MAX {
            // Trusted ones are the host's own: the oldest is the one it has most likely given up.
            self.close(self.conns.keys().min().copied().unwrap_or_default());
        }
    }

    fn on_signals(&mut self) -> Stop {
        let mut stop = Stop::No;
        while let Ok(Some(info)) = self.signals.read_signal() {
            // PID 1 forwards nothing and stays; an ordinary process does as it is told.
            if info.ssi_signo != Signal::SIGCHLD as u32 && !self.is_init {
                stop = Stop::Yes;
            }
        }
        self.core.processes.reap(&mut self.core.timers);
        stop
    }

    fn on_done(&mut self) {
        for Done { key, outcome } in self.core.pool.take_done() {
            match outcome {
                Outcome::Spawned { serial, result: Ok(spawned) } => {
                    self.core.processes.started(serial, spawned, &self.core.poller, &mut self.core.timers);
                }
                Outcome::Spawned { serial, result: Err(error) } => {
                    for reader in self.core.processes.failed(serial) {
                        if let Some(conn) = self.conns.get_mut(&reader.conn) {
                            conn.on_start_failed(reader.stream, &error, &mut self.core);
                            self.touched.insert(reader.conn);
                        }
                    }
                }
                other => {
                    if let Some(conn) = self.conns.get_mut(&key.conn) {
                        conn.on_outcome(key.stream, other, &mut self.core);
                        self.touched.insert(key.conn);
                    }
                }
            }
        }
    }

    fn on_conn(&mut self, id: u64, event: Event) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if event.writable && conn.on_writable().is_err() {
            return self.close(id);
        }
        self.touched.insert(id);
        if event.readable {
            conn.on_readable(event.hung_up);
        }
        self.receive(id);
    }

    fn receive(&mut self, id: u64) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        match conn.receive(&mut self.core) {
            Ok(true) => drop(self.unread.insert(id)),
            Ok(false) => {}
            Err(_) => return self.close(id),
        }
        self.touched.insert(id);
    }

    fn on_timer(&mut self, timer: Timer) {
        let Core { processes, timers, .. } = &mut self.core;
        match timer {
            Timer::Timeout(serial) => processes.timeout(serial, timers),
            Timer::Kill(serial) => processes.kill(serial),
            Timer::PipeGrace(serial) => processes.pipe_grace_over(serial, timers),
            Timer::ReaderWait(serial) => processes.reader_wait_over(serial),
            Timer::Accept => self.accept(),
            Timer::Auth(id) => {
                if self.conns.get(&id).is_some_and(|conn| !conn.is_trusted()) {
                    self.close(id);
                }
            }
            Timer::Flush(id) => {
                if self.conns.get_mut(&id).is_some_and(|conn| conn.on_flush_due().is_err()) {
                    self.close(id);
                }
            }
        }
    }

    /// Give the streams that were woken their turn. One turn may wake others, of this connection or another.
    fn settle(&mut self) {
        loop {
            for key in self.core.processes.take_wakeups() {
                if let Some(conn) = self.conns.get_mut(&key.conn) {
                    conn.wake(key.stream);
                    self.touched.insert(key.conn);
                }
            }
            if self.touched.is_empty() {
                return;
            }
            for id in std::mem::take(&mut self.touched) {
                let Some(conn) = self.conns.get_mut(&id) else { continue };
                if conn.settle(&mut self.core).is_err() {
                    self.close(id);
                } else if conn.can_receive() {
                    // A socket that took everything at once does not report that it takes more.
                    self.unread.insert(id);
                }
            }
        }
    }

    fn close(&mut self, id: u64) {
        self.unread.remove(&id);
        if let Some(conn) = self.conns.remove(&id) {
            conn.close(&mut self.core);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    Yes,
    No,
}
