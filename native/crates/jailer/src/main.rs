//! The `sandgate-jailer` program: gives up what a sandbox's kernel must not have, then becomes it.
//!
//! ```text
//! sandgate-jailer --group=DIR… --descriptors=COUNT --network=FD --proc-until=FD PROGRAM ARGV0 [ARGUMENT…]
//! ```
//!
//! It joins the control groups and the network namespace it is given, and becomes `nobody` in user, mount, IPC and UTS
//! namespaces of its own, without any capability. Its file tree is empty and read-only but for `/etc/localtime` and
//! `/proc`; the latter goes when a byte arrives on its descriptor. How processors serve it is said in `processor`. Of
//! the descriptors, the program inherits the first ones but for those two. A step that fails is told on standard error,
//! and nothing is started.

mod call_unsafe;
mod identity;
mod options;
mod processor;
mod tree;

use std::ffi::CString;
use std::fs;
use std::io;
use std::process::ExitCode;

use nix::sched::{CloneFlags, setns};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::unistd::{fexecve, setsid};

use options::Options;

/// Why the program was not started: what was tried, and what the kernel said.
type Failure = (&'static str, io::Error);
type Step<T = ()> = Result<T, Failure>;

fn main() -> ExitCode {
    match Options::parse(std::env::args_os().skip(1)) {
        Ok(options) => {
            let (what, error) = become_program(&options);
            eprintln!("sandgate-jailer: cannot {what}: {error}");
            ExitCode::from(1)
        }
        Err(message) => {
            eprintln!("sandgate-jailer: {message}");
            ExitCode::from(2)
        }
    }
}

/// Returns only if it fails.
fn become_program(options: &Options) -> Failure {
    match prepare(options) {
        Ok(program) => {
            let environment: Vec<CString> = std::env::vars_os()
                .filter_map(|(name, value)| {
                    let (name, value) = (name.into_encoded_bytes(), value.into_encoded_bytes());
                    CString::new([name, b"=".to_vec(), value].concat()).ok()
                })
                .collect();
            let Err(error) = fexecve(&program, &options.arguments, &environment);
            ("start the program", error.into())
        }
        Err(failure) => failure,
    }
}

fn prepare(options: &Options) -> Step<fs::File> {
    call_unsafe::close_from(options.descriptors);
    // Opened before the tree it lies in goes.
    let program = fs::File::open(&options.program).map_err(|error| ("open the program", error))?;
    for group in &options.groups {
        fs::write(group.join("cgroup.procs"), "0").map_err(|error| ("join a control group", error))?;
    }
    setsid().map_err(to("begin a session"))?;
    // The sandbox's kernel locks memory for a moment to fill much of it at once. Where it may not, that takes longer.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    setns(call_unsafe::borrow(options.network), CloneFlags::CLONE_NEWNET).map_err(to("join the network namespace"))?;
    call_unsafe::close(options.network);
    identity::enter_namespaces()?;
    identity::become_nobody()?;
    tree::enter()?;
    tree::unmount_proc_after(options.proc_until)?;
    processor::take_turns()?;
    processor::keep_cpuid()?;
    identity::drop_capabilities()?;
    Ok(program)
}

/// Name a step that failed.
fn to(what: &'static str) -> impl Fn(nix::Error) -> Failure {
    move |error| (what, error.into())
}
