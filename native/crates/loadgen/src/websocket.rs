//! WebSocket (RFC 6455) as far as a benchmark needs it: whole binary frames, no extensions.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::epoll::Epoll;
use crate::failures::Failures;
use crate::head;
use crate::histogram::Histogram;
use crate::target::Target;
use crate::usage::{Usage, Watched};

/// The nonce and the answer to it that RFC 6455 uses as its example (1.3): every handshake here has them.
const NONCE: &str = "dGhlIHNhbXBsZSBub25jZQ==";
/// The head with which the origin switches.
pub const ACCEPT_HEAD: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
    Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];
const BINARY: u8 = 0x82;
/// In place of a length: it follows in so many bits.
const LENGTH_16: u8 = 0x7e;
const LENGTH_64: u8 = 0x7f;
const READ_BYTES: usize = 256 * 1024;
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    target: Target,
    #[arg(long, default_value_t = 4)]
    connections: usize,
    /// Send a frame of so many bytes and wait for it to come back; without, only read.
    #[arg(long)]
    echo: Option<usize>,
    #[arg(long, default_value_t = 0.5)]
    warm_up_s: f64,
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    #[command(flatten)]
    watched: Watched,
}

/// Appends a binary frame; masked, as from a client, if a mask is given.
pub fn push_frame(out: &mut Vec<u8>, payload: &[u8], mask: Option<[u8; 4]>) {
    let bit = if mask.is_some() { 0x80 } else { 0 };
    out.push(BINARY);
    match payload.len() {
        len @ 0..=0x7d => out.push(bit | len as u8),
        len @ 0x7e..=0xffff => {
            out.push(bit | LENGTH_16);
            out.extend_from_slice(&(len as u16).to_be_bytes());
        }
        len => {
            out.push(bit | LENGTH_64);
            out.extend_from_slice(&(len as u64).to_be_bytes());
        }
    }
    match mask {
        None => out.extend_from_slice(payload),
        Some(mask) => {
            out.extend_from_slice(&mask);
            out.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, key)| byte ^ key));
        }
    }
}

/// Takes frames apart that arrive in pieces.
#[derive(Default)]
pub struct Frames(Vec<u8>);

impl Frames {
    /// Calls `each` with the payload of every complete frame, unmasked.
    pub fn feed(&mut self, input: &[u8], mut each: impl FnMut(&[u8])) -> io::Result<()> {
        self.0.extend_from_slice(input);
        let mut at = 0;
        while let Some((start, len, mask)) = frame(&self.0[at..])? {
            let payload = &mut self.0[at + start..at + start + len];
            if let Some(mask) = mask {
                payload.iter_mut().zip(mask.iter().cycle()).for_each(|(byte, key)| *byte ^= key);
            }
            each(payload);
            at += start + len;
        }
        self.0.drain(..at);
        Ok(())
    }
}

type Frame = (usize, usize, Option<[u8; 4]>);

/// Start and length of the payload and the mask of the frame that `input` starts with, if it is complete.
fn frame(input: &[u8]) -> io::Result<Option<Frame>> {
    let (Some(&kind), Some(&second)) = (input.first(), input.get(1)) else { return Ok(None) };
    if kind & 0x0f > 2 {
        return Err(io::Error::other("a control frame"));
    }
    let (start, len) = match second & 0x7f {
        LENGTH_16 => (4, input.get(2..4).map(|b| usize::from(b[0]) << 8 | usize::from(b[1]))),
        LENGTH_64 => (10, input.get(2..10).map(|b| b.iter().fold(0, |sum, &byte| sum << 8 | usize::from(byte)))),
        len => (2, Some(usize::from(len))),
    };
    let Some(len) = len else { return Ok(None) };
    let is_masked = second & 0x80 != 0;
    let mask = input.get(start..start + 4).filter(|_| is_masked).map(|b| [b[0], b[1], b[2], b[3]]);
    let start = start + if is_masked { 4 } else { 0 };
    Ok((input.len() >= start + len).then_some((start, len, mask)))
}

