//! Subscribers to server-sent events.
//!
//! An event whose data is JSON with `"t"`, nanoseconds of the monotonic clock, tells how long it was under way.
//! `{"ready":n}` is printed once n subscribers have the head of their answer; what was measured follows.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use memchr::memmem;
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

use crate::epoll::Epoll;
use crate::failures::Failures;
use crate::head::{self, Body, Unchunk};
use crate::histogram::Histogram;
use crate::target::Target;
use crate::usage::{Usage, Watched};

const READ_BYTES: usize = 64 * 1024;
/// Room and segments of a socket that nobody reads. Little of both: the server's kernel keeps room for several segments
/// of its own, which over loopback have 64 KB, and would hide the stall for long.
const STALLED_RECEIVE_BYTES: usize = 4096;
const STALLED_SEGMENT_BYTES: u32 = 536;
/// Subscriptions under way at once: who floods a server measures its queue of connections.
const PENDING_MAX: usize = 128;
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    target: Target,
    #[arg(long, default_value_t = 2000)]
    subscribers: usize,
    /// Further subscribers that never read.
    #[arg(long, default_value_t = 0)]
    stalled: usize,
    #[arg(long, default_value_t = 1.0)]
    warm_up_s: f64,
    /// 0: keep the subscriptions until standard input ends.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    #[command(flatten)]
    watched: Watched,
}

struct Subscriber {
    socket: TcpStream,
    inbox: Vec<u8>,
    coming: Coming,
}

/// What a subscriber receives next.
enum Coming {
    Head,
    Plain,
    Chunked(Unchunk),
}

pub fn run(options: &Options) -> io::Result<()> {
    let request = options.target.request(&options.target.hosts()?[0], &["Accept: text/event-stream"]);
    let mut epoll = Epoll::new()?;
    let stalled: Vec<TcpStream> =
        (0..options.stalled).map(|_| subscribe(options, &request, true)).collect::<Result<_, _>>()?;
    let mut run = Run {
        subscribers: Vec::with_capacity(options.subscribers),
        histogram: Histogram::new(),
        failures: Failures::default(),
        events: 0,
        bytes: 0,
        ready: 0,
        failed: 0,
        content: Vec::new(),
    };
    let patience = Instant::now() + PATIENCE;
    let is_late = || Instant::now() > patience;
    for token in 0..options.subscribers {
        let socket = subscribe(options, &request, false)?;
        epoll.add(&socket, token, false)?;
        run.subscribers.push(Subscriber { socket, inbox: Vec::new(), coming: Coming::Head });
        run.turn(&mut epoll, |run| run.pending() < PENDING_MAX || is_late(), patience)?;
    }
    run.turn(&mut epoll, |run| run.pending() == 0 || is_late(), patience)?;
    println!("{}", json!({"ready": run.ready, "failures": run.failures.json()}));
    if options.seconds == 0.0 {
        io::stdin().read_to_end(&mut Vec::new())?;
    } else {
        println!("{}", measure(options, &mut epoll, &mut run)?);
    }
    drop(stalled);
    Ok(())
}

