//! From a request's head to a plan: where it goes, or which answer it gets. No waiting happens here.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use sandgate_hosts::access::{AGENT_PORT, Wanted};
use sandgate_hosts::host::{self, HostName, SandboxName};

use crate::admit::{Admission, COOKIE, Credentials};
use crate::buf::HeadBuf;
use crate::compose::{self, Peer};
use crate::failure::{Audience, Code, Failure};
use crate::http::fields::{Field, Name, members};
use crate::http::request::{self, Request};
use crate::http::{Framing, HeadError};
use crate::metrics::Class;
use crate::policy::{Policy, Terms, Visit};
use crate::pool::Target;
use crate::table::{Found, Live, Sandbox, State};
use crate::trust;
use crate::worker::Worker;

/// A body for the API from this size on is held back: smaller ones cost less to pass on than to ask about.
const HELD_BYTES_MIN: u64 = 256 * 1024;

/// The port that an `https` address need not name.
const HTTPS_PORT: u16 = 443;

/// What becomes of a request.
pub enum Decision {
    /// This.
    Now(Plan),
    /// To be decided again when the sandbox is awake.
    Hold(Hold),
}

/// What to do with a request.
pub enum Plan {
    /// Pass it on.
    Forward(Box<Forward>),
    /// Answer it.
    Answer(Answer),
}

/// A request for a sandbox that sleeps.
pub struct Hold {
    /// The sandbox.
    pub sandbox: Arc<Sandbox>,
    /// For failures further on.
    pub audience: Audience,
    /// How the body is delimited.
    pub framing: Framing,
}

impl Hold {
    /// What to answer instead.
    pub fn refused(self, failure: impl Into<Failure>) -> Answer {
        let kind = AnswerKind::Failure(failure.into());
        Answer { class: Class::Preview, kind, audience: self.audience, framing: self.framing }
    }
}

/// An answer of our own.
pub struct Answer {
    /// Where the request would have gone.
    pub class: Class,
    /// What to say.
    pub kind: AnswerKind,
    /// To whom.
    pub audience: Audience,
    /// How the request's body, which nobody will read, is delimited.
    pub framing: Framing,
}

/// What an answer says.
pub enum AnswerKind {
    /// That the request failed.
    Failure(Failure),
    /// Something else, such as a redirect: the whole response.
    Whole {
        /// Its status.
        status: u16,
        /// All of its bytes; it has no body.
        head: Vec<u8>,
    },
}

/// A request to be passed on.
pub struct Forward {
    /// Where to.
    pub target: Target,
    /// The sandbox's address, none for the API.
    pub address: Option<SocketAddr>,
    /// The head for the upstream.
    pub head: HeadBuf,
    /// How the body is delimited.
    pub framing: Framing,
    /// 1 for a client of HTTP/1.1.
    pub minor: u8,
    /// The client will use the connection again.
    pub is_keep_alive: bool,
    /// It asks for another protocol.
    pub is_upgrade: bool,
    /// Sending it twice does no harm.
    pub is_replayable: bool,
    /// To whom the answer goes.
    pub audience: Audience,
    /// The sandbox, none for the API.
    pub sandbox: Option<Arc<Sandbox>>,
    /// Why it was let in.
    pub admission: Option<Admission>,
    /// Its place among the sandbox's requests.
    pub slot: Option<Slot>,
    /// When the upstream gets the body.
    pub sending: Sending,
}

/// When the upstream gets the body of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sending {
    /// As it comes.
    AtOnce,
    /// Once the API asks for it.
    Held {
        /// The client does not send it before it is told to go on.
        expects_continue: bool,
    },
    /// Never: the request tells the API what came of its order.
    Report,
}

impl Sending {
    /// Whether the body is held back.
    pub fn is_held(self) -> bool {
        matches!(self, Self::Held { .. })
    }
}

impl Forward {
    /// Becomes the request that tells the API what came of its order. `is_read`: nothing of the body is left.
    pub fn report(&mut self, line: &str, is_read: bool) {
        self.push_line(line);
        self.framing = Framing::None;
        self.is_keep_alive &= is_read;
        self.is_replayable = true;
        self.sending = Sending::Report;
    }

