//! One worker: a thread with a runtime, a listener and connections of its own.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{broadcast, watch};
use tokio::task::LocalSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::access_log::AccessLog;
use crate::compose::{HTTP, HTTPS};
use crate::config::{Config, duration, ms};
use crate::connection;
use crate::http::fields::Field;
use crate::http2;
use crate::listen::Listening;
use crate::metrics::Counters;
use crate::net::Socket;
use crate::policy::Policy;
use crate::pool::Pool;
use crate::rouse::Sleeper;
use crate::streams::event::Batch;
use crate::streams::hub::{self, Hub};
use crate::table::{Sandbox, State, Table};
use crate::tls;
use crate::trust::{self, Client};
use crate::watch::{SWEEP_MS, Watch, Watches};

/// After an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Accesses are checked again at least this often, for those that expire.
const EXPIRY_SWEEP_MS: u64 = 1000;
/// A request and the news that its sandbox sleeps may cross within this time.
const CROSSING_MS: u64 = 2000;

/// Connection counts that all workers share; touched when connections come and go only.
#[derive(Default)]
pub struct Census {
    total: AtomicUsize,
    by_client: Mutex<HashMap<Client, usize>>,
}

/// One connection in the census.
pub struct Seat {
    census: Arc<Census>,
    client: Client,
}

impl Census {
    /// Every client and the number of its connections.
    pub fn clients(&self) -> Vec<(Client, usize)> {
        let by_client = self.by_client.lock().unwrap_or_else(PoisonError::into_inner);
        by_client.iter().map(|(&client, &count)| (client, count)).collect()
    }

    /// Counts a connection in; none if that would exceed a limit.
    fn enter(self: &Arc<Self>, client: Client, config: &Config) -> Option<Seat> {
        let seat = Seat { census: Arc::clone(self), client };
        let total = self.total.fetch_add(1, Ordering::Relaxed) + 1;
        let mut by_client = self.by_client.lock().unwrap_or_else(PoisonError::into_inner);
        let of_client = by_client.entry(client).or_default();
        *of_client += 1;
        // A proxy stands for many clients.
        let is_one_too_many =
            *of_client > config.limits.client_connections_max && !trust::is_trusted(&config.trusted_proxy, client);
        drop(by_client);
        (total <= config.limits.connections_max && !is_one_too_many).then_some(seat)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.census.total.fetch_sub(1, Ordering::Relaxed);
        let mut by_client = self.census.by_client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = by_client.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                by_client.remove(&self.client);
            }
        }
    }
}

/// A connection of a worker; counted until it is dropped.
struct Presence {
    worker: Rc<Worker>,
    _seat: Option<Seat>,
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.worker.counters.connections.sub(1);
    }
}

/// A listening socket.
pub struct Listener {
    /// The socket.
    pub socket: Listening,
    /// For TLS: how to shake hands.
    pub acceptor: Option<TlsAcceptor>,
}

/// How the process is going to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    /// Not yet.
    No,
    /// A successor has the listeners. Idle connections are kept until their next request, or they could be closed just
    /// as the client sends one.
    HandedOver,
    /// As soon as the requests in flight are answered.
    Stop,
}

/// What every worker is given.
#[derive(Clone)]
pub struct Shared {
    /// Settings.
    pub config: Arc<Config>,
    /// Routes.
    pub table: Arc<Table>,
    /// Connection counts.
    pub census: Arc<Census>,
    /// Whether the process is to stop.
    pub drain: watch::Receiver<Drain>,
    /// Takes the ids of sandboxes to be woken.
    pub knocks: UnboundedSender<Box<str>>,
    /// What other sites may do with the API.
    pub api_policy: Option<Arc<Policy>>,
    /// The event log as it comes.
    pub batches: broadcast::Sender<Arc<Batch>>,
}

/// What the connections of one worker share.
pub struct Worker {
    /// Settings.
    pub config: Arc<Config>,
    /// Routes.
    pub table: Arc<Table>,
    /// Counters.
    pub counters: Arc<Counters>,
    /// Idle upstream connections.
    pub pool: Pool,
    /// The process is about to stop.
    pub is_draining: Cell<bool>,
    /// Scratch for reading heads.
    pub fields: RefCell<Vec<Field>>,
    /// Where requests are noted, if anywhere.
    pub access_log: Option<RefCell<AccessLog>>,
    /// Everything that the sweep looks at.
    pub watches: Watches,
    /// What other sites may do with the API.
    pub api_policy: Option<Arc<Policy>>,
    knocks: UnboundedSender<Box<str>>,
    /// Clients of event streams.
    pub hub: Hub,
    started: Instant,
    now_ms: Cell<u64>,
    wall_s: Cell<f64>,
    ids: RandomState,
    next_id: Cell<u64>,
}

