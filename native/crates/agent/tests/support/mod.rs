//! An agent as an ordinary process, and a client that speaks frames to it.
#![allow(dead_code, missing_docs)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sandgate_frame::{Decoder, Kind, push, push_count, push_data};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const TOKEN: &str = "0123456789abcdef";
const WAIT: Duration = Duration::from_secs(30);

/// A running agent; stopped, with everything it started, when dropped.
pub struct Agent {
    child: Child,
    address: SocketAddr,
    dir: TempDir,
}

impl Agent {
    pub fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_sandgate-agent"))
            .args(["--listen", "127.0.0.1:0", "--print-port", "--hooks"])
            .arg(dir.path().join("hooks.d"))
            .env("SANDGATE_AGENT_TOKEN", TOKEN)
            .env("INHERITED", "yes")
            .stdout(Stdio::piped())
            .spawn()
            .expect("the agent starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], line.trim().parse().expect("a port")));
        Self { child, address, dir }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn socket(&self) -> TcpStream {
        let socket = TcpStream::connect(self.address).unwrap();
        socket.set_read_timeout(Some(WAIT)).unwrap();
        socket.set_nodelay(true).unwrap();
        socket
    }

    pub fn client(&self) -> Client {
        let mut client = Client::new(self.socket());
        client.hello(TOKEN);
        let frame = client.frame();
        assert_eq!(frame.kind, Kind::Hello);
        client
    }

    /// A path below a directory of this agent's own, without links.
    pub fn path(&self, name: &str) -> String {
        self.dir.path().canonicalize().unwrap().join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // The agent ends what it started when it is asked to stop.
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        self.child.wait().unwrap();
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    pub kind: Kind,
    pub channel: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.payload).unwrap()
    }

    pub fn count(&self) -> u64 {
        u64::from_le_bytes(self.payload[..8].try_into().unwrap())
    }
}

pub struct Client {
    socket: TcpStream,
    decoder: Decoder,
    last_stream: u32,
}

/// What an operation came to, all frames of its stream taken together.
#[derive(Debug, Default)]
pub struct Outcome {
    pub reply: Option<Value>,
    pub error: Option<String>,
    pub output: BTreeMap<u8, Vec<u8>>,
    pub ends: BTreeMap<u8, u64>,
    pub events: Vec<Value>,
}

impl Outcome {
    pub fn text(&self, channel: u8) -> String {
        String::from_utf8(self.output.get(&channel).cloned().unwrap_or_default()).unwrap()
    }

    pub fn exit(&self) -> &Value {
        self.events.last().unwrap_or_else(|| panic!("no exit in {self:?}"))
    }

    pub fn code(&self) -> i64 {
        self.exit()["exit_code"].as_i64().unwrap()
    }

    pub fn reply(&self) -> &Value {
        self.reply.as_ref().unwrap_or_else(|| panic!("no reply in {self:?}"))
    }

    pub fn error(&self) -> &str {
        self.error.as_deref().unwrap_or_else(|| panic!("no error in {self:?}"))
    }
}

