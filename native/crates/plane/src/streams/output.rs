//! The output of a process as an event stream: hostd's frames in, server-sent events out.
//!
//! ```text
//! order ──OPEN──▶ reply ──▶ running ──exit──▶ over
//!    └─ refused: the API's words for it   ├─ link breaks ─▶ ATTACH where it was ─▶ running
//!                                         └─ client leaves ─▶ killed, or left alone
//! ```
//!
//! The process is started once, however often the operation had to be sent: the agent knows it by its id. A slow client
//! holds up its own process, by credit, and nobody else.

use std::collections::HashMap;
use std::path::Path;
use std::pin::Pin;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use sandgate_frame::{CHANNEL_PTY, CHANNEL_STDERR, CHANNEL_STDOUT, Kind};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::io::AsyncWrite;
use tokio::time::timeout;

use super::lines::{Lines, fill};
use super::machine::{Link, Trouble};
use crate::pump::{Flow, PumpError};

/// Output without a line end is passed on after this pause, so that a progress bar moves.
const PARTIAL_PAUSE: Duration = Duration::from_millis(50);
/// How long a break may last, and one between hostd and the agent.
const RECOVERY: Duration = Duration::from_secs(30);
const UNREACHABLE_PATIENCE: Duration = Duration::from_secs(2);
const DELAY_MIN: Duration = Duration::from_millis(20);
const DELAY_MAX: Duration = Duration::from_millis(500);
/// Bytes of frames made before they are sent, and taken from hostd while the client takes nothing: more than the
/// credit of two channels never comes.
const OUT_BYTES: usize = 256 * 1024;
const BUFFERED_MAX: usize = 3 * 1024 * 1024;
/// The signals of Linux by number.
const SIGNALS: [&str; 32] = [
    "",
    "SIGHUP",
    "SIGINT",
    "SIGQUIT",
    "SIGILL",
    "SIGTRAP",
    "SIGABRT",
    "SIGBUS",
    "SIGFPE",
    "SIGKILL",
    "SIGUSR1",
    "SIGSEGV",
    "SIGUSR2",
    "SIGPIPE",
    "SIGALRM",
    "SIGTERM",
    "SIGSTKFLT",
    "SIGCHLD",
    "SIGCONT",
    "SIGSTOP",
    "SIGTSTP",
    "SIGTTIN",
    "SIGTTOU",
    "SIGURG",
    "SIGXCPU",
    "SIGXFSZ",
    "SIGVTALRM",
    "SIGPROF",
    "SIGWINCH",
    "SIGIO",
    "SIGPWR",
    "SIGSYS",
];

/// What the API wants of a process, and in which words.
#[derive(Debug, Deserialize)]
pub struct Wanted {
    /// The operation that starts the process or attaches to it.
    op: Map<String, Value>,
    /// Whether a client that leaves takes the process along.
    kills: bool,
    /// Before the first frame.
    opening: String,
    /// In pauses.
    heartbeat: String,
    /// What stands around a line of each channel.
    stdout: (Box<str>, Box<str>),
    stderr: (Box<str>, Box<str>),
    /// The last frame of a process that ended, and of a stream that failed.
    exit: String,
    error: String,
    /// The body of an answer that could not begin.
    refusal: String,
    /// The API's words for the codes of hostd and the agent; `internal` for all others.
    errors: HashMap<String, Spelling>,
}

/// How the API spells an error.
#[derive(Clone, Debug, Deserialize)]
struct Spelling {
    status: u16,
    code: String,
    /// Instead of what was said.
    message: Option<String>,
    /// Whether the cause is told.
    #[serde(default)]
    with_cause: bool,
}

/// An answer instead of a stream.
#[derive(Debug)]
pub struct Refusal {
    /// Its status.
    pub status: u16,
    /// Its content, JSON.
    pub body: Vec<u8>,
}

/// A process whose output flows.
pub struct Output {
    wanted: Wanted,
    link: Option<Link>,
    id: String,
    /// Standard output, standard error, terminal.
    channels: [Lines; 3],
    offsets: [u64; 4],
}

/// What came of taking frames.
enum Taken {
    /// All that was here.
    All,
    /// As much as may wait to be sent.
    Enough,
    /// The process has ended, or is left by the agent.
    End,
}

/// How long to go on after breaks.
struct Patience {
    until: Instant,
    unreachable_until: Option<Instant>,
    delay: Duration,
}

