//! Puts the process together: listeners, workers, control thread, signals.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::access_log::AccessLog;
use crate::admin::{self, Admin};
use crate::config::Config;
use crate::control::{self, Control};
use crate::journal::Journal;
use crate::metrics::Metrics;
use crate::table::Table;
use crate::tls::Certificates;
use crate::worker::{self, Listener, Shared, wall_clock_s};

/// Connections the kernel queues per listener.
const BACKLOG: i32 = 4096;
/// A dead peer of a silent connection is noticed after this long (plus the kernel's probes).
const KEEPALIVE: Duration = Duration::from_secs(60);
/// How often the directory of certificates is looked at.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(1);

/// One address's sockets, one per worker.
type Group = Vec<TcpListener>;

/// Runs the plane until a signal has ended it. Must be called on the main thread before others exist.
pub fn run(config: Config) -> io::Result<()> {
    if config.die_with_parent {
        die_with_parent()?;
    }
    raise_descriptor_limit();
    let config = Arc::new(normalised(config));
    let workers = config.worker_count();
    let table = Arc::new(Table::default());
    let metrics = Arc::new(Metrics::new(workers));
    let (journal, bad_lines) = Journal::open(&config.routes_path(), &table, wall_clock_s() as u64)?;
    if bad_lines > 0 {
        crate::log::warning("lines of the routes file were unreadable", &bad_lines);
    }
    let (begin_drain, drain) = watch::channel(false);
    let shared = Shared { config: Arc::clone(&config), table: Arc::clone(&table), census: Arc::default(), drain };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    runtime.block_on(local.run_until(async {
        let control_listener = control::listen(&config.control_socket)?;
        let admin_listener = config.admin_listen.map(admin::listen).transpose()?;
        let listeners =
            config.listen.iter().map(|&address| listen(address, workers)).collect::<io::Result<Vec<_>>>()?;
        let tls_listeners =
            config.tls_listen.iter().map(|&address| listen(address, workers)).collect::<io::Result<Vec<_>>>()?;
        let certificates = config.tls_dir.as_deref().map(Certificates::open).transpose()?;
        announce(&listeners, &tls_listeners, admin_listener.as_ref())?;
        let threads = start_workers(&shared, &metrics, with_tls(listeners, tls_listeners, certificates.as_ref())?)?;
        if let Some(certificates) = certificates {
            tokio::task::spawn_local(renew(certificates, signal(SignalKind::hangup())?));
        }
        let control = Control::new(Arc::clone(&table), Arc::clone(&metrics), journal, epoch());
        tokio::task::spawn_local(Rc::clone(&control).serve(control_listener));
        tokio::task::spawn_local(control.housekeeping());
        if let Some(listener) = admin_listener {
            let admin = Rc::new(Admin { table, metrics, api_socket: config.api_socket.clone() });
            tokio::task::spawn_local(admin.serve(tokio::net::TcpListener::from_std(listener)?));
        }
        wait_for_signal().await?;
        crate::log::info("draining", &format_args!("at most {} s", config.limits.drain_timeout_s));
        begin_drain.send_replace(true);
        wait_for(threads).await
    }))?;
    // A successor may already have replaced it; an error changes nothing.
    let _ = std::fs::remove_file(&config.control_socket);
    Ok(())
}

fn normalised(mut config: Config) -> Config {
    for domain in &mut config.domain {
        *domain = domain.trim_matches('.').to_ascii_lowercase();
    }
    config
}

/// A value no other start of this program has.
fn epoch() -> String {
    format!("{:x}-{:x}", (wall_clock_s() * 1e6) as u64, std::process::id())
}

/// Tells the supervisor where we listen: one JSON line on standard output.
fn announce(plain: &[Group], tls: &[Group], admin: Option<&TcpListener>) -> io::Result<()> {
    let addresses = |listeners: &[Group]| {
        listeners.iter().map(|group| Ok(group[0].local_addr()?.to_string())).collect::<io::Result<Vec<_>>>()
    };
    let admin = admin.map(TcpListener::local_addr).transpose()?.map(|address| address.to_string());
    println!(
        "{}",
        json!({"event": "listening", "listen": addresses(plain)?, "tls_listen": addresses(tls)?, "admin": admin})
    );
    Ok(())
}

/// One listener per worker on the same address; the kernel spreads connections over them.
fn listen(address: SocketAddr, count: usize) -> io::Result<Group> {
    // SO_REUSEPORT would let two planes share a port unnoticed. A bind without it fails if anybody is there.
    let probe = open(address, false)?;
    let address = probe.local_addr()?;
    drop(probe);
    (0..count)
        .map(|_| {
            let listener = open(address, true)?;
            socket2::SockRef::from(&listener).listen(BACKLOG)?;
            Ok(listener)
        })
        .collect()
}

/// Options are inherited by accepted connections, which saves calls on each.
fn open(address: SocketAddr, is_shared: bool) -> io::Result<TcpListener> {
    let name = |error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"));
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(is_shared)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(KEEPALIVE))?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into()).map_err(name)?;
    Ok(socket.into())
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
        for (own, listener) in by_worker.iter_mut().zip(group) {
            own.push(listener);
        }
    }
    by_worker
        .into_iter()
        .enumerate()
        .map(|(index, own)| {
            let access_log = shared.config.access_log.as_deref().map(AccessLog::open).transpose()?;
            let (shared, counters) = (shared.clone(), metrics.worker(index));
            std::thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || worker::run(shared, counters, own, access_log))
        })
        .collect()
}

async fn wait_for_signal() -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Waits until the workers are done; a second signal ends the wait.
async fn wait_for(threads: Threads) -> io::Result<()> {
    let done = async {
        while threads.iter().any(|thread| !thread.is_finished()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        () = done => Ok(()),
        outcome = wait_for_signal() => outcome,
    }
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