impl Worker {
    /// Milliseconds since the worker started, as of the last sweep.
    pub fn now_ms(&self) -> u64 {
        self.now_ms.get()
    }

    /// Microseconds since the worker started, as of now.
    pub fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// Unix seconds, as of the last sweep.
    pub fn wall_s(&self) -> f64 {
        self.wall_s.get()
    }

    /// The moment `seconds` from now, for deadlines.
    pub fn after(&self, seconds: f64) -> u64 {
        // The clock may be up to one sweep behind.
        self.now_ms.get() + SWEEP_MS + ms(seconds)
    }

    /// A fresh request id. Random enough not to be guessed; unique within the process.
    pub fn request_id(&self) -> String {
        let count = self.next_id.get();
        self.next_id.set(count + 1);
        format!("req_{:016x}{:08x}", self.ids.hash_one(count), count as u32)
    }

    /// Has a sandbox woken, if nobody has yet.
    pub fn knock(&self, sandbox: &Sandbox) {
        if sandbox.wake.is_asleep() && sandbox.wake.rest_s().is_none() && sandbox.wake.ask() {
            self.counters.wakes.add(1);
            let knocks = self.knocks.clone();
            // Nobody receives it when the process is about to end.
            let ask_api = move |id| drop(knocks.send(id));
            // The one at hand may be an older record, of when it was awake.
            match self.table.get(&sandbox.id).filter(|newest| newest.state == State::Frozen) {
                Some(frozen) => {
                    let (sleeper, hostd) = (Sleeper::of(&frozen), self.config.hostd_path());
                    tokio::task::spawn_local(async move { sleeper.rouse(&hostd).await.unwrap_or_else(ask_api) });
                }
                None => ask_api(sandbox.id.clone()),
            }
        }
    }

    /// Has a sandbox woken that fell asleep just as a request reached it.
    fn knock_for(&self, watch: &Watch) {
        let is_fresh = self.now_ms().saturating_sub(watch.began_us.get() / 1000) < CROSSING_MS;
        if is_fresh
            && watch.is_unanswered()
            && let Some(admission) = &*watch.admission.borrow()
        {
            self.knock(admission.sandbox());
        }
    }

    fn tick(&self) {
        self.now_ms.set(self.started.elapsed().as_millis() as u64);
        self.wall_s.set(wall_clock_s());
    }
}

/// Unix seconds.
pub fn wall_clock_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Runs a worker until the drain is over. The thread calling it does nothing else.
pub fn run(shared: Shared, counters: Arc<Counters>, listeners: Vec<Listener>, access_log: Option<AccessLog>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .event_interval(61)
        .build()
        .unwrap_or_else(|error| crate::log::fatal("cannot start a worker", &error));
    let drain = shared.drain.clone();
    let census = Arc::clone(&shared.census);
    let worker = Rc::new(Worker {
        config: shared.config,
        table: shared.table,
        counters,
        pool: Pool::default(),
        is_draining: Cell::new(false),
        fields: RefCell::default(),
        access_log: access_log.map(RefCell::new),
        watches: Watches::default(),
        api_policy: shared.api_policy,
        knocks: shared.knocks,
        hub: Hub::default(),
        started: Instant::now(),
        now_ms: Cell::new(0),
        wall_s: Cell::new(wall_clock_s()),
        ids: RandomState::new(),
        next_id: Cell::new(0),
    });
    let local = LocalSet::new();
    for listener in listeners {
        local.spawn_local(accept(Rc::clone(&worker), Arc::clone(&census), listener, drain.clone()));
    }
    local.spawn_local(sweep(Rc::clone(&worker), drain.clone()));
    // It writes to very many sockets at a time and gives way by itself.
    let deliveries = hub::run(Rc::clone(&worker), shared.batches.subscribe(), drain.clone());
    local.spawn_local(tokio::task::unconstrained(deliveries));
    runtime.block_on(local.run_until(finish(worker, drain)));
}

/// Waits for the drain and then for the last connection, bounded by the drain's time-out.
async fn finish(worker: Rc<Worker>, mut drain: watch::Receiver<Drain>) {
    // An error means that the sender is gone: the process is ending without ceremony.
    let _ = drain.wait_for(|drain| *drain != Drain::No).await;
    worker.is_draining.set(true);
    let limits = &worker.config.limits;
    // Read first: what is said from here on ends the wait.
    let is_handed_over = *drain.borrow_and_update() == Drain::HandedOver;
    if is_handed_over {
        tokio::select! {
            () = last_connection(&worker, limits.hand_over_timeout_s) => {}
            _ = drain.wait_for(|drain| *drain == Drain::Stop) => last_connection(&worker, limits.drain_timeout_s).await,
        }
    } else {
        last_connection(&worker, limits.drain_timeout_s).await;
    }
    if let Some(log) = &worker.access_log {
        log.borrow_mut().flush();
    }
}

