//! The body of a request on its way into a file, see [`crate::streams::upload`].

use std::cell::Cell;
use std::future::poll_fn;
use std::task::Poll;

use tokio::io::{AsyncRead, AsyncWrite};

use super::Broken;
use crate::buf::Inbox;
use crate::http::body::{Body, Piece};
use crate::net::{Shared, write_both};
use crate::pace::Pace;
use crate::prepare::{Forward, Sending};
use crate::pump::Flow;
use crate::streams::counters::Open;
use crate::streams::machine::Trouble;
use crate::streams::report;
use crate::streams::upload::{Upload, Wanted};
use crate::watch::{Phase, Watch};
use crate::worker::Worker;

const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Receives the body as ordered. What the API is to be told, and whether nothing of the body is left.
pub(super) async fn receive<C: AsyncRead + AsyncWrite + Unpin>(
    worker: &Worker,
    watch: &Watch,
    client: &Shared<C>,
    inbox: &mut Inbox,
    forward: &Forward,
    wanted: Wanted,
) -> Result<(String, bool), Broken> {
    let upload = match Upload::open(&worker.config.hostd_path(), &wanted).await {
        Ok(upload) => upload,
        Err(trouble) => return Ok((report::failed(&trouble), false)),
    };
    if forward.sending == (Sending::Held { expects_continue: true }) {
        watch.down.set(Phase::Send, worker.after(worker.config.limits.send_timeout_s));
        let mut writer = client;
        write_both(&mut writer, CONTINUE, b"", |_| ()).await.map_err(|_| Broken::Aborted)?;
        watch.down.clear();
    }
    let counters = &worker.counters.streams;
    let _open = Open::new(&counters.files);
    let limits = &worker.config.limits;
    let flow = Flow {
        worker,
        watch,
        read: (Phase::Body, limits.body_timeout_s),
        write: (Phase::Push, limits.send_timeout_s),
        count: &counters.file_bytes_up,
        sandbox: None,
        is_up: true,
        bytes_max: wanted.bytes_max,
        is_unchunked: false,
        has_sent: &Cell::new(false),
        pace: Pace::default(),
    };
    let body = Body::new(forward.framing);
    let mut reception = Reception { flow, client, inbox, body, upload, piece: 0, received: 0 };
    let received = reception.run().await;
    watch.up.clear();
    let is_read = reception.body.is_done() && reception.piece == 0;
    match received {
        Ok(reply) => Ok((reply, is_read)),
        Err(Stop::Trouble(trouble)) => Ok((report::failed(&trouble), is_read)),
        Err(Stop::Broken(broken)) => Err(broken),
    }
}

/// Why it goes no further.
enum Stop {
    /// The API is to be told.
    Trouble(Trouble),
    /// The client, or nobody.
    Broken(Broken),
}

impl From<Trouble> for Stop {
    fn from(trouble: Trouble) -> Self {
        Self::Trouble(trouble)
    }
}

/// What it has to wait for.
enum Need {
    /// More of the body.
    Client,
    /// Room for it.
    Room,
    /// The last word.
    Reply,
}

struct Reception<'a, C> {
    flow: Flow<'a>,
    client: &'a Shared<C>,
    inbox: &'a mut Inbox,
    body: Body,
    upload: Upload,
    /// Content in the inbox.
    piece: usize,
    received: u64,
}

impl<C: AsyncRead + Unpin> Reception<'_, C> {
    async fn run(&mut self) -> Result<String, Stop> {
        let mut is_ended = false;
        loop {
            if let Some(reply) = self.upload.answer()? {
                return Ok(report::replied(&reply));
            }
            let need = if is_ended { Need::Reply } else { self.pass()? };
            if matches!(need, Need::Reply) && !is_ended {
                is_ended = true;
                self.upload.end();
            }
            self.wait(&need).await?;
        }
    }

    /// Passes on what is here, as far as there is room.
    fn pass(&mut self) -> Result<Need, Stop> {
        loop {
            if self.piece > 0 {
                let count = self.piece.min(self.upload.room());
                if count == 0 {
                    return Ok(Need::Room);
                }
                self.upload.put(&self.inbox.data()[..count]);
                self.flow.count.add(count as u64);
                self.inbox.consume(count);
                self.piece -= count;
                continue;
            }
            let next = self.body.next(self.inbox.data());
            match next.map_err(|error| Stop::Broken(Broken::Failed(error.into())))? {
                Piece::Content(count) => {
                    self.piece = count;
                    self.received += count as u64;
                    let bytes_max = self.flow.bytes_max;
                    if self.received > bytes_max {
                        let message = format!("The body may have at most {bytes_max} bytes");
                        return Err(Trouble::new("too_large", &message).into());
                    }
                }
                Piece::Framing(count) | Piece::Trailers(count) => self.inbox.consume(count),
                Piece::More => return Ok(Need::Client),
                Piece::End => return Ok(Need::Reply),
            }
        }
    }

    async fn wait(&mut self, need: &Need) -> Result<(), Stop> {
        let worker = self.flow.worker;
        self.flow.wait(match need {
            Need::Client => self.flow.read,
            Need::Room => self.flow.write,
            Need::Reply => (Phase::Response, worker.config.limits.api_response_timeout_s),
        });
        let since_ms = worker.now_ms();
        let mut reader = self.client;
        poll_fn(|cx| {
            if matches!(need, Need::Client)
                && let Poll::Ready(filled) = self.inbox.poll_fill(cx, &mut reader)
            {
                let count = filled.unwrap_or(0);
                self.flow.judge(count, since_ms);
                return Poll::Ready(if count > 0 { Ok(()) } else { Err(Stop::Broken(Broken::Aborted)) });
            }
            self.upload.poll(cx).map(Ok)
        })
        .await
    }
}
