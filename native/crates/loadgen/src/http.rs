//! Load of GET requests, each connection with one request in flight.
//!
//! Closed loop: the next request follows the answer. Open loop (`--rate`): requests are due at a fixed rate whatever the
//! answers do, and a latency counts from when its request was due, so a stall is paid for by everyone it delayed.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::ClientConfig;
use serde_json::{Value, json};

use crate::epoll::Epoll;
use crate::failures::Failures;
use crate::head::{self, Body};
use crate::histogram::Histogram;
use crate::stream::{Stream, tls_config};
use crate::target::Target;
use crate::usage::{Usage, Watched};

/// As much of a body as is kept to look at.
const KEPT_BYTES: usize = 512;
const READ_BYTES: usize = 256 * 1024;
const RECONNECT_PAUSE: Duration = Duration::from_millis(5);

#[derive(clap::Args)]
pub struct Options {
    /// A line of the hosts' file may go on with the body that the host must answer with.
    #[command(flatten)]
    target: Target,
    #[arg(long, default_value_t = 64)]
    connections: usize,
    #[arg(long, default_value_t = 0.5)]
    warm_up_s: f64,
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// End after so many answers, however long they take.
    #[arg(long)]
    requests: Option<u64>,
    /// Requests per second: an open loop.
    #[arg(long)]
    rate: Option<f64>,
    /// For an answer; longer counts as a failure.
    #[arg(long, default_value_t = 30.0)]
    timeout_s: f64,
    /// By TLS, trusting the certificate in this file.
    #[arg(long)]
    tls_ca: Option<PathBuf>,
    #[command(flatten)]
    watched: Watched,
}

/// A host's request, and what must come back.
struct Call {
    request: Vec<u8>,
    expected: Option<Vec<u8>>,
}

struct Connection {
    stream: Option<Stream>,
    /// What came of the response and is not used up: a head that is not complete.
    partial: Vec<u8>,
    /// The request in flight: which, and when it was due.
    in_flight: Option<(usize, Instant)>,
    /// The response's head is here; so much of its body is not.
    answer: Option<Answer>,
    /// Answers that came on this connection.
    answered: u64,
}

struct Answer {
    status: u16,
    is_last: bool,
    left: usize,
    kept: Vec<u8>,
}

struct Load<'a> {
    options: &'a Options,
    epoll: Epoll,
    tls: Option<(Arc<ClientConfig>, String)>,
    calls: Vec<Call>,
    next_call: usize,
    connections: Vec<Connection>,
    idle: Vec<usize>,
    backlog: VecDeque<Instant>,
    failures: Failures,
    retries: u64,
    histogram: Histogram,
    answers: u64,
    bytes: u64,
    is_measuring: bool,
}

pub fn run(options: &Options) -> io::Result<()> {
    let hosts = options.target.hosts()?;
    let calls = hosts.iter().map(|line| call(&options.target, line)).collect();
    let tls = options.tls_ca.as_deref().map(tls_config).transpose()?;
    let tls = tls.map(|config| (config, server_name(&hosts[0])));
    let mut load = Load {
        options,
        epoll: Epoll::new()?,
        tls,
        calls,
        next_call: 0,
        connections: Vec::new(),
        idle: Vec::new(),
        backlog: VecDeque::new(),
        failures: Failures::default(),
        retries: 0,
        histogram: Histogram::new(),
        answers: 0,
        bytes: 0,
        is_measuring: false,
    };
    println!("{}", load.measure()?);
    Ok(())
}

/// What a host stands for in TLS.
fn server_name(host: &str) -> String {
    host.split([':', ' ']).next().unwrap_or_default().to_owned()
}

fn call(target: &Target, line: &str) -> Call {
    let (host, expected) = line.split_once(' ').map_or((line, None), |(host, body)| (host, Some(body)));
    Call { request: target.request(host, &[]), expected: expected.map(|body| body.as_bytes().to_vec()) }
}

