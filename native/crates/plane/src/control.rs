//! The control socket: the API's pushes in, acknowledgements, pokes and activity out.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use crate::journal::Journal;
use crate::message::{self, Body, Message};
use crate::metrics::Metrics;
use crate::table::{Seen, TOMBSTONE_S, Table};
use crate::worker::wall_clock_s;

/// Longest line, either way.
const LINE_BYTES_MAX: usize = 1024 * 1024;
/// Lines waiting for a connection that does not read; one more closes it.
const OUTBOX_LINES_MAX: usize = 4096;
/// Ids in one activity message: 37 bytes each stay far below a line's limit.
const ACTIVITY_IDS_MAX: usize = 10_000;

/// The control socket's state; lives on the control thread.
pub struct Control {
    table: Arc<Table>,
    metrics: Arc<Metrics>,
    journal: RefCell<Journal>,
    epoch: String,
    outboxes: RefCell<Vec<Outbox>>,
    next_connection: Cell<u64>,
}

struct Outbox {
    connection: u64,
    lines: mpsc::Sender<String>,
}

fn now_s() -> u64 {
    wall_clock_s() as u64
}

impl Control {
    /// State for a table that `journal` has been read into.
    pub fn new(table: Arc<Table>, metrics: Arc<Metrics>, journal: Journal, epoch: String) -> Rc<Self> {
        Rc::new(Self {
            table,
            metrics,
            journal: RefCell::new(journal),
            epoch,
            outboxes: RefCell::default(),
            next_connection: Cell::new(0),
        })
    }

