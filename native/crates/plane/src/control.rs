//! The control socket: the API's pushes in, acknowledgements, pokes and activity out.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::OwnedReadHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{broadcast, mpsc, watch};

use crate::handover::{self, Group};
use crate::journal::{Follower, Journal};
use crate::listen;
use crate::message::{self, Body, Message};
use crate::metrics::Metrics;
use crate::operator;
use crate::streams::event::{Batch, Record};
use crate::streams::tail::{Appointment, Tail};
use crate::table::{Seen, TOMBSTONE_S, Table};
use crate::wake;
use crate::worker::{Census, Drain, Shared, wall_clock_s};

/// Longest line, either way.
const LINE_BYTES_MAX: usize = 1024 * 1024;
/// Lines waiting for a connection that does not read; one more closes it.
const OUTBOX_LINES_MAX: usize = 4096;
/// Ids in one activity message: 37 bytes each stay far below a line's limit.
const ACTIVITY_IDS_MAX: usize = 10_000;
/// How often the routes file of a successor is looked at.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(100);
/// How often activity is reported.
const ACTIVITY_INTERVAL: Duration = Duration::from_secs(1);

/// The control socket's state; lives on the control thread.
pub struct Control {
    table: Arc<Table>,
    metrics: Arc<Metrics>,
    census: Arc<Census>,
    journal: RefCell<Journal>,
    epoch: String,
    paths: Paths,
    /// For a successor; gone once the process is to end.
    listeners: RefCell<Vec<Group>>,
    drain: watch::Sender<Drain>,
    /// Ids of sandboxes to be woken.
    knocks: UnboundedSender<Box<str>>,
    /// A successor is taking over: nothing may change any more.
    is_suspended: watch::Sender<bool>,
    is_listening: watch::Sender<bool>,
    outboxes: RefCell<Vec<Outbox>>,
    tail: RefCell<Tail>,
    batches: broadcast::Sender<Arc<Batch>>,
    next_connection: Cell<u64>,
}

/// The files of the control socket's state.
pub struct Paths {
    /// The socket.
    pub socket: PathBuf,
    /// The route table.
    pub routes: PathBuf,
}

/// What a line leads to.
enum Outcome {
    /// Nothing to say.
    Silence,
    /// An answer.
    Answer(String),
    /// A successor takes over.
    HandOver,
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
    pub fn new(
        shared: &Shared,
        metrics: Arc<Metrics>,
        journal: Journal,
        epoch: String,
        paths: Paths,
        drain: watch::Sender<Drain>,
    ) -> Rc<Self> {
        Rc::new(Self {
            table: Arc::clone(&shared.table),
            metrics,
            census: Arc::clone(&shared.census),
            journal: RefCell::new(journal),
            epoch,
            paths,
            listeners: RefCell::default(),
            drain,
            knocks: shared.knocks.clone(),
            is_suspended: watch::Sender::new(false),
            is_listening: watch::Sender::new(true),
            outboxes: RefCell::default(),
            tail: RefCell::new(Tail::new(Instant::now())),
            batches: shared.batches.clone(),
            next_connection: Cell::new(0),
        })
    }

    /// What a successor may ask for; nothing when the process is about to end.
    pub fn offer(&self, listeners: Vec<Group>) {
        self.listeners.replace(listeners);
    }

