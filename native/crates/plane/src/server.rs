//! Puts the process together: listeners, workers, control thread, signals.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{broadcast, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::access_log::AccessLog;
use crate::admin::{self, Admin};
use crate::config::{Config, duration};
use crate::control::{self, Control, Paths};
use crate::handover::{self, Kind, Predecessor};
use crate::journal::Journal;
use crate::listen::{self, Address, Group, Listening};
use crate::metrics::Metrics;
use crate::policy::Policy;
use crate::table::Table;
use crate::tls::Certificates;
use crate::wake;
use crate::worker::{self, Drain, Listener, Shared, wall_clock_s};

/// How often the directory of certificates is looked at.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(1);

/// Stretches of the event log that a worker may lag behind; one more and its subscribers must resume.
const BATCHES_MAX: usize = 1024;

/// Runs the plane until a signal has ended it. Must be called on the main thread before others exist.
pub fn run(config: Config) -> io::Result<()> {
    if config.die_with_parent {
        die_with_parent()?;
    }
    raise_descriptor_limit();
    let config = Arc::new(normalised(config));
    let workers = config.worker_count();
    // Before the routes file is read: until then the predecessor may write to it.
    let mut predecessor = if config.take_over { Predecessor::find(&config.control_socket)? } else { None };
    let table = Arc::new(Table::default());
    let metrics = Arc::new(Metrics::new(workers));
    let (journal, bad_lines) = Journal::open(&config.routes_path(), &table, wall_clock_s() as u64)?;
    if bad_lines > 0 {
        crate::log::warning("lines of the routes file were unreadable", &bad_lines);
    }
    let (begin_drain, drain) = watch::channel(Drain::No);
    let (knocks, knocked) = tokio::sync::mpsc::unbounded_channel();
    let (batches, _) = broadcast::channel(BATCHES_MAX);
    let shared = Shared {
        config: Arc::clone(&config),
        table: Arc::clone(&table),
        census: Arc::default(),
        drain,
        knocks,
        api_policy: api_policy(&config)?,
        batches,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    let is_handed_over = runtime.block_on(local.run_until(async {
        let control_listener = control::listen(&config.control_socket)?;
        let admin_listener = match config.admin_listen {
            Some(address) => Some(listen_for_admin(address, predecessor.as_mut())?),
            None => None,
        };
        let access = config.socket_access();
        let mut listen_on = |kind: Kind, addresses: &[Address]| {
            let listen = |address: &Address| listen::listen(kind, address, workers, access, predecessor.as_mut());
            addresses.iter().map(listen).collect::<io::Result<Vec<_>>>()
        };
        let listeners = listen_on(Kind::Plain, &config.listen)?;
        let tls_listeners = listen_on(Kind::Tls, &config.tls_listen)?;
        let offer = offer(&listeners, &tls_listeners, admin_listener.as_ref())?;
        let certificates = config.tls_dir.as_deref().map(Certificates::open).transpose()?;
        announce(&listeners, &tls_listeners, admin_listener.as_ref())?;
        let threads = start_workers(&shared, &metrics, with_tls(listeners, tls_listeners, certificates.as_ref())?)?;
        if let Some(certificates) = certificates {
            tokio::task::spawn_local(renew(certificates, signal(SignalKind::hangup())?));
        }
        let paths = Paths { socket: config.control_socket.clone(), routes: config.routes_path() };
        let control = Control::new(&shared, Arc::clone(&metrics), journal, epoch(), paths, begin_drain.clone());
        control.offer(offer);
        tokio::task::spawn_local(Rc::clone(&control).serve(control_listener));
        tokio::task::spawn_local(Rc::clone(&control).housekeeping());
        let patience = duration(config.limits.wake_timeout_s);
        tokio::task::spawn_local(wake::serve(Rc::clone(&control), Arc::clone(&table), knocked, patience));
        let admin = match admin_listener {
            Some(listener) => {
                let admin = Rc::new(Admin::new(table, metrics, &config));
                Some(tokio::task::spawn_local(admin.serve(tokio::net::TcpListener::from_std(listener)?)))
            }
            None => None,
        };
        if let Some(predecessor) = predecessor {
            // One that has died in the meantime needs not be told.
            predecessor.dismiss().unwrap_or_else(|error| crate::log::warning("no predecessor any more", &error));
        }
        let mut signals = Signals::new()?;
        let mut handed_over = begin_drain.subscribe();
        tokio::select! {
            () = signals.next() => {
                control.offer(Vec::new());
                // Now, not at the end: by then another process may have made its own.
                listen::forget(config.listen.iter().chain(&config.tls_listen));
                begin_drain.send_replace(Drain::Stop);
            }
            // The sender is here: this ends with a hand-over only.
            _ = handed_over.wait_for(|drain| *drain == Drain::HandedOver) => {
                if let Some(admin) = admin {
                    admin.abort();
                }
                tokio::task::spawn_local(Rc::clone(&control).follow());
            }
        }
        crate::log::info("draining", &format_args!("at most {} s", config.limits.drain_timeout_s));
        Ok::<_, io::Error>(wait_for(threads, &begin_drain, &mut signals).await)
    }))?;
    if !is_handed_over {
        // It may be gone already; an error changes nothing.
        let _ = std::fs::remove_file(&config.control_socket);
    }
    Ok(())
}

fn normalised(mut config: Config) -> Config {
    for domain in &mut config.domain {
        *domain = domain.trim_matches('.').to_ascii_lowercase();
    }
    config
}

/// None when no page of another origin may call the API.
fn api_policy(config: &Config) -> io::Result<Option<Arc<Policy>>> {
    if config.api_origin.is_empty() {
        return Ok(None);
    }
    let policy = Policy::new(Some(config.api_origin.clone()), false, None);
    policy.map(|policy| Some(Arc::new(policy))).map_err(|reason| io::Error::new(io::ErrorKind::InvalidInput, reason))
}

/// A value no other start of this program has.
fn epoch() -> String {
    format!("{:x}-{:x}", (wall_clock_s() * 1e6) as u64, std::process::id())
}

/// Tells the supervisor where we listen: one JSON line on standard output.
fn announce(plain: &[Group], tls: &[Group], admin: Option<&TcpListener>) -> io::Result<()> {
    let addresses = |listeners: &[Group]| {
        listeners.iter().map(|group| Ok(group[0].address()?.to_string())).collect::<io::Result<Vec<_>>>()
    };
    let admin = admin.map(TcpListener::local_addr).transpose()?.map(|address| address.to_string());
    println!(
        "{}",
        json!({"event": "listening", "listen": addresses(plain)?, "tls_listen": addresses(tls)?, "admin": admin})
    );
    Ok(())
}

/// What a successor may have.
fn offer(plain: &[Group], tls: &[Group], admin: Option<&TcpListener>) -> io::Result<Vec<handover::Group>> {
    let copies = |kind: Kind, groups: &[Group]| {
        groups.iter().map(|group| handover::Group::copy(kind, group)).collect::<io::Result<Vec<_>>>()
    };
    let mut all = copies(Kind::Plain, plain)?;
    all.extend(copies(Kind::Tls, tls)?);
    if let Some(admin) = admin {
        all.push(handover::Group::copy(Kind::Admin, &[Listening::Tcp(admin.try_clone()?)])?);
    }
    Ok(all)
}

fn listen_for_admin(address: SocketAddr, predecessor: Option<&mut Predecessor>) -> io::Result<TcpListener> {
    let inherited = predecessor.and_then(|found| found.take(Kind::Admin, &Address::Tcp(address)));
    match inherited.and_then(|mut group| group.sockets.pop()) {
        Some(Listening::Tcp(socket)) => Ok(socket),
        Some(Listening::Unix(_)) | None => admin::listen(address),
    }
}

/// Says how each listener is served.
fn with_tls(plain: Vec<Group>, tls: Vec<Group>, certificates: Option<&Certificates>) -> io::Result<Vec<Vec<Listener>>> {
    let config = certificates.map(Certificates::server_config).transpose()?;
    let acceptor = config.map(|config| TlsAcceptor::from(Arc::new(config)));
    let served = |group: Group, acceptor: Option<&TlsAcceptor>| {
        group.into_iter().map(|socket| Listener { socket, acceptor: acceptor.cloned() }).collect()
    };
    let plain = plain.into_iter().map(|group| served(group, None));
    Ok(plain.chain(tls.into_iter().map(|group| served(group, acceptor.as_ref()))).collect())
}

/// Follows the directory of certificates, for ever.
async fn renew(mut certificates: Certificates, mut hangup: Signal) {
    loop {
        // A signal that cannot come any more leaves the interval.
        let _ = timeout(RENEWAL_INTERVAL, hangup.recv()).await;
        if let Err(error) = certificates.refresh() {
            crate::log::warning("cannot read the certificates", &error);
        }
    }
}

type Threads = Vec<std::thread::JoinHandle<()>>;

fn start_workers(shared: &Shared, metrics: &Metrics, listeners: Vec<Vec<Listener>>) -> io::Result<Threads> {
    let workers = shared.config.worker_count();
    let mut by_worker: Vec<Vec<Listener>> = (0..workers).map(|_| Vec::new()).collect();
    for group in listeners {
        // A predecessor may have had more workers; each of its sockets needs somebody who accepts.
        for (index, listener) in group.into_iter().enumerate() {
            by_worker[index % workers].push(listener);
        }
    }
    by_worker
        .into_iter()
        .enumerate()
        .map(|(index, own)| {
            let open = |path| AccessLog::open(path, shared.config.access_log_share);
            let access_log = shared.config.access_log.as_deref().map(open).transpose()?;
            let (shared, counters) = (shared.clone(), metrics.worker(index));
            std::thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || worker::run(shared, counters, own, access_log))
        })
        .collect()
}

/// The signals that end the process. One that comes while nobody waits is not lost.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Waits until the workers are done; a second signal ends the wait. Returns whether a successor serves.
async fn wait_for(threads: Threads, drain: &watch::Sender<Drain>, signals: &mut Signals) -> bool {
    let done = async {
        while threads.iter().any(|thread| !thread.is_finished()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let is_handed_over = *drain.borrow() == Drain::HandedOver;
    tokio::pin!(done);
    if is_handed_over {
        tokio::select! {
            () = &mut done => return true,
            () = signals.next() => {}
        }
        drain.send_replace(Drain::Stop);
    }
    tokio::select! {
        () = done => {}
        () = signals.next() => {}
    }
    is_handed_over
}

fn die_with_parent() -> io::Result<()> {
    let parent = rustix::process::getppid();
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
    // The parent may have died before the call.
    if rustix::process::getppid() != parent {
        return Err(io::Error::other("the parent process is gone"));
    }
    Ok(())
}

/// As many descriptors as the system grants: two per request in flight.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        crate::log::warning("cannot raise the limit of open files", &error);
    }
}
