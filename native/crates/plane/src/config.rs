//! Command line and limits.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use crate::listen::{Access, Address};
use crate::trust::Network;

/// Sandgate's public listener: previews go to sandboxes, everything else to the API.
#[derive(Clone, Debug, Parser)]
#[command(name = "sandgate-plane", version)]
pub struct Config {
    /// Address of the public listener, or `unix:/PATH`; may be given several times. Port 0 lets the system choose.
    #[arg(long, required = true)]
    pub listen: Vec<Address>,
    /// Address of the public TLS listener; may be given several times.
    #[arg(long, requires = "tls_dir")]
    pub tls_listen: Vec<Address>,
    /// Permission bits of the public listeners' Unix sockets, in octal.
    #[arg(long, default_value = "660", value_parser = mode)]
    pub socket_mode: u32,
    /// Number of the user they belong to [default: our own].
    #[arg(long)]
    pub socket_user: Option<u32>,
    /// Number of the group they belong to [default: our own].
    #[arg(long)]
    pub socket_group: Option<u32>,
    /// Directory of NAME.crt and NAME.key, PEM; read again on SIGHUP and when a file changes.
    #[arg(long)]
    pub tls_dir: Option<PathBuf>,
    /// Redirect every request of the plain listener to https at this port.
    #[arg(long)]
    pub https_redirect: Option<u16>,
    /// Address of the listener for /healthz, /readyz and /metrics.
    #[arg(long)]
    pub admin_listen: Option<SocketAddr>,
    /// The API's Unix socket.
    #[arg(long)]
    pub api_socket: PathBuf,
    /// Unix socket on which the API controls this process; made with mode 0600.
    #[arg(long)]
    pub control_socket: PathBuf,
    /// Origin whose pages may call the API, or "*"; may be given several times.
    #[arg(long)]
    pub api_origin: Vec<String>,
    /// Address or network of a proxy, or unix, whose X-Forwarded-For and X-Forwarded-Proto are believed; may be given several
    /// times.
    #[arg(long)]
    pub trusted_proxy: Vec<Network>,
    /// Hostd's Unix socket [default: hostd.sock beside the control socket].
    #[arg(long)]
    pub hostd_socket: Option<PathBuf>,
    /// Domain below which previews live; may be given several times.
    #[arg(long, default_value = "localhost")]
    pub domain: Vec<String>,
    /// File that keeps the route table over a restart [default: the control socket's path with .routes].
    #[arg(long)]
    pub routes_file: Option<PathBuf>,
    /// Worker threads [default: one per core].
    #[arg(long)]
    pub workers: Option<usize>,
    /// Append a JSON line per request to this file ("-" is standard output).
    #[arg(long)]
    pub access_log: Option<PathBuf>,
    /// Which share of the requests the access log notes, from 0 to 1. Requests that fail are always noted.
    #[arg(long, default_value_t = 1.0, value_parser = share)]
    pub access_log_share: f64,
    /// Sandboxes that have a metric of their own, those with most requests; all others share one.
    #[arg(long, default_value_t = 20)]
    pub metric_sandboxes_max: usize,
    /// Take over the listeners of the plane that serves at the control socket, if one does; it drains and ends.
    #[arg(long)]
    pub take_over: bool,
    /// End when the parent process does.
    #[arg(long)]
    pub die_with_parent: bool,
    /// Limits and time-outs.
    #[command(flatten)]
    pub limits: Limits,
}

