//! One request and its response: connect, pass on both ways, keep or close.
//!
//! ```text
//! upload:    head + body ──▶ upstream, then watch for the client leaving
//! download:  interim heads*, head + body ──▶ client
//! ```
//!
//! Both run at once in one task. The exchange ends with the download; what of the upload is left then is not sent.
//!
//! A large body for the API is held back until the API asks for it: it may order the plane to receive it ([`receive`]).
//! What came of that, or of a file that cannot be read, is reported by a second request, whose answer is the client's.

mod ordered;
mod receive;

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::task::Poll;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, UnixStream};
use tokio::sync::Notify;

use crate::buf::{HeadBuf, Inbox};
use crate::compose::{self, Reply};
use crate::failure::{Code, Failure};
use crate::http::body::Body;
use crate::http::response::{self, Response};
use crate::http::{Framing, find_end};
use crate::net::{Shared, Socket, write_both};
use crate::pace::Pace;
use crate::prepare::{Forward, Sending};
use crate::pump::{Flow, PumpError, pump};
use crate::streams::hub::Joining;
use crate::streams::order::Order;
use crate::streams::upload;
use crate::watch::{Phase, Watch};
use crate::worker::Worker;

/// Interim responses before the final one; more are not meant well.
const INTERIM_MAX: u32 = 16;

/// How an exchange ended.
pub enum Done {
    /// Answered; the next request may follow.
    KeepAlive(u16),
    /// Answered; the connection ends here.
    Close(u16),
    /// The upstream switched protocols.
    Switch(Box<Switch>),
    /// The API has ordered events, after the backlog that has been sent.
    Join(u16, Box<Joining>),
}

/// What a tunnel starts with.
pub struct Switch {
    /// The connection.
    pub upstream: Socket,
    /// What it has said already.
    pub reply: Inbox,
}

/// Why an exchange failed.
#[derive(Debug)]
pub enum Broken {
    /// Nothing was answered yet: tell the client.
    Failed(Failure),
    /// The client is gone, or half-answered: nothing can be told.
    Aborted,
    /// A pooled connection was closed under us and the request can be sent again.
    Stale,
}

/// Carries out one exchange. `inbox` holds what the client sent after the head.
pub async fn exchange<C: AsyncRead + AsyncWrite + Unpin>(
    worker: &Worker,
    watch: &Watch,
    client: &Shared<C>,
    inbox: &mut Inbox,
    forward: &mut Forward,
) -> Result<Done, Broken> {
    let mut may_be_pooled = true;
    loop {
        let pooled = if may_be_pooled { take_pooled(worker, forward) } else { None };
        let is_pooled = pooled.is_some();
        let upstream = match pooled {
            Some(upstream) => upstream,
            None => connect(worker, watch, forward).await.map_err(|code| Broken::Failed(code.into()))?,
        };
        let attempt = Attempt {
            worker,
            watch,
            client,
            upstream: Shared::new(upstream),
            forward,
            is_pooled,
            has_sent: Cell::new(false),
            is_uploaded: Cell::new(false),
            is_half_closed: Cell::new(false),
            gate: Notify::new(),
        };
        match attempt.run(inbox).await {
            Ok(Ending::Done(done)) => return Ok(done),
            Ok(Ending::Report(report)) => forward.report(&report, true),
            Ok(Ending::Receive(wanted)) => {
                let (report, is_read) = receive::receive(worker, watch, client, inbox, forward, *wanted).await?;
                forward.report(&report, is_read);
            }
            Err(Broken::Stale) => {
                may_be_pooled = false;
                worker.pool.forget(forward.target);
                worker.counters.retries.add(1);
            }
            Err(broken) => return Err(broken),
        }
    }
}

/// How an attempt ended.
enum Ending {
    /// With an answer to the client.
    Done(Done),
    /// The API is to be told this, and then to answer.
    Report(String),
    /// The API has ordered that the plane receive the body.
    Receive(Box<upload::Wanted>),
}

/// A pooled connection. For a request that must not be sent twice, one that is known to be open right now.
fn take_pooled(worker: &Worker, forward: &Forward) -> Option<Socket> {
    loop {
        let upstream = worker.pool.take(forward.target)?;
        if upstream.is_quiet() && (forward.is_replayable || upstream.is_surely_quiet()) {
            return Some(upstream);
        }
    }
}