impl Client {
    pub fn new(socket: TcpStream) -> Self {
        Self { socket, decoder: Decoder::default(), last_stream: 0 }
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    pub fn send(&mut self, kind: Kind, stream: u32, payload: &[u8]) {
        let mut bytes = Vec::new();
        push(&mut bytes, kind, 0, stream, payload);
        self.raw(&bytes);
    }

    pub fn hello(&mut self, token: &str) {
        let hello = json!({"version": 1, "role": "host", "token": token}).to_string();
        self.send(Kind::Hello, 0, hello.as_bytes());
    }

    pub fn count(&mut self, kind: Kind, channel: u8, stream: u32, count: u64) {
        let mut bytes = Vec::new();
        push_count(&mut bytes, kind, channel, stream, count);
        self.raw(&bytes);
    }

    pub fn data(&mut self, stream: u32, offset: u64, content: &[u8]) {
        let mut bytes = Vec::new();
        push_data(&mut bytes, 0, stream, offset, content);
        self.raw(&bytes);
    }

    /// Open a stream; `op` names the operation in its field `op`.
    pub fn open(&mut self, op: &Value) -> u32 {
        self.last_stream += 1;
        self.send(Kind::Open, self.last_stream, op.to_string().as_bytes());
        self.last_stream
    }

    /// The next frame, `None` once the connection is closed.
    pub fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.next_frame().expect("the agent sends valid frames") {
                let (kind, channel, stream) = (frame.kind, frame.channel, frame.stream);
                return Some(Frame { kind, channel, stream, payload: frame.payload.to_vec() });
            }
            let space = self.decoder.space(64 * 1024);
            match self.socket.read(space) {
                Ok(0) => return None,
                Ok(bytes) => self.decoder.advance(bytes),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("no frame: {error}"),
            }
        }
    }

    pub fn frame(&mut self) -> Frame {
        self.next().expect("the connection is open")
    }

    /// Collect the stream's frames until it is over or `done` says so, returning credit for what comes.
    pub fn collect_until(&mut self, stream: u32, mut done: impl FnMut(&Outcome) -> bool) -> Outcome {
        let mut outcome = Outcome::default();
        let mut first = BTreeMap::new();
        while !done(&outcome) {
            let frame = self.frame();
            assert_eq!(frame.stream, stream, "only this stream is open: {frame:?}");
            match frame.kind {
                Kind::Reply => outcome.reply = Some(frame.json()),
                Kind::Error => {
                    outcome.error = Some(frame.json()["code"].as_str().unwrap().to_owned());
                    return outcome;
                }
                Kind::Data => {
                    let content = &frame.payload[8..];
                    let collected = outcome.output.entry(frame.channel).or_default();
                    let start = *first.entry(frame.channel).or_insert_with(|| frame.count());
                    assert_eq!(frame.count() - start, collected.len() as u64, "nothing is missing in between");
                    collected.extend_from_slice(content);
                    self.count(Kind::Credit, frame.channel, stream, content.len() as u64);
                }
                Kind::End => drop(outcome.ends.insert(frame.channel, frame.count())),
                Kind::Event => {
                    let event = frame.json();
                    let is_exit = event["type"] == "exit";
                    outcome.events.push(event);
                    if is_exit {
                        self.send(Kind::Ack, stream, &[]);
                    }
                }
                Kind::Credit => {}
                Kind::Close => return outcome,
                other => panic!("unexpected {other:?}"),
            }
        }
        outcome
    }

    pub fn collect(&mut self, stream: u32) -> Outcome {
        self.collect_until(stream, |_| false)
    }

    pub fn call(&mut self, op: &Value) -> Outcome {
        let stream = self.open(op);
        self.collect(stream)
    }

    /// Run `argv` or a `shell` line, with whatever else `more` asks for.
    pub fn exec(&mut self, more: &Value) -> Outcome {
        let stream = self.open(&exec_op(more));
        self.collect(stream)
    }

    pub fn shell(&mut self, line: &str) -> Outcome {
        self.exec(&json!({"shell": line}))
    }

    pub fn write_file(&mut self, arguments: &Value, content: &[u8]) -> Outcome {
        let stream = self.open(&with(json!({"op": "write", "user": user()}), arguments));
        let mut offset = 0;
        for piece in content.chunks(100_000).take(8) {
            self.data(stream, offset, piece);
            offset += piece.len() as u64;
        }
        self.count(Kind::End, 0, stream, offset);
        self.collect(stream)
    }
}

/// The account the tests run as: a machine need not have one called `user`.
pub fn user() -> String {
    let uid = nix::unistd::geteuid();
    nix::unistd::User::from_uid(uid).unwrap().map_or_else(|| uid.to_string(), |user| user.name)
}

pub fn exec_op(more: &Value) -> Value {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let id = format!("test-{}", NEXT.fetch_add(1, Ordering::Relaxed));
    with(json!({"op": "exec", "id": id, "user": user(), "cwd": "/"}), more)
}

pub fn with(mut base: Value, more: &Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        base[key] = value.clone();
    }
    base
}

/// Wait until `condition` holds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + WAIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A cheap checksum that notices lost, repeated and swapped bytes (FNV-1a).
pub fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