    /// Serves connections for ever.
    pub async fn serve(self: Rc<Self>, listener: UnixListener) {
        let mut listener = Some(listener);
        let mut suspension = self.is_suspended.subscribe();
        loop {
            if let Some(listener) = listener.take() {
                self.is_listening.send_replace(true);
                Rc::clone(&self).accept(listener).await;
                self.is_listening.send_replace(false);
            }
            // The sender is our own.
            let _ = suspension.wait_for(|is_suspended| !is_suspended).await;
            match listen(&self.paths.socket) {
                Ok(again) => listener = Some(again),
                Err(error) => {
                    crate::log::warning("control socket lost", &error);
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    /// Accepts connections until a successor wants to.
    async fn accept(self: Rc<Self>, listener: UnixListener) {
        let mut suspension = self.is_suspended.subscribe();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = suspension.wait_for(|is_suspended| *is_suspended) => return,
            };
            match accepted {
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
        let mut interval = tokio::time::interval(ACTIVITY_INTERVAL);
        let mut forgotten_at = now_s();
        loop {
            interval.tick().await;
            if *self.is_suspended.borrow() {
                continue;
            }
            self.report_activity();
            self.replace_publisher();
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
            let line = activity(batch);
            let outboxes = self.outboxes.borrow();
            if !outboxes.iter().any(|outbox| outbox.lines.try_send(line.clone()).is_ok()) {
                crate::log::warning("activity lost", &"no control connection takes it");
            }
        }
    }

    /// Tells the successor what the API would be told. What it does not take is told again.
    async fn relay_activity(&self) {
        let ids = self.table.take_active();
        for batch in ids.chunks(ACTIVITY_IDS_MAX) {
            if !wake::relay(&self.paths.socket, &activity(batch)).await {
                self.touch(batch.iter().map(|id| &**id));
            }
        }
    }

    fn touch<'a>(&self, ids: impl Iterator<Item = &'a str>) {
        for sandbox in ids.filter_map(|id| self.table.get(id)) {
            sandbox.touch();
        }
    }

    async fn connection(&self, stream: UnixStream) {
        let connection = self.next_connection.get();
        self.next_connection.set(connection + 1);
        let (lines, mut outgoing) = mpsc::channel::<String>(OUTBOX_LINES_MAX);
        let hello = json!({"t": "hello", "version": 1, "epoch": self.epoch, "pid": std::process::id(),
            "sandboxes": self.table.sandboxes()});
        let (reader, mut writer) = stream.into_split();
        self.outboxes.borrow_mut().push(Outbox { connection, lines: lines.clone() });
        let mut reader = BufReader::with_capacity(64 * 1024, reader);
        let mut suspension = self.is_suspended.subscribe();
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
        let is_successor = tokio::select! {
            biased;
            _ = suspension.wait_for(|is_suspended| *is_suspended) => false,
            outcome = write => {
                if let Err(error) = outcome { crate::log::info("control connection lost", &error); }
                false
            }
            outcome = self.read(connection, &mut reader, lines) => outcome.unwrap_or_else(|error| {
                crate::log::warning("control connection closed", &error);
                false
            }),
        };
        self.outboxes.borrow_mut().retain(|outbox| outbox.connection != connection);
        self.appoint(self.tail.borrow_mut().leave(connection, Instant::now()));
        if is_successor
            && !self.is_suspended.send_replace(true)
            && let Err(error) = self.hand_over(reader).await
        {
            crate::log::warning("the successor did not take over", &error);
            self.resume();
        }
    }

    /// Lets a successor have the listeners. An error means that it does not serve.
    async fn hand_over(&self, mut successor: BufReader<OwnedReadHalf>) -> io::Result<()> {
        // The successor is to find neither our socket nor a change that it would miss.
        let _ = self.is_listening.subscribe().wait_for(|is_listening| !is_listening).await;
        let listeners = self.listeners.take();
        let sent = handover::send(successor.get_ref().as_ref(), &listeners).await;
        self.listeners.replace(listeners);
        sent?;
        let mut line = Vec::new();
        while read_line(&mut successor, &mut line).await? {
            if matches!(serde_json::from_slice(&line), Ok(handover::Line::Done)) {
                self.listeners.take();
                self.drain.send_if_modified(|drain| {
                    let is_first = *drain == Drain::No;
                    if is_first {
                        *drain = Drain::HandedOver;
                    }
                    is_first
                });
                return Ok(());
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }

    /// After a successor that came to nothing: the routes file may be its own by now.
    fn resume(&self) {
        match Journal::open(&self.paths.routes, &self.table, now_s()) {
            Ok((journal, _)) => drop(self.journal.replace(journal)),
            Err(error) => crate::log::warning("cannot read the routes file", &error),
        }
        self.is_suspended.send_replace(false);
    }

    /// Follows what the successor is told, for as long as connections of ours last: a revocation counts for them too.
    /// And tells it of their traffic, or a sandbox that only they use would be taken for idle.
    pub async fn follow(self: Rc<Self>) {
        let mut follower = Follower::new(&self.paths.routes);
        let mut told = Instant::now();
        loop {
            if let Err(error) = follower.read(&self.table, now_s()) {
                crate::log::warning("cannot follow the routes file", &error);
            }
            if told.elapsed() >= ACTIVITY_INTERVAL {
                told = Instant::now();
                self.relay_activity().await;
            }
            tokio::time::sleep(FOLLOW_INTERVAL).await;
        }
    }

    /// Reads until the end, or until a successor asks to take over: then true.
    async fn read(
        &self,
        connection: u64,
        reader: &mut BufReader<OwnedReadHalf>,
        lines: mpsc::Sender<String>,
    ) -> io::Result<bool> {
        let mut sync = None;
        let mut line = Vec::new();
        while read_line(reader, &mut line).await? {
            match self.obey(connection, &line, &mut sync)? {
                Outcome::Silence => {}
                Outcome::HandOver => return Ok(true),
                Outcome::Answer(answer) => {
                    lines.send(answer).await.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
                }
            }
        }
        Ok(false)
    }

    /// Obeys one line.
    fn obey(&self, connection: u64, line: &[u8], sync: &mut Option<Seen>) -> io::Result<Outcome> {
        let text = std::str::from_utf8(line).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        let Message { n, body } = match serde_json::from_str(text) {
            Ok(message) => message,
            Err(error) => {
                let n = serde_json::from_str::<Value>(text).ok().and_then(|value| value.get("n").cloned());
                return Ok(Outcome::Answer(refusal(n.as_ref(), &error.to_string())));
            }
        };
        match body {
            Body::HandOver => return Ok(Outcome::HandOver),
            Body::Poke { topic, seq } => {
                self.poke(connection, &json!({"t": "poke", "topic": topic, "seq": seq}).to_string());
            }
            Body::Wake { id } => {
                self.is_no_api(connection);
                if let Some(sandbox) = self.table.get(&id).filter(|sandbox| sandbox.wake.is_asleep())
                    && sandbox.wake.ask()
                {
                    // Nobody receives it when the process is about to end.
                    let _ = self.knocks.send(id.into());
                }
            }
            Body::WakeFailed { id } => {
                if let Some(sandbox) = self.table.get(&id) {
                    sandbox.wake.fail();
                }
            }
            Body::Activity { ids } => {
                self.is_no_api(connection);
                self.touch(ids.iter().map(String::as_str));
            }
            Body::Routes { after } => {
                self.is_no_api(connection);
                let page = operator::routes(&self.table, after.as_deref());
                return Ok(Outcome::Answer(answer("routes", n.as_ref(), page)));
            }
            Body::Connections => {
                self.is_no_api(connection);
                let found = operator::connections(&self.table, &self.metrics, &self.census);
                return Ok(Outcome::Answer(answer("connections", n.as_ref(), found)));
            }
            Body::Volunteer => self.appoint(self.tail.borrow_mut().volunteer(connection, Instant::now())),
            Body::Publish { after, through, start, events } => {
                if !self.publish(connection, after, through, start, events) {
                    return Ok(Outcome::Answer(refusal(n.as_ref(), "the events are not in order")));
                }
            }
            Body::Stats => {
                let stats = json!({"t": "stats", "n": n, "connections": self.metrics.connections(),
                    "requests": self.metrics.requests(), "sandboxes": self.table.sandboxes()});
                return Ok(Outcome::Answer(stats.to_string()));
            }
            body => {
                let is_sync_end = matches!(body, Body::SyncEnd { .. });
                let is_sync_begin = matches!(body, Body::SyncBegin);
                if let Err(reason) = message::apply(body, text, &self.table, sync, now_s()) {
                    return Ok(Outcome::Answer(refusal(n.as_ref(), &reason)));
                }
                if is_sync_end {
                    self.compact(true);
                } else if !is_sync_begin {
                    self.remember(text);
                }
            }
        }
        Ok(n.map_or(Outcome::Silence, |n| Outcome::Answer(json!({"t": "ack", "n": n}).to_string())))
    }

    fn remember(&self, line: &str) {
        if let Err(error) = self.journal.borrow_mut().append(line) {
            crate::log::warning("cannot write the routes file", &error);
        }
    }

    /// Asks a connection to wake a sandbox, the one after `last` if there are several. None if nobody takes it.
    pub async fn ask_to_wake(&self, id: &str, last: Option<u64>) -> Option<u64> {
        if *self.drain.borrow() == Drain::HandedOver {
            return wake::relay(&self.paths.socket, &wake::line(id)).await.then_some(0);
        }
        let line = wake::line(id);
        let outboxes = self.outboxes.borrow();
        let next = outboxes.iter().position(|outbox| Some(outbox.connection) > last).unwrap_or(0);
        let (before, after) = outboxes.split_at(next);
        let mut in_turn = after.iter().chain(before);
        in_turn.find(|outbox| outbox.lines.try_send(line.clone()).is_ok()).map(|outbox| outbox.connection)
    }

    /// Leaves a connection of somebody who only asks out of what is told to the API.
    fn is_no_api(&self, connection: u64) {
        self.outboxes.borrow_mut().retain(|outbox| outbox.connection != connection);
    }

    /// Has a connection publish the event log.
    fn appoint(&self, appointment: Option<Appointment>) {
        if let Some(Appointment { connection, after }) = appointment {
            self.tell(connection, &json!({"t": "tail", "after": after}));
        }
    }

    fn replace_publisher(&self) {
        let replaced = self.tail.borrow_mut().check(Instant::now());
        if let Some((silent, next)) = replaced {
            crate::log::warning("nothing is heard of the event log", &"another API worker is asked");
            self.tell(silent, &json!({"t": "relieved"}));
            self.appoint(Some(next));
        }
    }

    fn tell(&self, connection: u64, message: &Value) {
        if let Some(outbox) = self.outboxes.borrow().iter().find(|outbox| outbox.connection == connection) {
            // A publisher that has no room for it says nothing either, and is replaced for that.
            let _ = outbox.lines.try_send(message.to_string());
        }
    }

    /// Gives a stretch of the event log to the workers, unless it is not the next one; false if it is none.
    fn publish(&self, connection: u64, after: u64, through: u64, is_start: bool, events: Vec<Record>) -> bool {
        let Some(batch) = Batch::new(after, through, events) else { return false };
        if self.tail.borrow_mut().publish(connection, &batch, is_start, Instant::now()) {
            // Without workers there is nobody to tell.
            let _ = self.batches.send(Arc::new(batch));
        }
        true
    }

    fn poke(&self, from: u64, line: &str) {
        for outbox in self.outboxes.borrow().iter().filter(|outbox| outbox.connection != from) {
            // A full outbox: that API worker polls its log anyway when it comes round.
            let _ = outbox.lines.try_send(line.to_owned());
        }
    }
}

fn activity(ids: &[Box<str>]) -> String {
    json!({"t": "activity", "ids": ids}).to_string()
}

fn answer(kind: &str, n: Option<&Value>, mut body: Value) -> String {
    body["t"] = kind.into();
    body["n"] = n.cloned().unwrap_or_default();
    body.to_string()
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
    let open = || {
        listen::clear(path)?;
        let listener = listen::bind_private(path)?;
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener)
    };
    open().map_err(|error| io::Error::new(error.kind(), format!("cannot listen at {}: {error}", path.display())))
}
