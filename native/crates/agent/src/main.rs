//! `sandgate-agent`: PID 1 of a sandbox.
//!
//! It listens for its host, runs processes, serves files, terminals and watches over frames (docs/protocol.md), and
//! reaps every orphan. It mounts nothing, forwards no signals, and never exits on a client's mistake.
//!
//! One thread runs the event loop and owns all state; worker threads do what may block (files, process creation).
#![deny(unsafe_code)]

mod args;
mod conn;
mod core;
mod env_unsafe;
mod error;
mod files;
mod hooks;
mod identity;
mod metrics;
mod ops;
mod poller;
mod pool;
mod ports;
mod process;
mod sender;
mod server;
mod streams;
mod timers;
mod users;
mod watch;

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::ExitCode;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::args::{Args, Stop};
use crate::core::Core;
use crate::poller::Poller;
use crate::pool::Pool;
use crate::process::{Host, Logins};
use crate::server::Server;
use crate::users::Users;

const TOKEN_VARIABLE: &str = "SANDGATE_AGENT_TOKEN";
/// Variables of ours, and of the shell that may have started us; programs in the sandbox do not see them.
const OWN_PREFIX: &str = "SANDGATE_";
const OF_OUR_PARENT: [&str; 4] = ["PWD", "OLDPWD", "SHLVL", "_"];

fn main() -> ExitCode {
    let token = env_unsafe::take(TOKEN_VARIABLE);
    let args = match Args::parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(Stop::Answer(text)) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(Stop::Mistake(text)) => return fail(&text),
    };
    match token {
        Some(token) if !token.is_empty() => match serve(&args, token) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error.to_string()),
        },
        _ => fail(&format!("{TOKEN_VARIABLE} is not set")),
    }
}

fn fail(message: &str) -> ExitCode {
    eprintln!("sandgate-agent: {message}");
    ExitCode::from(2)
}

fn serve(args: &Args, token: String) -> std::io::Result<()> {
    // Before the first thread starts, so that all of them leave these signals to the loop.
    let mut mask = SigSet::empty();
    mask.extend([Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let is_init = std::process::id() == 1;
    if !is_init {
        // Orphans come to us then too, as they do to PID 1.
        nix::sys::prctl::set_child_subreaper(true)?;
    }
    let host = Host {
        users: Arc::new(Users::new("/etc/passwd", "/etc/group")),
        logins: Logins::default(),
        null: OpenOptions::new().read(true).write(true).open("/dev/null")?.into(),
        hooks: args.hooks.clone(),
        env: std::env::vars_os()
            .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(key, _)| !key.starts_with(OWN_PREFIX) && !OF_OUR_PARENT.contains(&key.as_str()))
            .collect(),
        nofile: raise_nofile(),
        reset_oom_score: is_init && !args.no_oom_score && avoid_oom_killer(),
    };
    let listener = TcpListener::bind(args.listen)?;
    if args.print_port {
        println!("{}", listener.local_addr()?.port());
    }
    let core = Core::new(Poller::new()?, Pool::new()?, host, token, random_id()?);
    let server = Server::new(core, listener, signals)?;
    if is_init {
        server.warm_up();
    }
    Ok(server.run()?)
}

/// Every process costs us some descriptors. Returns the limits children go back to.
fn raise_nofile() -> Option<(u64, u64)> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).ok()?;
    Some((soft, hard))
}

/// When memory runs out inside, a user's process has to go, not the one the host needs.
fn avoid_oom_killer() -> bool {
    OpenOptions::new()
        .write(true)
        .open("/proc/self/oom_score_adj")
        .and_then(|mut file| file.write_all(b"-1000"))
        .is_ok()
}

fn random_id() -> std::io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}
