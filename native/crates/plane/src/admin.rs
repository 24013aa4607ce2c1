//! The admin listener: `/healthz`, `/readyz`, `/metrics`. For operators; never exposed to strangers.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::time::timeout;

use crate::busiest::Busiest;
use crate::config::Config;
use crate::http::body::{Body, Piece};
use crate::http::{find_end, request, response};
use crate::metrics::Metrics;
use crate::table::Table;

/// For a request to arrive and for its answer to be taken.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);
/// For the API to answer.
const API_TIMEOUT: Duration = Duration::from_secs(3);
const HEAD_BYTES_MAX: usize = 8 * 1024;
const API_BYTES_MAX: usize = 16 * 1024 * 1024;

/// What the admin listener tells about.
pub struct Admin {
    table: Arc<Table>,
    metrics: Arc<Metrics>,
    api_socket: PathBuf,
    busiest: RefCell<Busiest>,
    sandboxes_max: usize,
}

struct Page {
    status: &'static str,
    kind: &'static str,
    body: Vec<u8>,
}

fn text(status: &'static str, body: impl Into<Vec<u8>>) -> Page {
    Page { status, kind: "text/plain; charset=utf-8", body: body.into() }
}

impl Admin {
    /// A listener that has not begun.
    pub fn new(table: Arc<Table>, metrics: Arc<Metrics>, config: &Config) -> Self {
        let (api_socket, sandboxes_max) = (config.api_socket.clone(), config.metric_sandboxes_max);
        Self { table, metrics, api_socket, busiest: RefCell::default(), sandboxes_max }
    }

    /// Serves for ever.
    pub async fn serve(self: Rc<Self>, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let admin = Rc::clone(&self);
                    tokio::task::spawn_local(async move {
                        // A client that does not come to the point is dropped.
                        let _ = timeout(CLIENT_TIMEOUT, admin.connection(stream)).await;
                    });
                }
                Err(error) => {
                    crate::log::warning("admin accept failed", &error);
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    /// One request, one answer.
    async fn connection(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut head = Vec::with_capacity(1024);
        let page = loop {
            match find_end(&head, 0, HEAD_BYTES_MAX) {
                Ok(Some(len)) => break self.page(&head[..len]).await,
                Ok(None) => {}
                Err(error) => break text("400 Bad Request", error.to_string()),
            }
            if stream.read_buf(&mut head).await? == 0 {
                return Ok(());
            }
        };
        let head = format!(
            "HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n",
            page.status,
            page.kind,
            page.body.len()
        );
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(&page.body).await?;
        stream.shutdown().await
    }

    async fn page(&self, head: &[u8]) -> Page {
        let request = match request::parse(head, &mut Vec::new()) {
            Ok(request) => request,
            Err(error) => return text("400 Bad Request", error.to_string()),
        };
        if &head[request.method] != b"GET" {
            return text("405 Method Not Allowed", "GET only\n");
        }
        match &head[request.target] {
            b"/healthz" => text("200 OK", "ok\n"),
            b"/readyz" => self.readiness().await,
            b"/metrics" => self.metrics().await,
            _ => text("404 Not Found", "/healthz, /readyz or /metrics\n"),
        }
    }

    /// Ready when the API says that it is.
    async fn readiness(&self) -> Page {
        match self.ask_api("/readyz").await {
            Some((200, body)) => text("200 OK", body),
            Some((_, body)) => text("503 Service Unavailable", body),
            None => text("503 Service Unavailable", "the API does not answer\n"),
        }
    }

    /// Our own figures and, if it answers, the API's.
    async fn metrics(&self) -> Page {
        let mut figures = self.metrics.render(&self.table);
        self.busiest.borrow_mut().write(&mut figures, &self.table, self.sandboxes_max);
        let mut body = figures.into_bytes();
        let api = self.ask_api("/metrics").await.filter(|(status, _)| *status == 200);
        let up = format!(
            "# HELP sandgate_plane_api_up Whether the API answers.\n# TYPE sandgate_plane_api_up gauge\nsandgate_plane_api_up {}\n",
            u8::from(api.is_some())
        );
        body.extend_from_slice(up.as_bytes());
        if let Some((_, figures)) = api {
            body.extend_from_slice(&figures);
        }
        Page { status: "200 OK", kind: "text/plain; version=0.0.4; charset=utf-8", body }
    }

    async fn ask_api(&self, path: &str) -> Option<(u16, Vec<u8>)> {
        timeout(API_TIMEOUT, fetch(&self.api_socket, path)).await.ok()?.ok().flatten()
    }
}

/// One GET; none if the answer is no HTTP.
async fn fetch(socket: &Path, path: &str) -> std::io::Result<Option<(u16, Vec<u8>)>> {
    let mut stream = UnixStream::connect(socket).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nX-Sandgate-Admin: 1\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    while answer.len() < API_BYTES_MAX && stream.read_buf(&mut answer).await? > 0 {
        if let Some(whole) = whole_answer(&answer, false) {
            return Ok(Some(whole));
        }
    }
    Ok(whole_answer(&answer, true))
}

/// Status and content of an answer that is complete; `is_closed`: nothing follows.
fn whole_answer(answer: &[u8], is_closed: bool) -> Option<(u16, Vec<u8>)> {
    let head_len = find_end(answer, 0, HEAD_BYTES_MAX).ok()??;
    let response = response::parse(&answer[..head_len], false, &mut Vec::new()).ok()?;
    let (mut body, mut rest, mut content) = (Body::new(response.framing), &answer[head_len..], Vec::new());
    loop {
        let count = match body.next(rest).ok()? {
            Piece::Content(count) => {
                content.extend_from_slice(&rest[..count]);
                count
            }
            Piece::Framing(count) | Piece::Trailers(count) => count,
            Piece::End => return Some((response.status, content)),
            Piece::More => return (is_closed && body.may_end_by_close()).then_some((response.status, content)),
        };
        rest = &rest[count..];
    }
}

/// Opens the listener.
pub fn listen(address: SocketAddr) -> std::io::Result<std::net::TcpListener> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