impl Patience {
    fn new() -> Self {
        Self { until: Instant::now() + RECOVERY, unreachable_until: None, delay: DELAY_MIN }
    }

    /// Waits before another try, or gives the trouble back when it is no break or time is up.
    async fn after(&mut self, trouble: Trouble) -> Result<(), Trouble> {
        let now = Instant::now();
        let mut until = self.until;
        if trouble.code == "agent_unreachable" {
            until = until.min(*self.unreachable_until.get_or_insert(now + UNREACHABLE_PATIENCE));
        }
        if !trouble.is_break() || now + self.delay > until {
            return Err(trouble);
        }
        tokio::time::sleep(self.delay).await;
        self.delay = (self.delay * 2).min(DELAY_MAX);
        Ok(())
    }
}

impl Wanted {
    fn spell(&self, trouble: &Trouble) -> (u16, String, String) {
        let known = self.errors.get(&trouble.code).or_else(|| self.errors.get("internal"));
        let (status, code) = known.map_or((500, "internal"), |known| (known.status, &known.code));
        let mut message = known.and_then(|known| known.message.clone()).unwrap_or_else(|| trouble.message.clone());
        if let (Some(Spelling { with_cause: true, .. }), Some(cause)) = (known, &trouble.detail) {
            message = format!("{message} ({cause})");
        }
        (status, code.to_owned(), format!("{}.", message.trim_end_matches('.')))
    }

    fn refuse(&self, trouble: &Trouble) -> Refusal {
        let (status, code, message) = self.spell(trouble);
        Refusal { status, body: fill(&self.refusal, &[("code", &code), ("message", &message)]) }
    }

    /// The operation that goes on with a process.
    fn attach(&self, id: &str, offsets: &[u64; 4]) -> Vec<u8> {
        let offsets: Map<_, _> = (1..4).map(|channel| (channel.to_string(), json!(offsets[channel]))).collect();
        let mut op = json!({"op": "attach", "id": id, "offsets": offsets});
        for name in ["to", "passive"] {
            if let Some(value) = self.op.get(name) {
                op[name] = value.clone();
            }
        }
        op.to_string().into_bytes()
    }
}

impl Output {
    /// Asks for what is wanted; the process runs when this returns.
    pub async fn start(socket: &Path, wanted: Wanted) -> Result<Self, Refusal> {
        let channels = [&wanted.stdout, &wanted.stderr, &wanted.stdout].map(|around| Lines::new(around.clone()));
        let op = Value::from(wanted.op.clone()).to_string().into_bytes();
        let mut output = Self { wanted, link: None, id: String::new(), channels, offsets: [0; 4] };
        match output.open(socket, &op).await {
            Ok(()) => Ok(output),
            Err(trouble) => Err(output.wanted.refuse(&trouble)),
        }
    }

    /// Opens links until one has a reply.
    async fn open(&mut self, socket: &Path, op: &[u8]) -> Result<(), Trouble> {
        let mut patience = Patience::new();
        loop {
            let trouble = match Link::open(socket, op).await {
                Ok(link) => {
                    // From here on, a client that leaves takes along what may have been started.
                    self.link = Some(link);
                    let left = patience.until.saturating_duration_since(Instant::now());
                    match timeout(left, self.reply()).await {
                        Ok(Ok(())) => return Ok(()),
                        Ok(Err(trouble)) => trouble,
                        Err(_) => Trouble::new("no_answer", "there was no answer in time"),
                    }
                }
                // It may be starting; at the deadline it is not there.
                Err(_) if Instant::now() + DELAY_MAX < patience.until => Trouble::lost(),
                Err(_) => return Err(Trouble::new("host_unreachable", "the host does not answer")),
            };
            if trouble.code != "no_answer" {
                self.link = None;
            }
            patience.after(trouble).await?;
        }
    }

    async fn reply(&mut self) -> Result<(), Trouble> {
        let Some(link) = &mut self.link else { return Err(Trouble::lost()) };
        loop {
            while let Some(frame) = link.next_frame()? {
                match frame.kind {
                    Kind::Reply => {
                        let reply: Value = serde_json::from_slice(frame.payload).map_err(|_| Trouble::violation())?;
                        let id = reply.get("id").and_then(Value::as_str).ok_or_else(Trouble::violation)?;
                        id.clone_into(&mut self.id);
                        return Ok(());
                    }
                    Kind::Error => return Err(Trouble::of(frame.payload)),
                    Kind::Close => return Err(Trouble::violation()),
                    _ => {}
                }
            }
            if link.is_lost() {
                return Err(Trouble::lost());
            }
            std::future::poll_fn(|cx| link.poll(cx)).await;
        }
    }

