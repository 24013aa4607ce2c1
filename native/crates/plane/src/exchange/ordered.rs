//! Answers of the API that order a stream, see [`crate::streams`].

use http::StatusCode;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Answered, Attempt, Broken, Download};
use crate::buf::{HeadBuf, Inbox};
use crate::compose::Reply;
use crate::config::duration;
use crate::failure::Code;
use crate::http::Framing;
use crate::http::body::{Body, Piece};
use crate::http::fields::{Field, Name};
use crate::http::response::{self, Response};
use crate::prepare::Sending;
use crate::pump::Flow;
use crate::streams::backlog;
use crate::streams::counters::Open;
use crate::streams::file::File;
use crate::streams::hub::Joining;
use crate::streams::order::{self, Order, Selection};
use crate::streams::output::Output;
use crate::streams::report;
use crate::streams::wanted::Refusal;

/// Largest body of an order; what it orders has to fit into a frame.
const ORDER_BYTES_MAX: usize = 8 * 1024 * 1024;

impl<C: AsyncRead + AsyncWrite + Unpin> Attempt<'_, C> {
    /// What the API orders, if it does: only it can. An answer to `HEAD` has nothing to follow, one to a report ends it.
    pub(super) fn order(&self, head: &[u8], fields: &[Field], response: &Response) -> Result<Option<Order>, ()> {
        if self.forward.address.is_some() || response.framing == Framing::None {
            return Ok(None);
        }
        let order = order::find(head, fields).transpose().map_err(|error| {
            crate::log::warning("an order of the API is no good", &error);
        })?;
        let is_possible = match order {
            Some(Order::Upload) => self.forward.sending.is_held(),
            Some(Order::File) => self.forward.sending != Sending::Report,
            // They go out in the chunks of the answer that orders them.
            Some(Order::Events(_) | Order::Output) => response.framing == Framing::Chunked,
            None => true,
        };
        if is_possible { Ok(order) } else { Err(()) }
    }

    /// Carries out an order whose body says more. `head` is the API's, `out` the client's.
    pub(super) async fn obey(
        &self,
        order: &Order,
        head: Vec<u8>,
        out: &[u8],
        response: Response,
        answer: Reply<'_>,
        mut reply: Inbox,
    ) -> Result<Download, Broken> {
        self.watch.down.clear();
        let mut body = Body::new(response.framing);
        match order {
            Order::Upload => Ok(Download::Receive(Box::new(self.read_order(&mut body, &mut reply).await?))),
            Order::File => {
                let wanted = self.read_order(&mut body, &mut reply).await?;
                match File::open(&self.worker.config.hostd_path(), wanted).await {
                    Ok(file) => self.pass_file(file, &head, reply).await.map(Download::Answered),
                    Err(trouble) => Ok(Download::Report(report::failed(&trouble))),
                }
            }
            _ => {
                let wanted = self.read_order(&mut body, &mut reply).await?;
                match Output::start(&self.worker.config.hostd_path(), wanted).await {
                    Ok(output) => self.pass_output(output, out, response, answer, reply).await,
                    Err(refusal) => self.refuse_output(&head, &refusal, reply).await,
                }
                .map(Download::Answered)
            }
        }
    }

    /// Sends the backlog, after which the client joins the subscribers.
    pub(super) async fn pass_backlog(
        &self,
        selection: Selection,
        response: &Response,
        answer: Reply<'_>,
        head: &[u8],
        reply: &mut Inbox,
    ) -> Result<Box<Joining>, Broken> {
        let is_unchunked = answer.is_unchunked;
        let flow = self.flow_down(is_unchunked);
        let mut body = Body::new(response.framing);
        let (mut reader, mut writer) = (&self.upstream, self.client);
        let passed = backlog::pass(&flow, head, &mut body, reply, &mut reader, &mut writer).await;
        let cursor = passed.map_err(|_| Broken::Aborted)?;
        Ok(Box::new(Joining { selection, cursor, is_unchunked }))
    }

    /// Has the process's output flow.
    async fn pass_output(
        &self,
        output: Output,
        out: &[u8],
        response: Response,
        answer: Reply<'_>,
        reply: Inbox,
    ) -> Result<Answered, Broken> {
        let config = &self.worker.config;
        self.watch.is_answering.set(true);
        let counters = &self.worker.counters.streams;
        let _open = Open::new(&counters.outputs);
        let flow = Flow { count: &counters.output_bytes, ..self.flow_down(answer.is_unchunked) };
        let heartbeat = duration(config.limits.stream_heartbeat_s);
        let mut writer = self.client;
        let relayed = output.relay(&config.hostd_path(), &flow, out, &mut writer, heartbeat).await;
        relayed.map_err(|_| Broken::Aborted)?;
        let Reply { is_keep_alive, is_switch, .. } = answer;
        Ok(Answered { response, reply, is_keep_alive, is_switch, joining: None })
    }

    /// Sends the file, with what the API says about it and what only whoever has opened it knows.
    async fn pass_file(&self, file: File, head: &[u8], reply: Inbox) -> Result<Answered, Broken> {
        let head = self.changed_head(head, file.status(), &file.fields())?;
        let mut out = HeadBuf::take();
        let (response, answer, _) = self.compose(&head, &mut out)?;
        self.watch.answer(self.worker.now_us());
        let counters = &self.worker.counters.streams;
        let _open = Open::new(&counters.files);
        let flow = Flow { count: &counters.file_bytes_down, ..self.flow_down(false) };
        let mut writer = self.client;
        let relayed = file.relay(&self.worker.config.hostd_path(), &flow, &out.0, &mut writer).await;
        relayed.map_err(|_| Broken::Aborted)?;
        let Reply { is_keep_alive, is_switch, .. } = answer;
        Ok(Answered { response, reply, is_keep_alive, is_switch, joining: None })
    }

    /// Reads the body of an order.
    async fn read_order<T: DeserializeOwned>(&self, body: &mut Body, reply: &mut Inbox) -> Result<T, Broken> {
        let broken = || self.broken(Code::UpstreamBroke.into());
        let mut text = Vec::new();
        loop {
            let count = match body.next(reply.data()).map_err(|_| broken())? {
                Piece::Content(count) => {
                    text.extend_from_slice(&reply.data()[..count]);
                    count
                }
                Piece::Framing(count) | Piece::Trailers(count) => count,
                Piece::End => break,
                Piece::More => {
                    let mut reader = &self.upstream;
                    match reply.fill(&mut reader).await {
                        Ok(0) | Err(_) => return Err(broken()),
                        Ok(_) if text.len() > ORDER_BYTES_MAX => return Err(broken()),
                        Ok(_) => 0,
                    }
                }
            };
            reply.consume(count);
        }
        serde_json::from_slice(&text).map_err(|error| {
            crate::log::warning("an order of the API is no good", &error);
            broken()
        })
    }

    /// Answers with an error in the API's words, as if the API itself had.
    async fn refuse_output(&self, head: &[u8], refusal: &Refusal, reply: Inbox) -> Result<Answered, Broken> {
        let length = refusal.body.len();
        let fields = format!("Content-Length: {length}\r\nContent-Type: application/json\r\n");
        let head = self.changed_head(head, refusal.status, &fields)?;
        let mut out = HeadBuf::take();
        let (response, answer, _) = self.compose(&head, &mut out)?;
        self.watch.is_answering.set(true);
        out.0.extend_from_slice(&refusal.body);
        self.send(&out.0).await?;
        let Reply { is_keep_alive, is_switch, .. } = answer;
        Ok(Answered { response, reply, is_keep_alive, is_switch, joining: None })
    }

    /// The API's head with another status, and with these lines in place of those that say the same.
    fn changed_head(&self, head: &[u8], status: u16, lines: &str) -> Result<Vec<u8>, Broken> {
        let mut fields = self.worker.fields.take();
        let parsed = response::parse(head, false, &mut fields);
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let reason = status.canonical_reason().unwrap_or_default();
        let mut out = format!("HTTP/1.1 {} {reason}\r\n{lines}", status.as_str()).into_bytes();
        let names = || lines.lines().filter_map(|line| line.split(':').next());
        for field in &fields {
            let is_framing = matches!(field.name, Name::ContentLength | Name::TransferEncoding | Name::Private);
            let name = field.name(head);
            if !is_framing && !names().any(|changed| changed.as_bytes().eq_ignore_ascii_case(name)) {
                out.extend_from_slice(field.line(head));
            }
        }
        out.extend_from_slice(b"\r\n");
        self.worker.fields.replace(fields);
        parsed.map(|_| out).map_err(|_| self.broken(Code::UpstreamBroke.into()))
    }
}