    /// Serves connections for ever.
    pub async fn serve(self: Rc<Self>, listener: UnixListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let control = Rc::clone(&self);
                    tokio::task::spawn_local(async move { control.connection(stream).await });
                }
                Err(error) => {
                    crate::log::warning("control accept failed", &error);
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    /// Once a second: reports activity, forgets old tombstones, keeps the journal short.
    pub async fn housekeeping(self: Rc<Self>) {
        let mut interval = tokio::time::interval(Duration::from_secs(1));
        let mut forgotten_at = now_s();
        loop {
            interval.tick().await;
            self.report_activity();
            let is_due = now_s().saturating_sub(forgotten_at) >= 60;
            if is_due {
                forgotten_at = now_s();
                self.table.forget(forgotten_at.saturating_sub(TOMBSTONE_S));
            }
            self.compact(is_due);
        }
    }

    fn compact(&self, is_due: bool) {
        if let Err(error) = self.journal.borrow_mut().compact(&self.table, is_due) {
            crate::log::warning("cannot rewrite the routes file", &error);
        }
    }

    fn report_activity(&self) {
        // Without a listener the marks stay where they are.
        if self.outboxes.borrow().is_empty() {
            return;
        }
        let ids = self.table.take_active();
        for batch in ids.chunks(ACTIVITY_IDS_MAX) {
            let line = json!({"t": "activity", "ids": batch}).to_string();
            let outboxes = self.outboxes.borrow();
            if !outboxes.iter().any(|outbox| outbox.lines.try_send(line.clone()).is_ok()) {
                crate::log::warning("activity lost", &"no control connection takes it");
            }
        }
    }

    async fn connection(&self, stream: UnixStream) {
        let connection = self.next_connection.get();
        self.next_connection.set(connection + 1);
        let (lines, mut outgoing) = mpsc::channel::<String>(OUTBOX_LINES_MAX);
        let hello = json!({"t": "hello", "version": 1, "epoch": self.epoch, "sandboxes": self.table.sandboxes()});
        let (reader, mut writer) = stream.into_split();
        self.outboxes.borrow_mut().push(Outbox { connection, lines: lines.clone() });
        let write = async {
            let mut line = hello.to_string();
            loop {
                line.push('\n');
                writer.write_all(line.as_bytes()).await?;
                match outgoing.recv().await {
                    Some(next) => line = next,
                    None => return io::Result::Ok(()),
                }
            }
        };
        tokio::select! {
            outcome = write => { if let Err(error) = outcome { crate::log::info("control connection lost", &error); } }
            outcome = self.read(connection, reader, lines) => {
                if let Err(error) = outcome { crate::log::warning("control connection closed", &error); }
            }
        }
        self.outboxes.borrow_mut().retain(|outbox| outbox.connection != connection);
    }

    async fn read(
        &self,
        connection: u64,
        reader: tokio::net::unix::OwnedReadHalf,
        lines: mpsc::Sender<String>,
    ) -> io::Result<()> {
        let mut reader = BufReader::with_capacity(64 * 1024, reader);
        let mut sync = None;
        let mut line = Vec::new();
        while read_line(&mut reader, &mut line).await? {
            let Some(answer) = self.obey(connection, &line, &mut sync)? else { continue };
            lines.send(answer).await.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        }
        Ok(())
    }

    /// Obeys one line; returns the answer, if one is due.
    fn obey(&self, connection: u64, line: &[u8], sync: &mut Option<Seen>) -> io::Result<Option<String>> {
        let text = std::str::from_utf8(line).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        let Message { n, body } = match serde_json::from_str(text) {
            Ok(message) => message,
            Err(error) => {
                let n = serde_json::from_str::<Value>(text).ok().and_then(|value| value.get("n").cloned());
                return Ok(Some(refusal(n.as_ref(), &error.to_string())));
            }
        };
        match body {
            Body::Poke { topic, seq } => {
                self.poke(connection, &json!({"t": "poke", "topic": topic, "seq": seq}).to_string());
            }
            Body::Stats => {
                let stats = json!({"t": "stats", "n": n, "connections": self.metrics.connections(),
                    "requests": self.metrics.requests(), "sandboxes": self.table.sandboxes()});
                return Ok(Some(stats.to_string()));
            }
            body => {
                let is_sync_end = matches!(body, Body::SyncEnd { .. });
                let is_sync_begin = matches!(body, Body::SyncBegin);
                if let Err(reason) = message::apply(body, text, &self.table, sync, now_s()) {
                    return Ok(Some(refusal(n.as_ref(), &reason)));
                }
                if is_sync_end {
                    self.compact(true);
                } else if !is_sync_begin {
                    self.remember(text);
                }
            }
        }
        Ok(n.map(|n| json!({"t": "ack", "n": n}).to_string()))
    }

    fn remember(&self, line: &str) {
        if let Err(error) = self.journal.borrow_mut().append(line) {
            crate::log::warning("cannot write the routes file", &error);
        }
    }

    fn poke(&self, from: u64, line: &str) {
        for outbox in self.outboxes.borrow().iter().filter(|outbox| outbox.connection != from) {
            // A full outbox: that API worker polls its log anyway when it comes round.
            let _ = outbox.lines.try_send(line.to_owned());
        }
    }
}

fn refusal(n: Option<&Value>, reason: &str) -> String {
    json!({"t": "error", "n": n, "code": "bad_request", "message": reason}).to_string()
}

/// Reads one line without its end into `line`; false at the end of input.
async fn read_line<R: AsyncBufRead + Unpin>(reader: &mut R, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    loop {
        let available = reader.fill_buf().await?;
        if available.is_empty() {
            return if line.is_empty() { Ok(false) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
        let end = memchr::memchr(b'\n', available);
        let count = end.unwrap_or(available.len());
        if line.len() + count > LINE_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a line is longer than 1 MiB"));
        }
        line.extend_from_slice(&available[..count]);
        reader.consume(count + usize::from(end.is_some()));
        if end.is_some() {
            return Ok(true);
        }
    }
}

/// Opens the socket for us alone. A file left by a process that is gone is replaced; a live one is an error.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, format!("{} is in use by another plane", path.display())));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // The mask is the process's; no other thread makes files yet.
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(mask);
    listener
}
