//! The answers the plane gives itself: typed failures, as JSON for programs and as a page for browsers.

use std::io::Write as _;
use std::rc::Rc;

use sandgate_hosts::access::Verdict;

use crate::policy::Terms;

/// What went wrong. The closed list; docs/previews.md explains each row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// No such preview.
    PreviewUnknown,
    /// The sandbox is not ready yet.
    SandboxStarting,
    /// The sandbox is paused, and requests do not wake it.
    SandboxPaused,
    /// It was not awake in time.
    WakeTimeout,
    /// It cannot be woken, as far as its host knows.
    WakeFailed,
    /// Too many requests wait for it already.
    TooManyWaiting,
    /// Nothing listens on the port.
    PortClosed,
    /// The sandbox was destroyed.
    SandboxGone,
    /// A private preview, and nothing was presented.
    TokenMissing,
    /// What was presented does not open this preview.
    TokenInvalid,
    /// What was presented has expired.
    TokenExpired,
    /// A page of this origin may not read the preview, or the API.
    OriginDenied,
    /// A limit on connections.
    TooManyConnections,
    /// The sandbox's server broke off, or spoke no HTTP.
    UpstreamBroke,
    /// It did not answer in time.
    UpstreamTimeout,
    /// The request is malformed.
    BadRequest,
    /// The client took too long.
    RequestTimeout,
    /// The request's head is too large.
    HeadTooLarge,
    /// The request's body is too large.
    BodyTooLarge,
    /// Not a method for a gateway.
    MethodUnsupported,
    /// Not HTTP/1.0 or 1.1.
    VersionUnsupported,
    /// The API is not there.
    ApiUnavailable,
}

/// The reason of status 503.
const UNAVAILABLE: &str = "Service Unavailable";

struct Row {
    code: &'static str,
    status: u16,
    reason: &'static str,
    retry_after_s: Option<u32>,
    message: &'static str,
}

/// Number of codes; indexes counters.
pub const CODES: usize = 22;

impl Code {
    /// Every code.
    pub const ALL: [Self; CODES] = [
        Self::PreviewUnknown,
        Self::SandboxStarting,
        Self::SandboxPaused,
        Self::WakeTimeout,
        Self::WakeFailed,
        Self::TooManyWaiting,
        Self::PortClosed,
        Self::SandboxGone,
        Self::TokenMissing,
        Self::TokenInvalid,
        Self::TokenExpired,
        Self::OriginDenied,
        Self::TooManyConnections,
        Self::UpstreamBroke,
        Self::UpstreamTimeout,
        Self::BadRequest,
        Self::RequestTimeout,
        Self::HeadTooLarge,
        Self::BodyTooLarge,
        Self::MethodUnsupported,
        Self::VersionUnsupported,
        Self::ApiUnavailable,
    ];

    fn row(self) -> Row {
        let row = |code, status, reason, retry_after_s, message| Row { code, status, reason, retry_after_s, message };
        match self {
            Self::PreviewUnknown => {
                row("preview_unknown", 404, "Not Found", None, "There is no preview at this address.")
            }
            Self::SandboxStarting => {
                row("sandbox_starting", 503, UNAVAILABLE, Some(1), "The sandbox is starting. Try again in a moment.")
            }
            Self::SandboxPaused => {
                row("sandbox_paused", 409, "Conflict", None, "This sandbox is paused. Resume it to open its preview.")
            }
            Self::WakeTimeout => {
                row("wake_timeout", 504, "Gateway Timeout", Some(1), "The sandbox did not wake up in time.")
            }
            Self::WakeFailed => row("wake_failed", 503, UNAVAILABLE, Some(1), "The sandbox does not wake up."),
            Self::TooManyWaiting => row(
                "too_many_waiting",
                503,
                UNAVAILABLE,
                Some(1),
                "Too many requests wait for this sandbox to wake up. Try again in a moment.",
            ),
            Self::PortClosed => {
                row("port_closed", 502, "Bad Gateway", None, "Nothing listens on this port of the sandbox.")
            }
            Self::SandboxGone => row("sandbox_gone", 410, "Gone", None, "This sandbox no longer exists."),
            Self::TokenMissing => row(
                "preview_token_missing",
                401,
                "Unauthorized",
                None,
                "This preview is private. Open it with a share link or a key.",
            ),
            Self::TokenInvalid => {
                row("preview_token_invalid", 403, "Forbidden", None, "This token or key does not open this preview.")
            }
            Self::TokenExpired => row(
                "preview_token_expired",
                403,
                "Forbidden",
                None,
                "This token or key has expired. Ask for a new link.",
            ),
            Self::OriginDenied => {
                row("origin_denied", 403, "Forbidden", None, "Pages of this origin may not read this address.")
            }
            Self::TooManyConnections => row(
                "too_many_connections",
                503,
                UNAVAILABLE,
                Some(1),
                "There are too many connections. Try again in a moment.",
            ),
            Self::UpstreamBroke => {
                row("upstream_broke", 502, "Bad Gateway", None, "The server in the sandbox broke off the connection.")
            }
            Self::UpstreamTimeout => row(
                "upstream_timeout",
                504,
                "Gateway Timeout",
                None,
                "The server in the sandbox did not answer in time.",
            ),
            Self::BadRequest => row("bad_request", 400, "Bad Request", None, "The request is malformed."),
            Self::RequestTimeout => {
                row("request_timeout", 408, "Request Timeout", None, "The request did not arrive in time.")
            }
            Self::HeadTooLarge => row(
                "head_too_large",
                431,
                "Request Header Fields Too Large",
                None,
                "The request's header is too large.",
            ),
            Self::BodyTooLarge => {
                row("body_too_large", 413, "Content Too Large", None, "The request's body is too large for a preview.")
            }
            Self::MethodUnsupported => {
                row("method_unsupported", 501, "Not Implemented", None, "This method is not supported.")
            }
            Self::VersionUnsupported => row(
                "version_unsupported",
                505,
                "HTTP Version Not Supported",
                None,
                "This HTTP version is not supported.",
            ),
            Self::ApiUnavailable => {
                row("api_unavailable", 503, UNAVAILABLE, Some(1), "The API is not available. Try again in a moment.")
            }
        }
    }