async fn last_connection(worker: &Worker, timeout_s: f64) {
    let deadline = Instant::now() + duration(timeout_s);
    while worker.counters.has_connections() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A listener of this worker's runtime.
enum Door {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Door {
    fn new(socket: Listening) -> io::Result<Self> {
        match socket {
            Listening::Tcp(socket) => TcpListener::from_std(socket).map(Self::Tcp),
            Listening::Unix(socket) => UnixListener::from_std(socket).map(Self::Unix),
        }
    }

    async fn accept(&self) -> io::Result<(Socket, Client)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                Ok((Socket::Tcp(stream), Some(peer.ip().to_canonical())))
            }
            Self::Unix(listener) => listener.accept().await.map(|(stream, _)| (Socket::Unix(stream), None)),
        }
    }
}

async fn accept(worker: Rc<Worker>, census: Arc<Census>, listener: Listener, mut drain: watch::Receiver<Drain>) {
    let Listener { socket, acceptor } = listener;
    let door = Door::new(socket).unwrap_or_else(|error| crate::log::fatal("cannot use a listener", &error));
    loop {
        let accepted = tokio::select! {
            accepted = door.accept() => accepted,
            // Closes the listener: the kernel sends no more connections here.
            _ = drain.wait_for(|drain| *drain != Drain::No) => return,
        };
        match accepted {
            Ok((stream, client)) => start(&worker, &census, stream, client, acceptor.as_ref()),
            // The connection broke before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                crate::log::warning("accept failed", &error);
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn start(worker: &Rc<Worker>, census: &Arc<Census>, stream: Socket, client: Client, acceptor: Option<&TlsAcceptor>) {
    let seat = census.enter(client, &worker.config);
    worker.counters.accepted.add(1);
    worker.counters.connections.add(1);
    let worker = Rc::clone(worker);
    let watch = worker.watches.add();
    let acceptor = acceptor.cloned();
    let has_seat = seat.is_some();
    let presence = Presence { worker: Rc::clone(&worker), _seat: seat };
    tokio::task::spawn_local(async move {
        match (has_seat, acceptor) {
            (true, None) => {
                let joined =
                    connection::serve(&worker, &watch, stream, trust::peer(&worker.config, client, HTTP)).await;
                hub::settle(&worker, joined, presence);
            }
            // In a box: a plain connection, of which there may be very many, need not have room for one of TLS.
            (true, Some(acceptor)) => {
                Box::pin(serve_tls(&worker, &watch, &acceptor, stream, client, presence)).await;
            }
            (false, None) => connection::turn_away(&worker, stream).await,
            // A handshake is the expensive part: none for a connection too many.
            (false, Some(_)) => {}
        }
    });
}

/// Shakes hands, then serves what the client has chosen to speak.
async fn serve_tls(
    worker: &Rc<Worker>,
    watch: &Rc<Watch>,
    acceptor: &TlsAcceptor,
    stream: Socket,
    client: Client,
    presence: Presence,
) {
    let handshake = timeout(duration(worker.config.limits.head_timeout_s), acceptor.accept(stream));
    let Ok(Ok(stream)) = handshake.await else {
        worker.counters.tls_failures.add(1);
        return;
    };
    worker.counters.tls_handshakes.add(1);
    if stream.get_ref().1.alpn_protocol() == Some(tls::ALPN_HTTP2) {
        http2::serve(worker, watch, stream, client).await;
    } else {
        let joined = connection::serve(worker, watch, stream, trust::peer(&worker.config, client, HTTPS)).await;
        hub::settle(worker, joined, presence);
    }
}

/// Keeps the clock and looks at every connection, [`SWEEP_MS`] apart.
async fn sweep(worker: Rc<Worker>, drain: watch::Receiver<Drain>) {
    let mut interval = tokio::time::interval(Duration::from_millis(SWEEP_MS));
    let mut generation = worker.table.generation();
    let mut expiries_due_ms = 0;
    loop {
        interval.tick().await;
        worker.tick();
        let now_ms = worker.now_ms();
        let drain = *drain.borrow();
        let is_due = generation != worker.table.generation() || now_ms >= expiries_due_ms;
        if is_due {
            generation = worker.table.generation();
            expiries_due_ms = now_ms + EXPIRY_SWEEP_MS;
        }
        let wall_s = worker.wall_s();
        worker.watches.sweep(|watch| {
            watch.sweep(now_ms, drain, |admission| !is_due || admission.holds(&worker.table, wall_s));
            if is_due {
                worker.knock_for(watch);
            }
        });
        worker.pool.sweep(now_ms.saturating_sub(ms(worker.config.limits.upstream_idle_timeout_s)));
        if let Some(log) = &worker.access_log {
            log.borrow_mut().flush();
        }
    }
}