async fn connect(worker: &Worker, watch: &Watch, forward: &Forward) -> Result<Socket, Code> {
    watch.down.set(Phase::Connect, worker.after(worker.config.limits.connect_timeout_s));
    let connected = match forward.address {
        None => UnixStream::connect(&worker.config.api_socket).await.map(Socket::Unix),
        Some(address) => {
            let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
            match socket.and_then(|socket| socket.set_nodelay(true).map(|()| socket)) {
                Ok(socket) => socket.connect(address).await.map(Socket::Tcp),
                Err(error) => Err(error),
            }
        }
    };
    watch.down.clear();
    worker.counters.connects.add(1);
    connected.map_err(|error| match error.kind() {
        _ if forward.address.is_none() => Code::ApiUnavailable,
        io::ErrorKind::ConnectionRefused => Code::PortClosed,
        io::ErrorKind::TimedOut => Code::UpstreamTimeout,
        _ => Code::UpstreamBroke,
    })
}

struct Attempt<'a, C> {
    worker: &'a Worker,
    watch: &'a Watch,
    client: &'a Shared<C>,
    upstream: Shared<Socket>,
    forward: &'a Forward,
    is_pooled: bool,
    has_sent: Cell<bool>,
    is_uploaded: Cell<bool>,
    is_half_closed: Cell<bool>,
    /// Opens when the API wants the body that is held back.
    gate: Notify,
}

/// Why the upload ended before the exchange.
enum UploadEnd {
    /// The upstream takes no more; it may have answered.
    Refused,
    /// The client closed its sending side after a complete request.
    HalfClosed,
    /// The client left, or sent less than it had promised.
    Gone,
    /// The client's body is malformed or too large.
    Unfit(Failure),
}

/// What the download ended with.
enum Download {
    Answered(Answered),
    Report(String),
    Receive(Box<upload::Wanted>),
}

/// An answer that has been passed on.
struct Answered {
    response: Response,
    reply: Inbox,
    is_keep_alive: bool,
    is_switch: bool,
    joining: Option<Box<Joining>>,
}