    /// Makes frames of what is here, as many as are worth sending at once.
    fn take(&mut self, out: &mut Vec<u8>) -> Result<Taken, Trouble> {
        let Some(link) = &mut self.link else { return Err(Trouble::lost()) };
        while out.len() < OUT_BYTES {
            let Some(frame) = link.next_frame()? else {
                return if link.is_lost() { Err(Trouble::lost()) } else { Ok(Taken::All) };
            };
            match frame.kind {
                Kind::Data => {
                    let (offset, data) = frame.count().ok_or_else(Trouble::violation)?;
                    let channel = frame.channel;
                    let lines = match channel {
                        CHANNEL_STDOUT | CHANNEL_STDERR | CHANNEL_PTY => &mut self.channels[usize::from(channel) - 1],
                        _ => return Err(Trouble::violation()),
                    };
                    lines.feed(data, out);
                    let count = data.len() as u64;
                    self.offsets[usize::from(channel)] = offset + count;
                    link.used(channel, count);
                }
                Kind::Event => {
                    let event: Value = serde_json::from_slice(frame.payload).map_err(|_| Trouble::violation())?;
                    if event.get("type").and_then(Value::as_str) == Some("exit") {
                        self.channels.iter_mut().for_each(|lines| lines.flush(true, out));
                        out.extend(exit(&self.wanted.exit, &event));
                        if let Some(link) = self.link.take() {
                            link.leave(&[(Kind::Ack, b"")]);
                        }
                        return Ok(Taken::End);
                    }
                }
                Kind::Close => {
                    self.channels.iter_mut().for_each(|lines| lines.flush(true, out));
                    self.link = None;
                    return Ok(Taken::End);
                }
                Kind::Error => return Err(Trouble::of(frame.payload)),
                _ => {}
            }
        }
        Ok(Taken::Enough)
    }

    /// Has a working link again after a break.
    async fn recover(&mut self, socket: &Path, trouble: Trouble) -> Result<(), Trouble> {
        self.link = None;
        if !trouble.is_break() {
            return Err(trouble);
        }
        let op = self.wanted.attach(&self.id, &self.offsets);
        self.open(socket, &op).await.map_err(|trouble| match &*trouble.code {
            "no_such_process" => Trouble::new("no_answer", "the process is not known any more, nor how it ended"),
            _ => trouble,
        })
    }

    /// Sends `head` and then the output to its end.
    pub async fn relay<W: AsyncWrite + Unpin>(
        mut self,
        socket: &Path,
        flow: &Flow<'_>,
        head: &[u8],
        writer: &mut W,
        heartbeat: Duration,
    ) -> Result<(), PumpError> {
        let mut out = Chunk::new(flow.is_unchunked);
        out.begin(head);
        out.bytes.extend_from_slice(self.wanted.opening.as_bytes());
        let (mut is_over, mut trouble) = (false, None);
        loop {
            out.end(is_over);
            if !out.bytes.is_empty() {
                self.send(flow, &out.bytes, writer).await?;
            }
            if is_over {
                return Ok(());
            }
            out.begin(b"");
            // What came before the trouble has gone out.
            if let Some(trouble) = trouble.take() {
                if let Err(trouble) = self.recover(socket, trouble).await {
                    let (_, code, message) = self.wanted.spell(&trouble);
                    out.bytes.extend(fill(&self.wanted.error, &[("code", &code), ("message", &message)]));
                    is_over = true;
                }
                continue;
            }
            match self.take(&mut out.bytes) {
                Ok(Taken::End) => is_over = true,
                Ok(Taken::All) if out.is_empty() => self.wait(&mut out.bytes, heartbeat).await,
                Ok(Taken::All | Taken::Enough) => {}
                Err(found) => trouble = Some(found),
            }
        }
    }