    /// Has the API decide about the body before it comes.
    fn hold(&mut self, expects_continue: bool) {
        if !expects_continue {
            self.push_line("Expect: 100-continue\r\n");
        }
        self.push_line("X-Sandgate-Body: held\r\n");
        self.sending = Sending::Held { expects_continue };
    }

    /// Adds a header line to the head.
    fn push_line(&mut self, line: &str) {
        let head = &mut self.head.0;
        head.truncate(head.len() - b"\r\n".len());
        head.extend_from_slice(line.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
}

/// A place among the requests in flight to a sandbox; free again when dropped.
pub struct Slot(Arc<Live>);

impl Slot {
    fn take(sandbox: &Sandbox, max: u32) -> Option<Self> {
        let slot = Self(Arc::clone(&sandbox.live));
        (slot.0.in_flight.fetch_add(1, Ordering::Relaxed) < max).then_some(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl From<HeadError> for Failure {
    fn from(error: HeadError) -> Self {
        match error {
            HeadError::Malformed(what) => Self::with_detail(Code::BadRequest, what),
            HeadError::TooLarge => Code::HeadTooLarge.into(),
            HeadError::Version => Code::VersionUnsupported.into(),
            HeadError::Method => Code::MethodUnsupported.into(),
        }
    }
}

/// Decides what to do with the request whose complete head this is. An error means that nothing more can be read from
/// its connection.
pub fn prepare(worker: &Worker, peer: &Peer, head: &[u8], fields: &mut Vec<Field>) -> Result<Decision, Failure> {
    let request = request::parse(head, fields)?;
    if fields.len() > worker.config.limits.head_fields_max as usize {
        return Err(Code::HeadTooLarge.into());
    }
    let told = peer.is_trusted.then(|| trust::client_of(&worker.config.trusted_proxy, peer, head, fields));
    let peer = told.as_ref().unwrap_or(peer);
    let name = HostName::parse(&head[request.host.clone()])
        .map_err(|_| Failure::with_detail(Code::BadRequest, "The Host header does not hold a host name."))?;
    let mut draft = Draft { worker, peer, head, fields, request: &request, terms: None };
    if let Some(port) = worker.config.https_redirect.filter(|_| !peer.is_secure()) {
        let kind = AnswerKind::Whole { status: 308, head: draft.to_https(name.as_str(), port) };
        return Ok(draft.answer(Class::None, kind));
    }
    let (class, outcome) = match host::classify(name.as_str(), &worker.config.domain) {
        host::Target::Api => (Class::Api, draft.plan_for_api()),
        host::Target::Reserved => (Class::Preview, Err(AnswerKind::Failure(Code::PreviewUnknown.into()))),
        host::Target::Preview { port, sandbox } => (Class::Preview, draft.plan_for_preview(port, sandbox)),
    };
    Ok(match outcome {
        Ok(decision) => decision,
        Err(kind) => draft.answer(class, kind),
    })
}

struct Draft<'a> {
    worker: &'a Worker,
    peer: &'a Peer,
    head: &'a [u8],
    fields: &'a [Field],
    request: &'a Request,
    /// What other sites may do with the answer, once that is known.
    terms: Option<Rc<Terms>>,
}

impl Draft<'_> {
    fn method(&self) -> &[u8] {
        &self.head[self.request.method.clone()]
    }

    fn target(&self) -> &[u8] {
        &self.head[self.request.target.clone()]
    }

    fn value_of(&self, name: Name) -> Option<&[u8]> {
        self.fields.iter().find(|field| field.name == name).map(|field| field.value(self.head))
    }

    fn audience(&self) -> Audience {
        let is_html = |range: &[u8]| range.len() >= 9 && range[..9].eq_ignore_ascii_case(b"text/html");
        Audience {
            is_browser: self.value_of(Name::Accept).is_some_and(|accept| members(accept).any(is_html)),
            is_head: self.method() == b"HEAD",
            is_keep_alive: self.request.is_keep_alive && self.request.framing == Framing::None,
            terms: self.terms.clone(),
        }
    }

    fn answer(&self, class: Class, kind: AnswerKind) -> Decision {
        let answer = Answer { class, kind, audience: self.audience(), framing: self.request.framing };
        Decision::Now(Plan::Answer(answer))
    }

    fn plan_for_api(&mut self) -> Result<Decision, AnswerKind> {
        self.agree_on(self.worker.api_policy.as_deref())?;
        let mut forward = self.forward(Target::Api, None);
        if self.is_large() {
            forward.hold(self.request.minor == 1 && self.value_of(Name::Expect).is_some());
        }
        Ok(Decision::Now(Plan::Forward(Box::new(forward))))
    }

    /// Whether the body is, or may be, worth a question ahead of it.
    fn is_large(&self) -> bool {
        match self.request.framing {
            Framing::Length(length) => length >= HELD_BYTES_MIN,
            framing => framing == Framing::Chunked,
        }
    }

    /// Applies a policy; an answer if the request is a question about it.
    fn agree_on(&mut self, policy: Option<&Policy>) -> Result<(), AnswerKind> {
        let Some(policy) = policy else { return Ok(()) };
        let value_of = |name: &str| {
            let mut fields = self.fields.iter();
            fields.find(|field| field.name(self.head).eq_ignore_ascii_case(name.as_bytes()))
        };
        let value_of = |name: &str| value_of(name).map(|field| field.value(self.head));
        let visit = Visit {
            origin: value_of("origin"),
            wanted_method: value_of("access-control-request-method").filter(|_| self.method() == b"OPTIONS"),
            wanted_fields: value_of("access-control-request-headers"),
        };
        let terms = Some(Rc::new(policy.terms(&visit)));
        let preflight = policy.preflight(&visit);
        self.terms = terms;
        match preflight {
            None => Ok(()),
            Some(Err(())) => Err(AnswerKind::Failure(Code::OriginDenied.into())),
            Some(Ok(mut head)) => {
                if !self.request.is_keep_alive {
                    head.extend_from_slice(b"Connection: close\r\n");
                }
                head.extend_from_slice(b"\r\n");
                Err(AnswerKind::Whole { status: 204, head })
            }
        }
    }

    fn plan_for_preview(&mut self, port: u16, name: SandboxName<'_>) -> Result<Decision, AnswerKind> {
        let failure = |code: Code| AnswerKind::Failure(code.into());
        if port == AGENT_PORT {
            return Err(failure(Code::PreviewUnknown));
        }
        let sandbox = match self.worker.table.find(name) {
            Found::Sandbox(sandbox) => sandbox,
            Found::Gone => return Err(failure(Code::SandboxGone)),
            Found::Unknown => return Err(failure(Code::PreviewUnknown)),
        };
        // A preflight request shows no credentials.
        self.agree_on(sandbox.port(port).and_then(|rule| rule.policy.as_ref()))?;
        let (path, query) = compose::split_query(self.target());
        let credentials = Credentials::gather(self.head, self.fields, query, &self.worker.table);
        // A path that is no UTF-8 is below no path but the root.
        let path = std::str::from_utf8(path).unwrap_or("/%00");
        let wanted = Wanted { port, path, now: self.worker.wall_s() };
        let admission = Admission::decide(&self.worker.table, &sandbox, wanted, &credentials)
            .map_err(|verdict| AnswerKind::Failure(verdict.into()))?;
        if sandbox.state == State::Starting {
            return Err(failure(Code::SandboxStarting));
        }
        if let Some(redirect) = self.redirect(&credentials, &admission) {
            return Err(AnswerKind::Whole { status: 303, head: redirect });
        }
        if sandbox.state.is_asleep() && !sandbox.wake.is_roused(sandbox.v) {
            return if sandbox.auto_resume {
                Ok(Decision::Hold(Hold { sandbox, audience: self.audience(), framing: self.request.framing }))
            } else {
                Err(failure(Code::SandboxPaused))
            };
        }
        if !self.is_within_size() {
            return Err(failure(Code::BodyTooLarge));
        }
        let slot = Slot::take(&sandbox, self.worker.config.limits.sandbox_connections_max)
            .ok_or_else(|| failure(Code::TooManyConnections))?;
        sandbox.touch();
        let target = Target::Sandbox { incarnation: sandbox.live.incarnation, port };
        let mut forward = self.forward(target, Some((&credentials, sandbox.address, port)));
        forward.sandbox = Some(sandbox);
        forward.admission = Some(admission);
        forward.slot = Some(slot);
        Ok(Decision::Now(Plan::Forward(Box::new(forward))))
    }

    /// A body of chunks shows its size as it comes.
    fn is_within_size(&self) -> bool {
        let bytes_max = self.worker.config.limits.body_bytes_max;
        !matches!(self.request.framing, Framing::Length(length) if bytes_max != 0 && length > bytes_max)
    }

    fn forward(&self, target: Target, preview: Option<(&Credentials, IpAddr, u16)>) -> Forward {
        let mut head = HeadBuf::take();
        let credentials = preview.map(|(credentials, ..)| credentials);
        compose::request(&mut head.0, self.head, self.fields, self.request, credentials, self.peer);
        Forward {
            target,
            address: preview.map(|(_, address, port)| SocketAddr::new(address, port)),
            head,
            framing: self.request.framing,
            minor: self.request.minor,
            is_keep_alive: self.request.is_keep_alive,
            is_upgrade: self.request.is_upgrade,
            is_replayable: request::is_idempotent(self.method()) && self.request.framing == Framing::None,
            audience: self.audience(),
            sandbox: None,
            admission: None,
            slot: None,
            sending: Sending::AtOnce,
        }
    }

    /// The same address at the TLS listener.
    fn to_https(&self, host: &str, port: u16) -> Vec<u8> {
        let mut out = Vec::with_capacity(256);
        out.extend_from_slice(b"HTTP/1.1 308 Permanent Redirect\r\nLocation: https://");
        out.extend_from_slice(host.as_bytes());
        if port != HTTPS_PORT {
            out.extend_from_slice(format!(":{port}").as_bytes());
        }
        out.extend_from_slice(if self.target() == b"*" { b"/" } else { self.target() });
        out.extend_from_slice(b"\r\nContent-Length: 0\r\n");
        if !self.request.is_keep_alive {
            out.extend_from_slice(b"Connection: close\r\n");
        }
        out.extend_from_slice(b"\r\n");
        out
    }

    /// A browser that opened a link with a token keeps the token in a cookie, and its address bar, history and
    /// referrers stay clean.
    fn redirect(&self, credentials: &Credentials, admission: &Admission) -> Option<Vec<u8>> {
        let is_page = self.method() == b"GET" && self.audience().is_browser && !self.request.is_upgrade;
        if !is_page || !credentials.is_in_query {
            return None;
        }
        let (expires_at, path) = admission.token_scope()?;
        let token = self.query_token()?;
        let mut out = Vec::with_capacity(512);
        out.extend_from_slice(b"HTTP/1.1 303 See Other\r\nLocation: ");
        compose::push_target(&mut out, self.target());
        out.extend_from_slice(b"\r\nSet-Cookie: ");
        out.extend_from_slice(COOKIE);
        out.push(b'=');
        out.extend_from_slice(token);
        out.extend_from_slice(b"; Path=");
        out.extend_from_slice(path.as_bytes());
        if let Some(at) = expires_at {
            let left_s = (at - self.worker.wall_s()).max(0.0) as u64;
            out.extend_from_slice(format!("; Max-Age={left_s}").as_bytes());
        }
        // A frame on somebody else's page gets its cookie only as SameSite=None, which browsers tie to Secure.
        let is_framed = self.value_of(Name::SecFetchDest).is_some_and(|dest| dest == b"iframe");
        let same_site: &[u8] = match (is_framed, self.peer.is_secure()) {
            (true, _) => b"; SameSite=None; Secure; Partitioned",
            (false, true) => b"; SameSite=Lax; Secure",
            (false, false) => b"; SameSite=Lax",
        };
        out.extend_from_slice(b"; HttpOnly");
        out.extend_from_slice(same_site);
        out.extend_from_slice(b"\r\nCache-Control: no-store\r\nReferrer-Policy: no-referrer\r\nContent-Length: 0\r\n");
        if !self.request.is_keep_alive {
            out.extend_from_slice(b"Connection: close\r\n");
        }
        out.extend_from_slice(b"\r\n");
        Some(out)
    }

    /// The token of the query, if it can stand in a cookie.
    fn query_token(&self) -> Option<&[u8]> {
        let (_, query) = compose::split_query(self.target());
        let token = crate::admit::parameters(query).find_map(crate::admit::query_token)?;
        let is_plain = token.iter().all(|&b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        is_plain.then_some(token)
    }
}