impl<C: AsyncRead + AsyncWrite + Unpin> Attempt<'_, C> {
    async fn run(self, inbox: &mut Inbox) -> Result<Ending, Broken> {
        let download = {
            let mut upload = pin!(self.upload(inbox));
            let mut download = pin!(self.download());
            let mut is_uploading = true;
            poll_fn(|cx| {
                if is_uploading && let Poll::Ready(end) = upload.as_mut().poll(cx) {
                    is_uploading = false;
                    match end {
                        UploadEnd::Refused => {}
                        UploadEnd::HalfClosed => self.half_closed(),
                        UploadEnd::Gone => return Poll::Ready(Err(Broken::Aborted)),
                        UploadEnd::Unfit(failure) => return Poll::Ready(Err(self.broken(failure))),
                    }
                }
                download.as_mut().poll(cx)
            })
            .await?
        };
        self.watch.up.clear();
        self.watch.down.clear();
        Ok(match download {
            Download::Answered(answered) => Ending::Done(self.finish(answered)),
            Download::Report(report) => Ending::Report(report),
            Download::Receive(wanted) => Ending::Receive(wanted),
        })
    }

    fn half_closed(&self) {
        self.is_half_closed.set(true);
        self.watch.up.set(Phase::HalfClosed, self.worker.after(self.worker.config.limits.half_closed_timeout_s));
    }

    fn finish(self, answered: Answered) -> Done {
        let Answered { response, reply, is_keep_alive, is_switch, joining } = answered;
        let upstream = self.upstream.into_inner();
        if is_switch {
            return Done::Switch(Box::new(Switch { upstream, reply }));
        }
        let is_complete = self.is_uploaded.get();
        // The API closes a connection on which it was promised a body that did not come.
        if is_complete && response.is_keep_alive && reply.is_empty() && self.forward.sending != Sending::Report {
            self.worker.pool.give(self.forward.target, upstream, self.worker.now_ms());
        }
        if let Some(joining) = joining {
            Done::Join(response.status, joining)
        } else if is_keep_alive && is_complete && !self.is_half_closed.get() {
            Done::KeepAlive(response.status)
        } else {
            Done::Close(response.status)
        }
    }

    async fn upload(&self, inbox: &mut Inbox) -> UploadEnd {
        let limits = &self.worker.config.limits;
        let flow = Flow {
            worker: self.worker,
            watch: self.watch,
            read: (Phase::Body, limits.body_timeout_s),
            write: (Phase::Push, limits.send_timeout_s),
            count: &self.worker.counters.bytes_up,
            sandbox: self.forward.sandbox.as_deref(),
            is_up: true,
            bytes_max: self.body_bytes_max(),
            is_unchunked: false,
            has_sent: &self.has_sent,
            pace: Pace::default(),
        };
        let mut body = Body::new(self.forward.framing);
        let (mut reader, mut writer) = (self.client, &self.upstream);
        let mut head = &self.forward.head.0[..];
        if self.forward.sending.is_held() {
            if flow.write(&mut writer, head, b"").await.is_err() {
                return UploadEnd::Refused;
            }
            self.watch.up.clear();
            self.await_response();
            self.gate.notified().await;
            self.watch.down.clear();
            head = b"";
        }
        match pump(&flow, head, &mut body, inbox, &mut reader, &mut writer).await {
            Ok(()) => {}
            Err(PumpError::Write) => return UploadEnd::Refused,
            Err(PumpError::Read) => return UploadEnd::Gone,
            Err(PumpError::Malformed(error)) => return UploadEnd::Unfit(error.into()),
            Err(PumpError::TooLarge) => return UploadEnd::Unfit(Code::BodyTooLarge.into()),
        }
        self.is_uploaded.set(true);
        self.watch.up.clear();
        if !self.watch.is_answering.get() {
            self.await_response();
        }
        self.watch_client(inbox).await
    }

    /// The API has limits of its own.
    fn body_bytes_max(&self) -> u64 {
        match self.worker.config.limits.body_bytes_max {
            0 => u64::MAX,
            _ if self.forward.sandbox.is_none() => u64::MAX,
            bytes_max => bytes_max,
        }
    }

    fn await_response(&self) {
        let limits = &self.worker.config.limits;
        let is_api = self.forward.address.is_none();
        let timeout_s = if is_api { limits.api_response_timeout_s } else { limits.response_timeout_s };
        self.watch.down.set(Phase::Response, self.worker.after(timeout_s));
    }

    /// Notices a client that leaves while its response is under way; takes in what it sends ahead.
    async fn watch_client(&self, inbox: &mut Inbox) -> UploadEnd {
        let mut reader = self.client;
        while !inbox.is_full() {
            match inbox.fill(&mut reader).await {
                Ok(0) => return UploadEnd::HalfClosed,
                Ok(_) => {}
                Err(_) => return UploadEnd::Gone,
            }
        }
        std::future::pending().await
    }

    async fn download(&self) -> Result<Download, Broken> {
        let mut reply = Inbox::default();
        for _ in 0..INTERIM_MAX {
            let head_len = self.read_head(&mut reply).await?;
            let mut out = HeadBuf::take();
            let (response, answer, order) = self.compose(&reply.data()[..head_len], &mut out)?;
            if let Some(order @ (Order::Output | Order::File | Order::Upload)) = order {
                let head = reply.data()[..head_len].to_vec();
                reply.consume(head_len);
                // In a box: few connections ever need the room.
                return Box::pin(self.obey(&order, head, &out.0, response, answer, reply)).await;
            }
            reply.consume(head_len);
            if response.status < 200 && !answer.is_switch {
                if response.status == 100 {
                    self.gate.notify_one();
                }
                let is_ours = self.forward.sending == Sending::Held { expects_continue: false };
                if self.forward.minor == 1 && !(is_ours && response.status == 100) {
                    self.send(&out.0).await?;
                }
                continue;
            }
            self.watch.answer(self.worker.now_us());
            let mut joining = None;
            if answer.is_switch {
                self.send(&out.0).await?;
            } else if let Some(Order::Events(selection)) = order {
                joining = Some(Box::pin(self.pass_backlog(selection, &response, answer, &out.0, &mut reply)).await?);
            } else {
                self.pass_body(&response, answer, &out.0, &mut reply).await?;
            }
            let Reply { is_keep_alive, is_switch, .. } = answer;
            return Ok(Download::Answered(Answered { response, reply, is_keep_alive, is_switch, joining }));
        }
        Err(self.broken(Code::UpstreamBroke.into()))
    }

    async fn read_head(&self, reply: &mut Inbox) -> Result<usize, Broken> {
        let bytes_max = self.worker.config.limits.head_bytes_max as usize;
        let mut seen = 0;
        loop {
            if !reply.is_empty() {
                match find_end(reply.data(), seen, bytes_max) {
                    Ok(Some(len)) => return Ok(len),
                    Ok(None) => seen = reply.data().len(),
                    Err(_) => return Err(self.broken(Code::UpstreamBroke.into())),
                }
            }
            let mut reader = &self.upstream;
            match reply.fill(&mut reader).await {
                Ok(0) | Err(_) if reply.is_empty() => return Err(self.closed()),
                Ok(0) | Err(_) => return Err(self.broken(Code::UpstreamBroke.into())),
                Ok(_) => {}
            }
        }
    }

    /// The upstream closed without a word.
    fn closed(&self) -> Broken {
        let is_unread = !self.has_sent.get() || self.forward.is_replayable;
        if self.is_pooled && is_unread && !self.watch.is_answering.get() {
            return Broken::Stale;
        }
        let code = if self.forward.address.is_none() { Code::ApiUnavailable } else { Code::UpstreamBroke };
        self.broken(code.into())
    }

    fn broken(&self, failure: Failure) -> Broken {
        if self.watch.is_answering.get() { Broken::Aborted } else { Broken::Failed(failure) }
    }

    fn compose(&self, head: &[u8], out: &mut HeadBuf) -> Result<(Response, Reply<'_>, Option<Order>), Broken> {
        let mut fields = self.worker.fields.take();
        let composed = response::parse(head, self.forward.audience.is_head, &mut fields).map(|response| {
            let is_switch = response.status == 101 && self.forward.is_upgrade;
            let is_unchunked = response.framing == Framing::Chunked && self.forward.minor == 0;
            let order = self.order(head, &fields, &response)?;
            // What is left of an upload that is answered early is not read, so another request cannot follow it.
            let is_keep_alive = self.forward.is_keep_alive
                && (self.is_uploaded.get() || response.status < 200)
                && response.framing != Framing::UntilClose
                && !is_unchunked
                && !matches!(order, Some(Order::Events(_)))
                && !self.worker.is_draining.get();
            let is_preview = self.forward.sandbox.is_some();
            let terms = self.forward.audience.terms.as_deref();
            let reply = Reply { minor: self.forward.minor, is_keep_alive, is_switch, is_unchunked, is_preview, terms };
            compose::response(&mut out.0, head, &fields, &response, reply);
            Ok((response, reply, order))
        });
        self.worker.fields.replace(fields);
        match composed {
            // Nobody asked for another protocol.
            Ok(Ok((Response { status: 101, .. }, Reply { is_switch: false, .. }, _)) | Err(())) | Err(_) => {
                Err(self.broken(Code::UpstreamBroke.into()))
            }
            Ok(Ok(composed)) => Ok(composed),
        }
    }

    async fn send(&self, head: &[u8]) -> Result<(), Broken> {
        let mut writer = self.client;
        write_both(&mut writer, head, &[], |_| ()).await.map_err(|_| Broken::Aborted)
    }

    fn flow_down(&self, is_unchunked: bool) -> Flow<'_> {
        let limits = &self.worker.config.limits;
        Flow {
            worker: self.worker,
            watch: self.watch,
            read: (Phase::Stream, limits.stream_timeout_s),
            write: (Phase::Send, limits.send_timeout_s),
            count: &self.worker.counters.bytes_down,
            sandbox: self.forward.sandbox.as_deref(),
            is_up: false,
            bytes_max: u64::MAX,
            is_unchunked,
            has_sent: &self.watch.is_answering,
            pace: Pace::default(),
        }
    }

    async fn pass_body(
        &self,
        response: &Response,
        answer: Reply<'_>,
        head: &[u8],
        reply: &mut Inbox,
    ) -> Result<(), Broken> {
        let flow = self.flow_down(answer.is_unchunked);
        let mut body = Body::new(response.framing);
        let (mut reader, mut writer) = (&self.upstream, self.client);
        // Whatever goes wrong now, the client has the head already.
        pump(&flow, head, &mut body, reply, &mut reader, &mut writer).await.map_err(|_| Broken::Aborted)
    }
}