    /// Waits for more; in a pause, appends what is to be sent then.
    async fn wait(&mut self, out: &mut Vec<u8>, heartbeat: Duration) {
        let Some(link) = &mut self.link else { return };
        let has_partial = self.channels.iter().any(Lines::has_partial);
        let pause = if has_partial { PARTIAL_PAUSE } else { heartbeat };
        if timeout(pause, std::future::poll_fn(|cx| link.poll(cx))).await.is_ok() {
            return;
        }
        if has_partial {
            self.channels.iter_mut().for_each(|lines| lines.flush(false, out));
        } else {
            out.extend_from_slice(self.wanted.heartbeat.as_bytes());
        }
    }

    /// Sends to the client, and takes from hostd meanwhile: a connection that is not read holds up others.
    async fn send<W: AsyncWrite + Unpin>(
        &mut self,
        flow: &Flow<'_>,
        data: &[u8],
        writer: &mut W,
    ) -> Result<(), PumpError> {
        let mut data = data;
        flow.wait(flow.write);
        flow.count.add(data.len() as u64);
        let sent = std::future::poll_fn(|cx| {
            while let Some(link) = self.link.as_mut().filter(|link| !link.is_lost() && link.buffered() < BUFFERED_MAX) {
                if link.poll(cx).is_pending() {
                    break;
                }
            }
            while !data.is_empty() {
                let count = ready!(Pin::new(&mut *writer).poll_write(cx, data))?;
                if count == 0 {
                    return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()));
                }
                flow.has_sent.set(true);
                flow.wait(flow.write);
                data = &data[count..];
            }
            Pin::new(&mut *writer).poll_flush(cx)
        });
        let outcome = sent.await.map_err(|_| PumpError::Write);
        flow.deadline.clear();
        outcome
    }
}

impl Drop for Output {
    /// The client has left, or never got to hear of it.
    fn drop(&mut self) {
        if let Some(link) = self.link.take() {
            let kill: &[u8] = br#"{"type":"signal","signal":"SIGKILL"}"#;
            if self.wanted.kills {
                link.leave(&[(Kind::Control, kill), (Kind::Close, b"")]);
            } else {
                link.leave(&[(Kind::Close, b"")]);
            }
        }
    }
}

/// The frame that tells how a process ended.
fn exit(template: &str, event: &Value) -> Vec<u8> {
    let number = |name: &str| event.get(name).and_then(Value::as_i64).unwrap_or_default().to_string();
    let signal = event.get("signal").and_then(Value::as_str).filter(|name| !name.is_empty());
    let signal = signal.and_then(|name| SIGNALS.iter().position(|known| *known == name));
    let values = [
        ("exit_code", number("exit_code")),
        ("signal", signal.map_or_else(|| "null".to_owned(), |number| number.to_string())),
        ("reason", event.get("reason").and_then(Value::as_str).unwrap_or_default().to_owned()),
        ("duration_ms", number("duration_ms")),
    ];
    fill(template, &values.each_ref().map(|(name, value)| (*name, value.as_str())))
}

/// Bytes on their way to the client, as one chunk.
struct Chunk {
    bytes: Vec<u8>,
    is_unchunked: bool,
    start: usize,
}

/// Room for the size, written once it is known.
const SIZE_LINE: &[u8] = b"00000000\r\n";

impl Chunk {
    fn new(is_unchunked: bool) -> Self {
        Self { bytes: Vec::with_capacity(OUT_BYTES), is_unchunked, start: 0 }
    }

    /// Starts a chunk after `head`.
    fn begin(&mut self, head: &[u8]) {
        self.bytes.clear();
        self.bytes.extend_from_slice(head);
        if !self.is_unchunked {
            self.bytes.extend_from_slice(SIZE_LINE);
        }
        self.start = self.bytes.len();
    }

    fn is_empty(&self) -> bool {
        self.bytes.len() == self.start
    }

    /// Completes the chunk; `is_last`: and the body.
    fn end(&mut self, is_last: bool) {
        if self.is_unchunked {
            return;
        }
        let size = self.bytes.len() - self.start;
        if size == 0 {
            self.bytes.truncate(self.start - SIZE_LINE.len());
        } else {
            let line = self.start - SIZE_LINE.len();
            self.bytes[line..line + 8].copy_from_slice(format!("{size:08x}").as_bytes());
            self.bytes.extend_from_slice(b"\r\n");
        }
        if is_last {
            self.bytes.extend_from_slice(b"0\r\n\r\n");
        }
    }
}