/// A subscription; one that is to be stalled soon fills up.
fn subscribe(options: &Options, request: &[u8], is_stalled: bool) -> io::Result<TcpStream> {
    let address = options.target.connect;
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if is_stalled {
        socket.set_recv_buffer_size(STALLED_RECEIVE_BYTES)?;
        socket.set_tcp_mss(STALLED_SEGMENT_BYTES)?;
    }
    socket.connect_timeout(&address.into(), PATIENCE)?;
    let mut socket = TcpStream::from(socket);
    socket.write_all(request)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn measure(options: &Options, epoll: &mut Epoll, run: &mut Run) -> io::Result<Value> {
    let measure_from = Instant::now() + Duration::from_secs_f64(options.warm_up_s);
    run.turn(epoll, |_| Instant::now() >= measure_from, measure_from)?;
    (run.events, run.bytes, run.histogram) = (0, 0, Histogram::new());
    let before = Usage::now(&options.watched);
    let end = Instant::now() + Duration::from_secs_f64(options.seconds);
    run.turn(epoll, |_| Instant::now() >= end, end)?;
    let mut result = Usage::now(&options.watched).since(&before);
    result.insert("requests".into(), json!(run.events));
    result.insert("bytes".into(), json!(run.bytes));
    result.insert("failures".into(), run.failures.json());
    result.insert("latency_us".into(), run.histogram.summary());
    Ok(Value::Object(result))
}

struct Run {
    /// Every one, the failed included.
    subscribers: Vec<Subscriber>,
    histogram: Histogram,
    failures: Failures,
    events: u64,
    bytes: u64,
    ready: usize,
    failed: usize,
    content: Vec<u8>,
}

impl Run {
    /// Subscribers without an answer.
    fn pending(&self) -> usize {
        self.subscribers.len() - self.ready - self.failed
    }

    /// Receives until it is done.
    fn turn(&mut self, epoll: &mut Epoll, is_done: impl Fn(&Self) -> bool, until: Instant) -> io::Result<()> {
        let mut buffer = vec![0; READ_BYTES];
        while !is_done(self) {
            for token in epoll.wait(Some(until))? {
                let read = self.subscribers[token].socket.read(&mut buffer);
                let outcome = match read {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                    Ok(0) | Err(_) => Err("closed"),
                    Ok(count) => self.take(token, &buffer[..count]),
                };
                if let Err(failure) = outcome {
                    self.failures.add(failure);
                    self.failed += usize::from(matches!(self.subscribers[token].coming, Coming::Head));
                    epoll.remove(&self.subscribers[token].socket)?;
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, token: usize, input: &[u8]) -> Result<(), &'static str> {
        let subscriber = &mut self.subscribers[token];
        self.bytes += input.len() as u64;
        self.content.clear();
        match &mut subscriber.coming {
            Coming::Plain => self.content.extend_from_slice(input),
            Coming::Chunked(unchunk) => {
                if !unchunk.feed(input, &mut self.content).map_err(|()| "malformed response")? {
                    return Err("ended");
                }
            }
            Coming::Head => {
                subscriber.inbox.extend_from_slice(input);
                let head = head::parse(&subscriber.inbox).map_err(|()| "malformed response")?;
                let Some(head) = head else { return Ok(()) };
                if head.status != 200 {
                    return Err("refused");
                }
                let rest = subscriber.inbox.split_off(head.len);
                subscriber.inbox.clear();
                let is_chunked = head.body == Body::Chunked;
                subscriber.coming = if is_chunked { Coming::Chunked(Unchunk::default()) } else { Coming::Plain };
                self.ready += 1;
                return self.take(token, &rest);
            }
        }
        self.count(token);
        Ok(())
    }

    /// Counts the events that are complete; keeps the rest.
    fn count(&mut self, token: usize) {
        let inbox = &mut self.subscribers[token].inbox;
        let joined;
        let content: &[u8] = if inbox.is_empty() {
            &self.content
        } else {
            inbox.extend_from_slice(&self.content);
            joined = std::mem::take(inbox);
            &joined
        };
        let mut start = 0;
        for end in memmem::find_iter(content, b"\n\n") {
            // A comment, which keeps the connection alive, is none.
            if let Some(at) = memmem::find(&content[start..end], b"\"t\":") {
                self.events += 1;
                let digits = content[start + at + 4..end].iter().take_while(|byte| byte.is_ascii_digit());
                let sent_ns = digits.fold(0, |sum: u64, &digit| sum * 10 + u64::from(digit - b'0'));
                self.histogram.record(now_ns().saturating_sub(sent_ns));
            }
            start = end + 2;
        }
        self.subscribers[token].inbox.extend_from_slice(&content[start..]);
    }
}

fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