impl Load<'_> {
    fn measure(&mut self) -> io::Result<Value> {
        for index in 0..self.options.connections {
            let connection =
                Connection { stream: None, partial: Vec::new(), in_flight: None, answer: None, answered: 0 };
            self.connections.push(connection);
            self.idle.push(index);
        }
        let start = Instant::now();
        let measure_from = start + Duration::from_secs_f64(self.options.warm_up_s);
        let end = measure_from + Duration::from_secs_f64(self.options.seconds);
        let mut due = start;
        if self.options.rate.is_none() {
            self.backlog.resize(self.options.connections, start);
        }
        let mut before = Usage::now(&self.options.watched);
        let mut buffer = vec![0; READ_BYTES];
        let mut next_look = start + Duration::from_secs(1);
        loop {
            let now = Instant::now();
            if !self.is_measuring && now >= measure_from {
                self.is_measuring = true;
                before = Usage::now(&self.options.watched);
            }
            if self.options.requests.map_or(now >= end, |requests| self.answers >= requests) {
                break;
            }
            if let Some(rate) = self.options.rate {
                while due <= now {
                    self.backlog.push_back(due);
                    due += Duration::from_secs_f64(1.0 / rate);
                }
            }
            self.start_waiting();
            if now >= next_look {
                self.give_up_late(now);
                next_look = now + Duration::from_secs(1);
            }
            let until = if self.is_measuring { end.max(now + Duration::from_millis(100)) } else { measure_from };
            let until = if self.options.rate.is_some() { until.min(due) } else { until };
            let until = if self.backlog.is_empty() { until } else { until.min(now + RECONNECT_PAUSE) };
            for index in self.epoll.wait(Some(until.min(next_look)))? {
                self.receive(index, &mut buffer);
            }
        }
        let mut result = Usage::now(&self.options.watched).since(&before);
        result.insert("requests".into(), json!(self.answers));
        result.insert("bytes".into(), json!(self.bytes));
        result.insert("retries".into(), json!(self.retries));
        result.insert("failures".into(), self.failures.json());
        result.insert("latency_us".into(), self.histogram.summary());
        Ok(Value::Object(result))
    }

    /// Sends what is due on the connections that are free.
    fn start_waiting(&mut self) {
        while let Some(index) = self.idle.pop() {
            let Some(due) = self.backlog.pop_front() else { return self.idle.push(index) };
            let call = self.next_call;
            self.next_call = (call + 1) % self.calls.len();
            self.connections[index].in_flight = Some((call, due));
            if !self.send(index) {
                // Nobody listens: all of them wait a little.
                self.connections[index].in_flight = None;
                self.idle.push(index);
                if self.options.rate.is_none() {
                    self.backlog.push_front(due);
                }
                return;
            }
        }
    }

    /// Sends the request in flight, on a new connection if there is none. False if none can be made.
    fn send(&mut self, index: usize) -> bool {
        let connection = &mut self.connections[index];
        let Some((call, _)) = connection.in_flight else { return true };
        if connection.stream.is_none() {
            let connected = Stream::connect(self.options.target.connect, self.tls.as_ref())
                .and_then(|stream| self.epoll.add(&stream, index, false).map(|()| stream));
            match connected {
                Ok(stream) => connection.stream = Some(stream),
                Err(error) => {
                    self.failures.add(format!("connect: {}", error.kind()));
                    return false;
                }
            }
            connection.answered = 0;
        }
        if let Some(stream) = &mut connection.stream {
            // A request fits into an empty socket buffer; if the connection is broken, the next read tells.
            let _ = stream.write_all(&self.calls[call].request).and_then(|()| stream.flush());
        }
        true
    }

    fn receive(&mut self, index: usize, buffer: &mut [u8]) {
        loop {
            let Some(stream) = &mut self.connections[index].stream else { return };
            match stream.read(buffer) {
                Ok(0) => return self.closed(index),
                Ok(count) => {
                    self.bytes += count as u64;
                    if self.take(index, &buffer[..count]).is_err() {
                        self.failures.add("malformed response");
                        self.connections[index].stream = None;
                        self.free(index);
                        return;
                    }
                    // A plain socket that gave less than was asked for is empty; TLS may hold more.
                    if count < buffer.len() && self.tls.is_none() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.closed(index),
            }
        }
    }

    fn take(&mut self, index: usize, input: &[u8]) -> Result<(), ()> {
        let connection = &mut self.connections[index];
        let mut input = input;
        if connection.answer.is_none() {
            let at_hand = connection.partial.len();
            let joined;
            let whole = if at_hand == 0 {
                input
            } else {
                connection.partial.extend_from_slice(input);
                joined = std::mem::take(&mut connection.partial);
                &joined
            };
            let Some(head) = head::parse(whole)? else {
                connection.partial = whole.to_vec();
                return Ok(());
            };
            let Body::Length(left) = head.body else { return Err(()) };
            connection.answer = Some(Answer { status: head.status, is_last: head.is_last, left, kept: Vec::new() });
            input = &input[head.len - at_hand..];
        }
        let Some(answer) = &mut connection.answer else { return Ok(()) };
        if input.len() > answer.left {
            return Err(());
        }
        let room = KEPT_BYTES.saturating_sub(answer.kept.len()).min(input.len());
        answer.kept.extend_from_slice(&input[..room]);
        answer.left -= input.len();
        if answer.left == 0 {
            self.answered(index);
        }
        Ok(())
    }

    fn answered(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        connection.answered += 1;
        let (Some(answer), Some((call, due))) = (connection.answer.take(), connection.in_flight.take()) else { return };
        if answer.is_last {
            connection.stream = None;
        }
        if answer.status != 200 {
            self.failures.add(failure_name(&answer));
        } else if self.calls[call].expected.as_ref().is_some_and(|expected| *expected != answer.kept) {
            self.failures.add("wrong body");
        }
        if self.is_measuring {
            self.answers += 1;
            self.histogram.record(due.elapsed().as_nanos() as u64);
        }
        self.free(index);
    }

    /// The connection is ready for another request, which in a closed loop is due now.
    fn free(&mut self, index: usize) {
        self.connections[index].in_flight = None;
        self.connections[index].answer = None;
        self.connections[index].partial.clear();
        if self.options.rate.is_none() {
            self.backlog.push_back(Instant::now());
        }
        self.idle.push(index);
        self.start_waiting();
    }

    /// The server has closed. A request that got no byte of an answer on a connection that had been used before is sent
    /// again, as every client of HTTP/1.1 does (RFC 9112, 9.3.1).
    fn closed(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        connection.stream = None;
        if connection.in_flight.is_none() {
            return;
        }
        let is_unanswered = connection.answer.is_none() && connection.partial.is_empty();
        if is_unanswered && connection.answered > 0 {
            self.retries += 1;
            if self.send(index) {
                return;
            }
        } else {
            self.failures.add(if is_unanswered { "closed unanswered" } else { "cut" });
        }
        self.free(index);
    }

    fn give_up_late(&mut self, now: Instant) {
        let timeout = Duration::from_secs_f64(self.options.timeout_s);
        for index in 0..self.connections.len() {
            let is_late = |(_, due): (usize, Instant)| now.saturating_duration_since(due) > timeout;
            if self.connections[index].in_flight.is_some_and(is_late) {
                self.failures.add("timeout");
                self.connections[index].stream = None;
                self.free(index);
            }
        }
    }
}

/// The status, and the code of an answer in Sandgate's own form.
fn failure_name(answer: &Answer) -> String {
    let body: Option<Value> = serde_json::from_slice(&answer.kept).ok();
    let code = body.as_ref().and_then(|body| body["error"]["code"].as_str());
    code.map_or_else(|| answer.status.to_string(), |code| format!("{} {code}", answer.status))
}
