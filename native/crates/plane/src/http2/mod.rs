//! HTTP/2 towards browsers.
//!
//! Each stream is served as if it were a connection of HTTP/1.1: what the client sends becomes bytes of that protocol,
//! and what the plane answers becomes frames again. So there is one way to judge, route, limit, time out and log a
//! request, and one strict parser that all of them pass.
//!
//! ```text
//! connection ──accept──▶ request ──▶ Exchange (reads and writes HTTP/1.1) ◀──▶ connection::serve
//! ```
//!
//! Not for web sockets: extended CONNECT is not offered, and browsers then open them by HTTP/1.1.

mod exchange;
mod request;
mod timed;

use std::cell::Cell;
use std::rc::Rc;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::{Builder, SendResponse};
use http::Request;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

pub use self::request::{Head, head};

use self::exchange::Exchange;
use self::timed::Timed;
use crate::compose::HTTPS;
use crate::config::duration;
use crate::connection;
use crate::streams::hub;
use crate::trust::{self, Client};
use crate::watch::{End, Phase, Watch};
use crate::worker::Worker;

/// Requests in flight on one connection.
const STREAMS_MAX: u32 = 128;
/// Bytes a client may send ahead on one stream, and on all of a connection.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;
/// Bytes of one stream that wait to be sent.
const SEND_BUFFER_BYTES: usize = 128 * 1024;
/// Seconds a connection without streams has left once it has been told to end.
const FAREWELL_S: f64 = 2.0;

/// Serves one connection, whose transport is established.
pub async fn serve<C>(worker: &Rc<Worker>, watch: &Rc<Watch>, stream: C, client: Client)
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    worker.counters.http2_connections.add(1);
    watch.can_be_told.set(true);
    let limits = &worker.config.limits;
    let handshake = Builder::new()
        .max_concurrent_streams(STREAMS_MAX)
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(limits.head_bytes_max)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .handshake(Timed::new(stream, Rc::clone(worker), Rc::clone(watch)));
    let Ok(Ok(mut connection)) = timeout(duration(limits.head_timeout_s), handshake).await else { return };
    let streams = Rc::new(Streams { worker: Rc::clone(worker), watch: Rc::clone(watch), open: Cell::new(0) });
    streams.note();
    loop {
        tokio::select! {
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => streams.begin(request, respond, client),
                Some(Err(_)) | None => return,
            },
            end = watch.ended() => {
                if let End::Timeout(phase) = end {
                    worker.counters.timeout(phase);
                }
                if matches!(end, End::Timeout(Phase::Send | Phase::HalfClosed)) {
                    return;
                }
                // What the client has sent by the time it hears of it is still served.
                connection.graceful_shutdown();
                streams.say_farewell();
            }
        }
    }
}

/// One of a connection's streams, as long as it is kept.
struct OpenStream(Rc<Streams>);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
        self.0.note();
    }
}

/// The streams of one connection.
struct Streams {
    worker: Rc<Worker>,
    watch: Rc<Watch>,
    open: Cell<u32>,
}

impl Streams {
    fn begin(self: &Rc<Self>, request: Request<RecvStream>, mut respond: SendResponse<Bytes>, client: Client) {
        let Some(head) = request::head(&request, !request.body().is_end_stream()) else {
            return respond.send_reset(h2::Reason::PROTOCOL_ERROR);
        };
        let is_head = request.method() == http::Method::HEAD;
        let exchange = Exchange::new(head, is_head, request.into_body(), respond);
        let streams = Rc::clone(self);
        streams.open.set(streams.open.get() + 1);
        streams.note();
        tokio::task::spawn_local(async move {
            let open = OpenStream(streams);
            let worker = Rc::clone(&open.0.worker);
            let watch = worker.watches.add();
            let joined = connection::serve(&worker, &watch, exchange, trust::peer(&worker.config, client, HTTPS)).await;
            hub::settle(&worker, joined, open);
        });
    }

    /// A connection is idle, and can time out, only without streams; a drain reaches it at any time.
    fn note(&self) {
        let idle_timeout_s = self.worker.config.limits.idle_timeout_s;
        let is_idle = self.open.get() == 0;
        self.watch.up.set(Phase::Idle, if is_idle { self.worker.after(idle_timeout_s) } else { u64::MAX });
    }

    /// Bounds the life of a connection that has been told to end. With streams, the end of the last one does.
    fn say_farewell(&self) {
        if self.open.get() == 0 {
            self.watch.up.set(Phase::HalfClosed, self.worker.after(FAREWELL_S));
        }
    }
}
