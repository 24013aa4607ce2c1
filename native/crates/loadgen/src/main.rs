//! The two ends of the plane's benchmark: the origin behind the proxy and the load in front of it.
//!
//! Each runs in one thread around one epoll loop, so that both fit on the core that the proxy does not use and neither
//! is what is measured. Results are one JSON object on standard output. Nothing here is part of a Sandgate that serves.

mod epoll;
mod failures;
mod head;
mod histogram;
mod http;
mod origin;
mod sse;
mod stream;
mod target;
mod usage;
mod websocket;

use clap::{Parser, Subcommand};
use rustix::process::{Signal, set_parent_process_death_signal};

#[derive(Parser)]
#[command(name = "sandgate-loadgen", version, about)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Serve fixed bodies, WebSocket and raw streams, until killed.
    Origin(origin::Options),
    /// Send GET requests over kept connections.
    Http(http::Options),
    /// Talk WebSocket: echoes, or a stream of frames to read.
    Websocket(websocket::Options),
    /// Subscribe to server-sent events.
    Sse(sse::Options),
}

fn main() {
    // A benchmark that is interrupted leaves nothing running.
    let tied = set_parent_process_death_signal(Some(Signal::TERM));
    let outcome = tied.map_err(std::io::Error::from).and_then(|()| match Arguments::parse().role {
        Role::Origin(options) => origin::run(&options),
        Role::Http(options) => http::run(&options),
        Role::Websocket(options) => websocket::run(&options),
        Role::Sse(options) => sse::run(&options),
    });
    if let Err(error) = outcome {
        eprintln!("sandgate-loadgen: {error}");
        std::process::exit(1);
    }
}
