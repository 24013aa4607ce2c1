//! The origin: what stands behind every proxy.
//!
//! | request | answer |
//! |---|---|
//! | `GET /bytes/<count>` | a body of so many bytes |
//! | `GET /who` | the address that was connected to: which sandbox this would be |
//! | `GET /echo`, upgrade | a WebSocket that sends every frame back |
//! | `GET /flood/<size>`, upgrade | a WebSocket that sends frames of that size for as long as they are read |
//!
//! The raw ports do the last two without HTTP, for proxies that speak WebSocket to clients and plain TCP to origins.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use memchr::memmem;
use serde_json::json;

use crate::epoll::Epoll;
use crate::websocket::{self, Frames};

const READ_BYTES: usize = 256 * 1024;
/// What a flood writes at once, at least.
const FLOOD_BYTES: usize = 256 * 1024;
/// Frames of the raw flood, where there is nobody to ask for another size.
const RAW_FLOOD_BYTES: usize = 16 * 1024;

#[derive(clap::Args)]
pub struct Options {
    /// Port 0 lets the system choose; the three ports are printed as JSON.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

/// What a connection does.
enum Mode {
    Http,
    Echo(Frames),
    RawEcho,
    /// The block that is written again and again.
    Flood(Vec<u8>),
}

struct Connection {
    socket: TcpStream,
    mode: Mode,
    inbox: Vec<u8>,
    /// What waits to be written, from `written` on.
    outbox: Vec<u8>,
    written: usize,
    is_watching_room: bool,
}

/// The listeners by their token: which mode their connections start in.
const PORTS: [fn() -> Mode; 3] = [|| Mode::Http, || Mode::RawEcho, || Mode::Flood(vec![b'x'; RAW_FLOOD_BYTES])];

pub fn run(options: &Options) -> io::Result<()> {
    let mut epoll = Epoll::new()?;
    let mut listeners = Vec::new();
    for token in 0..PORTS.len() {
        let address = if token == 0 { options.listen } else { SocketAddr::new(options.listen.ip(), 0) };
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        epoll.add(&listener, token, false)?;
        listeners.push(listener);
    }
    let port = |at: usize| listeners[at].local_addr().map(|address: SocketAddr| address.port());
    println!("{}", json!({"http": port(0)?, "raw_echo": port(1)?, "raw_flood": port(2)?}));

    let mut connections: Vec<Option<Connection>> = (0..PORTS.len()).map(|_| None).collect();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        for token in epoll.wait(None)? {
            if let Some(listener) = listeners.get(token) {
                accept(listener, PORTS[token], &epoll, &mut connections)?;
            } else if let Some(connection) = &mut connections[token]
                && connection.turn(&epoll, token, &mut buffer).is_err()
            {
                connections[token] = None;
            }
        }
    }
}

fn accept(
    listener: &TcpListener,
    mode: fn() -> Mode,
    epoll: &Epoll,
    connections: &mut Vec<Option<Connection>>,
) -> io::Result<()> {
    loop {
        let socket = match listener.accept() {
            Ok((socket, _)) => socket,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        let free = connections.iter().skip(PORTS.len()).position(Option::is_none);
        let token = free.map_or(connections.len(), |at| at + PORTS.len());
        let mode = mode();
        let is_writing = matches!(mode, Mode::Flood(_));
        epoll.add(&socket, token, is_writing)?;
        let connection = Connection {
            socket,
            mode,
            inbox: Vec::new(),
            outbox: Vec::new(),
            written: 0,
            is_watching_room: is_writing,
        };
        if token == connections.len() {
            connections.push(Some(connection));
        } else {
            connections[token] = Some(connection);
        }
    }
}

impl Connection {
    /// Reads and writes what is possible. An error ends the connection.
    fn turn(&mut self, epoll: &Epoll, token: usize, buffer: &mut [u8]) -> io::Result<()> {
        match self.socket.read(buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => self.take(&buffer[..count])?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        let is_blocked = !self.flush()?;
        if is_blocked != self.is_watching_room {
            self.is_watching_room = is_blocked;
            epoll.modify(&self.socket, token, is_blocked)?;
        }
        Ok(())
    }

    fn take(&mut self, input: &[u8]) -> io::Result<()> {
        match &mut self.mode {
            Mode::Flood(_) => {}
            Mode::RawEcho => self.outbox.extend_from_slice(input),
            Mode::Echo(frames) => {
                let outbox = &mut self.outbox;
                frames.feed(input, |payload| websocket::push_frame(outbox, payload, None))?;
            }
            Mode::Http => {
                self.inbox.extend_from_slice(input);
                self.answer()?;
            }
        }
        Ok(())
    }

    fn answer(&mut self) -> io::Result<()> {
        while let Some(end) = memmem::find(&self.inbox, b"\r\n\r\n") {
            let head: Vec<u8> = self.inbox.drain(..end + 4).collect();
            let path = head.split(|&b| b == b' ').nth(1).unwrap_or_default();
            let path = std::str::from_utf8(path).unwrap_or_default();
            if let Some(count) = path.strip_prefix("/bytes/").and_then(|count| count.parse().ok()) {
                push_ok(&mut self.outbox, count, |out| out.resize(out.len() + count, b'x'));
            } else if path == "/who" {
                let address = self.socket.local_addr()?.ip().to_string();
                push_ok(&mut self.outbox, address.len(), |out| out.extend_from_slice(address.as_bytes()));
            } else if path == "/echo" {
                self.outbox.extend_from_slice(websocket::ACCEPT_HEAD);
                self.mode = Mode::Echo(Frames::default());
                return Ok(());
            } else if let Some(size) = path.strip_prefix("/flood/").and_then(|size| size.parse().ok()) {
                self.outbox.extend_from_slice(websocket::ACCEPT_HEAD);
                self.mode = Mode::Flood(block(size));
                return Ok(());
            } else {
                self.outbox.extend_from_slice(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
            }
        }
        Ok(())
    }

    /// Writes until nothing is left, which a flood never gets to, or no more is taken: then false.
    fn flush(&mut self) -> io::Result<bool> {
        loop {
            if self.written == self.outbox.len() {
                self.outbox.clear();
                self.written = 0;
                match &self.mode {
                    Mode::Flood(block) => self.outbox.extend_from_slice(block),
                    _ => return Ok(true),
                }
            }
            match self.socket.write(&self.outbox[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Appends a response with the headers that a common server sends.
fn push_ok(out: &mut Vec<u8>, length: usize, push_body: impl FnOnce(&mut Vec<u8>)) {
    let head = format!(
        "HTTP/1.1 200 OK\r\nServer: origin\r\nDate: Sun, 22 Nov 2026 02:00:00 GMT\r\nContent-Type: text/html\r\n\
         Content-Length: {length}\r\nLast-Modified: Sat, 21 Nov 2026 12:00:00 GMT\r\nConnection: keep-alive\r\n\
         ETag: \"6560a5c2-400\"\r\nAccept-Ranges: bytes\r\n\r\n"
    );
    out.extend_from_slice(head.as_bytes());
    push_body(out);
}

/// Frames of `size` bytes, as many as make a good write.
fn block(size: usize) -> Vec<u8> {
    let payload = vec![b'x'; size];
    let mut block = Vec::new();
    while block.len() < FLOOD_BYTES {
        websocket::push_frame(&mut block, &payload, None);
    }
    block
}
