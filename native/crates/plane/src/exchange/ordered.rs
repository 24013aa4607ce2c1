//! Answers of the API that order a stream, see [`crate::streams`].

use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Answered, Attempt, Broken};
use crate::buf::{HeadBuf, Inbox};
use crate::compose::Reply;
use crate::config::duration;
use crate::failure::Code;
use crate::http::Framing;
use crate::http::body::{Body, Piece};
use crate::http::fields::{Field, Name};
use crate::http::response::{self, Response};
use crate::pump::Flow;
use crate::streams::backlog;
use crate::streams::counters::OpenOutput;
use crate::streams::hub::Joining;
use crate::streams::order::{self, Order, Selection};
use crate::streams::output::Output;
use crate::streams::wanted::{Refusal, Wanted};

/// Largest body of an order; what it orders has to fit into a frame.
const ORDER_BYTES_MAX: usize = 8 * 1024 * 1024;

impl<C: AsyncRead + AsyncWrite + Unpin> Attempt<'_, C> {
    /// What the API orders, if it does: only it can. An answer to `HEAD` has nothing to follow.
    pub(super) fn order(&self, head: &[u8], fields: &[Field], response: &Response) -> Result<Option<Order>, ()> {
        if self.forward.address.is_some() || response.framing != Framing::Chunked {
            return Ok(None);
        }
        order::find(head, fields).transpose().map_err(|error| {
            crate::log::warning("an order of the API is no good", &error);
        })
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

    /// Has the process's output flow, or tells why it cannot. `head` is the API's, `out` the client's.
    pub(super) async fn pass_output(
        &self,
        head: Vec<u8>,
        out: &[u8],
        response: Response,
        answer: Reply<'_>,
        mut reply: Inbox,
    ) -> Result<Answered, Broken> {
        self.watch.down.clear();
        let mut body = Body::new(response.framing);
        let wanted = self.read_order(&mut body, &mut reply).await?;
        let config = &self.worker.config;
        let socket = config.hostd_path();
        let Reply { is_keep_alive, is_switch, .. } = answer;
        let output = match Output::start(&socket, wanted).await {
            Ok(output) => output,
            Err(refusal) => return self.refuse_output(&head, &refusal, reply).await,
        };
        self.watch.is_answering.set(true);
        let counters = &self.worker.counters.streams;
        let _open = OpenOutput::new(counters);
        let flow = Flow { count: &counters.output_bytes, ..self.flow_down(answer.is_unchunked) };
        let heartbeat = duration(config.limits.stream_heartbeat_s);
        let mut writer = self.client;
        let relayed = output.relay(&socket, &flow, out, &mut writer, heartbeat).await;
        relayed.map_err(|_| Broken::Aborted)?;
        Ok(Answered { response, reply, is_keep_alive, is_switch, joining: None })
    }

    /// Reads the body of an order.
    async fn read_order(&self, body: &mut Body, reply: &mut Inbox) -> Result<Wanted, Broken> {
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
        let head = self.error_head(head, refusal)?;
        let mut out = HeadBuf::take();
        let (response, answer, _) = self.compose(&head, &mut out)?;
        self.watch.is_answering.set(true);
        out.0.extend_from_slice(&refusal.body);
        self.send(&out.0).await?;
        let Reply { is_keep_alive, is_switch, .. } = answer;
        Ok(Answered { response, reply, is_keep_alive, is_switch, joining: None })
    }

    /// The API's head with another status and type of content.
    fn error_head(&self, head: &[u8], refusal: &Refusal) -> Result<Vec<u8>, Broken> {
        let mut fields = self.worker.fields.take();
        let parsed = response::parse(head, false, &mut fields);
        let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let reason = status.canonical_reason().unwrap_or_default();
        let length = refusal.body.len();
        let mut out = format!("HTTP/1.1 {} {reason}\r\nContent-Length: {length}\r\n", status.as_str()).into_bytes();
        out.extend_from_slice(b"Content-Type: application/json\r\n");
        for field in &fields {
            let is_replaced = matches!(field.name, Name::ContentLength | Name::TransferEncoding | Name::Private)
                || field.name(head).eq_ignore_ascii_case(b"content-type");
            if !is_replaced {
                out.extend_from_slice(field.line(head));
            }
        }
        out.extend_from_slice(b"\r\n");
        self.worker.fields.replace(fields);
        parsed.map(|_| out).map_err(|_| self.broken(Code::UpstreamBroke.into()))
    }
}