struct Connection {
    socket: TcpStream,
    frames: Frames,
    sent_at: Instant,
}

pub fn run(options: &Options) -> io::Result<()> {
    let mut message = Vec::new();
    push_frame(&mut message, &vec![b'x'; options.echo.unwrap_or(0)], Some(MASK));
    let mut epoll = Epoll::new()?;
    let mut connections = Vec::new();
    for token in 0..options.connections {
        let mut socket = open(options)?;
        if options.echo.is_some() {
            socket.write_all(&message)?;
        }
        epoll.add(&socket, token, false)?;
        connections.push(Connection { socket, frames: Frames::default(), sent_at: Instant::now() });
    }
    println!("{}", measure(options, &mut epoll, &mut connections, &message)?);
    Ok(())
}

/// Connects and switches protocols.
fn open(options: &Options) -> io::Result<TcpStream> {
    let key = format!("Sec-WebSocket-Key: {NONCE}");
    let more = [
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Protocol: binary",
        &key,
    ];
    let request = options.target.request(&options.target.hosts()?[0], &more);
    let mut socket = TcpStream::connect_timeout(&options.target.connect, PATIENCE)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.write_all(&request)?;
    let mut head = Vec::new();
    let mut byte = [0];
    // Byte by byte: what follows the head is not ours to take.
    while !head.ends_with(b"\r\n\r\n") {
        socket.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    match head::parse(&head) {
        Ok(Some(parsed)) if parsed.status == 101 => {}
        _ => return Err(io::Error::other(format!("no switch: {}", String::from_utf8_lossy(&head)))),
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn measure(options: &Options, epoll: &mut Epoll, connections: &mut [Connection], message: &[u8]) -> io::Result<Value> {
    let measure_from = Instant::now() + Duration::from_secs_f64(options.warm_up_s);
    let end = measure_from + Duration::from_secs_f64(options.seconds);
    let (mut histogram, mut failures) = (Histogram::new(), Failures::default());
    let (mut bytes, mut messages) = (0u64, 0u64);
    let mut before = None;
    let mut buffer = vec![0; READ_BYTES];
    while Instant::now() < end {
        if before.is_none() && Instant::now() >= measure_from {
            before = Some(Usage::now(&options.watched));
            (bytes, messages, histogram) = (0, 0, Histogram::new());
        }
        for token in epoll.wait(Some(end))? {
            let connection = &mut connections[token];
            let count = match connection.socket.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Ok(0) | Err(_) => {
                    failures.add("closed");
                    epoll.remove(&connection.socket)?;
                    continue;
                }
                Ok(count) => count,
            };
            bytes += count as u64;
            if options.echo.is_none() {
                continue;
            }
            let mut echoes = 0;
            connection.frames.feed(&buffer[..count], |_| echoes += 1)?;
            for _ in 0..echoes {
                messages += 1;
                histogram.record(connection.sent_at.elapsed().as_nanos() as u64);
                connection.sent_at = Instant::now();
                connection.socket.write_all(message)?;
            }
        }
    }
    let before = before.ok_or_else(|| io::Error::other("the measurement is shorter than its warm-up"))?;
    let mut result = Usage::now(&options.watched).since(&before);
    result.insert("bytes".into(), json!(bytes));
    result.insert("requests".into(), json!(messages));
    result.insert("failures".into(), failures.json());
    result.insert("latency_us".into(), histogram.summary());
    Ok(Value::Object(result))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_were_however_they_are_cut() {
        for mask in [None, Some(MASK)] {
            let mut wire = Vec::new();
            let sent: Vec<Vec<u8>> = [0, 1, 125, 126, 300, 70_000].map(|len| vec![b'a'; len]).into();
            for payload in &sent {
                push_frame(&mut wire, payload, mask);
            }
            for size in [1, 7, 4096, wire.len()] {
                let (mut frames, mut got) = (Frames::default(), Vec::new());
                for piece in wire.chunks(size) {
                    frames.feed(piece, |payload| got.push(payload.to_vec())).unwrap();
                }
                assert_eq!(got, sent);
            }
        }
    }
}