/// Limits and time-outs. Times are seconds, checked every 0.25 s.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Limits {
    /// Largest request or response head, in bytes (at most 131072).
    #[arg(long, default_value_t = 65536, value_parser = clap::value_parser!(u32).range(1024..=131_072))]
    pub head_bytes_max: u32,
    /// Most fields of a request's head (at most 256).
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(8..=256))]
    pub head_fields_max: u32,
    /// Largest body of a request to a preview, in bytes; 0: any.
    #[arg(long, default_value_t = 0)]
    pub body_bytes_max: u64,
    /// Client connections in all.
    #[arg(long, default_value_t = 20_000)]
    pub connections_max: usize,
    /// Client connections from one address.
    #[arg(long, default_value_t = 4_000)]
    pub client_connections_max: usize,
    /// Requests and tunnels in flight to one sandbox.
    #[arg(long, default_value_t = 1_000)]
    pub sandbox_connections_max: u32,
    /// Requests that wait for one sandbox to wake up.
    #[arg(long, default_value_t = 256)]
    pub wake_waiting_max: u32,
    /// For a sandbox to wake up.
    #[arg(long, default_value_t = 30.0)]
    pub wake_timeout_s: f64,
    /// For a request's head to arrive.
    #[arg(long, default_value_t = 15.0)]
    pub head_timeout_s: f64,
    /// Between two requests on one client connection.
    #[arg(long, default_value_t = 75.0)]
    pub idle_timeout_s: f64,
    /// Without a byte of the request's body arriving.
    #[arg(long, default_value_t = 60.0)]
    pub body_timeout_s: f64,
    /// For a connection to a sandbox or the API.
    #[arg(long, default_value_t = 5.0)]
    pub connect_timeout_s: f64,
    /// For the head of a sandbox's response.
    #[arg(long, default_value_t = 300.0)]
    pub response_timeout_s: f64,
    /// For the head of the API's response.
    #[arg(long, default_value_t = 3600.0)]
    pub api_response_timeout_s: f64,
    /// Without a byte in a response's body or a tunnel.
    #[arg(long, default_value_t = 3600.0)]
    pub stream_timeout_s: f64,
    /// Without the receiver taking a byte that waits for it.
    #[arg(long, default_value_t = 60.0)]
    pub send_timeout_s: f64,
    /// Bytes per second that a client must take of a response, or send of a request's body, while they are waited for;
    /// 0: any. As low as other servers have it: a bad line shared by several connections is still faster.
    #[arg(long, default_value_t = 240)]
    pub client_bytes_per_s_min: u64,
    /// So much waiting for a client is judged by that at a time.
    #[arg(long, default_value_t = 60.0)]
    pub client_rate_window_s: f64,
    /// Without an event, a comment keeps an event stream alive this often.
    #[arg(long, default_value_t = 15.0)]
    pub stream_heartbeat_s: f64,
    /// Events that may wait for one subscriber of an event stream; with more it loses its stream.
    #[arg(long, default_value_t = 1000)]
    pub stream_events_max: usize,
    /// For a response to end whose client has closed its sending side; most such clients have left. The API must hear
    /// of it before the client repeats its request, which the quickest do after 0.5 s.
    #[arg(long, default_value_t = 0.1)]
    pub half_closed_timeout_s: f64,
    /// An idle connection to an upstream is kept; below the 5 s after which common servers close theirs.
    #[arg(long, default_value_t = 4.0)]
    pub upstream_idle_timeout_s: f64,
    /// For connections to end by themselves after a successor has taken over.
    #[arg(long, default_value_t = 3600.0)]
    pub hand_over_timeout_s: f64,
    /// For requests in flight to finish after SIGTERM.
    #[arg(long, default_value_t = 30.0)]
    pub drain_timeout_s: f64,
}

impl Config {
    /// The file for the route table.
    pub fn routes_path(&self) -> PathBuf {
        self.routes_file.clone().unwrap_or_else(|| self.control_socket.with_extension("routes"))
    }

    /// Hostd's socket.
    pub fn hostd_path(&self) -> PathBuf {
        self.hostd_socket.clone().unwrap_or_else(|| self.control_socket.with_file_name("hostd.sock"))
    }

    /// Who may connect to Unix sockets.
    pub fn socket_access(&self) -> Access {
        Access { mode: self.socket_mode, user: self.socket_user, group: self.socket_group }
    }

    /// Number of worker threads.
    pub fn worker_count(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.workers.unwrap_or_else(cores).max(1)
    }
}

fn mode(text: &str) -> Result<u32, String> {
    let bits = u32::from_str_radix(text, 8).ok().filter(|bits| *bits <= 0o777);
    bits.ok_or_else(|| "not permission bits in octal, such as 660".into())
}

fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|share| (0.0..=1.0).contains(share)).ok_or_else(|| "not a number from 0 to 1".into())
}

/// Seconds as milliseconds; negative and absurd values become 0 and a century.
pub fn ms(seconds: f64) -> u64 {
    const CENTURY_MS: f64 = 3.2e12;
    (seconds * 1000.0).clamp(0.0, CENTURY_MS) as u64
}

/// Seconds as a duration.
pub fn duration(seconds: f64) -> Duration {
    Duration::from_millis(ms(seconds))
}