    /// The code as clients see it.
    pub fn name(self) -> &'static str {
        self.row().code
    }

    /// The HTTP status.
    pub fn status(self) -> u16 {
        self.row().status
    }
}

/// A failure with what is known of its cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What went wrong.
    pub code: Code,
    /// A sentence that says more than the code's own.
    pub detail: Option<&'static str>,
    /// When to try again, where the code's own advice does not hold.
    pub retry_after_s: Option<u32>,
}

impl Failure {
    /// A failure in other words than the code's own.
    pub fn with_detail(code: Code, detail: &'static str) -> Self {
        Self { detail: Some(detail), ..code.into() }
    }
}

impl From<Code> for Failure {
    fn from(code: Code) -> Self {
        Self { code, detail: None, retry_after_s: None }
    }
}

impl From<Verdict> for Failure {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Missing => Code::TokenMissing.into(),
            Verdict::Expired => Code::TokenExpired.into(),
            Verdict::OutOfScope => {
                Self::with_detail(Code::TokenInvalid, "This token is for another port or path of the sandbox.")
            }
            Verdict::Invalid | Verdict::Open => Code::TokenInvalid.into(),
        }
    }
}

/// How a failure is to be told.
#[derive(Clone, Default)]
pub struct Audience {
    /// A browser: a page instead of JSON.
    pub is_browser: bool,
    /// A `HEAD` request: no body.
    pub is_head: bool,
    /// The connection stays open after it.
    pub is_keep_alive: bool,
    /// What other sites may do with it.
    pub terms: Option<Rc<Terms>>,
}

impl Failure {
    /// The whole response.
    pub fn render(&self, audience: &Audience, request_id: &str) -> Vec<u8> {
        let row = self.row();
        let message = self.detail.unwrap_or(row.message);
        let body = if audience.is_browser { page(&row, message, request_id) } else { json(&row, message, request_id) };
        let kind = if audience.is_browser { "text/html; charset=utf-8" } else { "application/json" };
        let mut out = Vec::with_capacity(body.len() + 512);
        // Writing to memory does not fail.
        let _ = write!(
            out,
            "HTTP/1.1 {} {}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nCache-Control: no-store\r\nX-Request-Id: {request_id}\r\n",
            row.status,
            row.reason,
            body.len()
        );
        if let Some(seconds) = row.retry_after_s {
            let _ = write!(out, "Retry-After: {seconds}\r\n");
        }
        if row.status == 401 {
            out.extend_from_slice(b"WWW-Authenticate: Bearer realm=\"preview\"\r\n");
        }
        if audience.is_browser {
            out.extend_from_slice(b"Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'\r\n");
        }
        if let Some(terms) = &audience.terms {
            terms.push_own(&mut out);
        }
        if !audience.is_keep_alive {
            out.extend_from_slice(b"Connection: close\r\n");
        }
        out.extend_from_slice(b"\r\n");
        if !audience.is_head {
            out.extend_from_slice(body.as_bytes());
        }
        out
    }

    fn row(&self) -> Row {
        let row = self.code.row();
        Row { retry_after_s: self.retry_after_s.or(row.retry_after_s), ..row }
    }
}

fn json(row: &Row, message: &str, request_id: &str) -> String {
    let mut error = serde_json::json!({"code": row.code, "message": message, "request_id": request_id});
    if let Some(seconds) = row.retry_after_s {
        error["retry_after"] = seconds.into();
    }
    let mut body = error.clone();
    body["error"] = error;
    body.to_string()
}

fn page(row: &Row, message: &str, request_id: &str) -> String {
    let reload = if row.code == "sandbox_starting" { "<meta http-equiv=\"refresh\" content=\"2\">" } else { "" };
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">{reload}\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{status} {reason}</title><style>\
         body{{font:16px/1.5 system-ui,sans-serif;max-width:36rem;margin:15vh auto;padding:0 1rem;color:#222;background:#fff}}\
         h1{{font-size:1.4rem}}code,small{{color:#666}}\
         @media(prefers-color-scheme:dark){{body{{color:#ddd;background:#181818}}}}</style></head>\n\
         <body><h1>{message}</h1><p><code>{code}</code></p><small>{status} {reason} · {request_id}</small></body></html>\n",
        status = row.status,
        reason = row.reason,
        code = row.code,
    )
}
