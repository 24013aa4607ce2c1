//! Starting a program: the one place that splits this process in two.
//!
//! `clone(CLONE_VM | CLONE_VFORK)` on a stack of its own copies no page tables and suspends only the calling thread, as
//! `posix_spawn` does; that one cannot change user, session or terminal, so the child's few steps are written out here.
//!
//! Invariants the unsafe code relies on:
//! - The child shares our memory until it execs. It allocates nothing, takes no lock, and touches only `Child`, which
//!   the suspended parent thread keeps alive and does not look at until the child has exec'd or exited.
//! - All signals are blocked around the clone, so that no handler of ours runs in the child on shared memory.
//! - Credentials change by raw system calls: libc's wrappers would signal every thread of *this* process.
//! - Every descriptor of ours is close-on-exec and above 2.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::users::User;

/// Frames of the child's steps and of `execve`'s wrapper; measured use is under 1 KiB.
const STACK_BYTES: usize = 64 * 1024;

/// Everything the child needs, prepared before it exists.
pub struct Plan<'a> {
    /// Files to try in turn, each with its arguments, until one can be executed.
    pub attempts: &'a [(CString, Vec<CString>)],
    pub env: &'a [CString],
    pub cwd: &'a CStr,
    /// What becomes descriptors 0, 1 and 2.
    pub stdio: [BorrowedFd<'a>; 3],
    /// Descriptor 0 is a terminal and becomes the controlling one.
    pub controlling_tty: bool,
    /// Whom to become; `None` stays as we are.
    pub user: Option<&'a User>,
    /// Soft and hard limit of open files, which we have raised for ourselves.
    pub nofile: Option<(u64, u64)>,
    /// We are protected from the OOM killer; the child must not be.
    pub reset_oom_score: bool,
}

/// Which of the child's steps failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Clone,
    Session,
    Descriptors,
    User,
    Directory,
    Exec,
}

/// Why there is no new process.
#[derive(Clone, Copy, Debug)]
pub struct SpawnError {
    pub step: Step,
    pub errno: Errno,
    /// Index of the attempt that failed, for `Step::Exec`.
    pub attempt: usize,
}

struct Child<'a> {
    plan: &'a Plan<'a>,
    attempts: Vec<(*const c_char, Vec<*const c_char>)>,
    env: Vec<*const c_char>,
    failure: Option<SpawnError>,
}

/// Start the program in a session of its own. Returns once it runs or cannot; a child that failed must be reaped too.
pub fn spawn(plan: &Plan<'_>) -> Result<Pid, SpawnError> {
    let attempts = plan.attempts.iter().map(|(path, argv)| (path.as_ptr(), pointers(argv))).collect();
    let mut child = Child { plan, attempts, env: pointers(plan.env), failure: None };
    let mut stack = Vec::<MaybeUninit<u8>>::with_capacity(STACK_BYTES);
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;

    // SAFETY: `all` and `before` are plain sets for sigfillset and pthread_sigmask to fill. The stack top is the end of
    // an allocation of STACK_BYTES, rounded down to the 16 bytes the ABI asks for. `child` outlives the call, and the
    // module's invariants hold for `run_child`.
    let pid = unsafe {
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
        let top = stack.as_mut_ptr().add(STACK_BYTES);
        let top = top.sub(top as usize % 16).cast::<c_void>();
        let pid = libc::clone(run_child, top, flags, ptr::from_mut(&mut child).cast());
        let errno = Errno::last();
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut());
        if pid < 0 { Err(errno) } else { Ok(pid) }
    };
    // SAFETY: a volatile read, because the other side of the clone wrote it behind the compiler's back.
    let failure = unsafe { ptr::read_volatile(&raw const child.failure) };
    match (pid, failure) {
        (Err(errno), _) => Err(SpawnError { step: Step::Clone, errno, attempt: 0 }),
        (Ok(_), Some(failure)) => Err(failure),
        (Ok(pid), None) => Ok(Pid::from_raw(pid)),
    }
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}

extern "C" fn run_child(argument: *mut c_void) -> c_int {
    // SAFETY: the parent passed a `Child` and is suspended, so this is the only reference in use.
    let child = unsafe { &mut *argument.cast::<Child<'_>>() };
    let failure = match prepare(child.plan) {
        Ok(()) => execute(child),
        Err((step, errno)) => SpawnError { step, errno, attempt: 0 },
    };
    // SAFETY: plain memory of ours; volatile for the same reason as the read in the parent.
    unsafe { ptr::write_volatile(&raw mut child.failure, Some(failure)) };
    // SAFETY: leaves without running exit handlers, which belong to the parent.
    unsafe { libc::_exit(127) }
}

fn check(result: impl Into<i64>, step: Step) -> Result<(), (Step, Errno)> {
    if result.into() < 0 { Err((step, Errno::last())) } else { Ok(()) }
}

fn prepare(plan: &Plan<'_>) -> Result<(), (Step, Errno)> {
    // SAFETY: here and below, async-signal-safe calls on plain integers and on memory of `plan`.
    check(unsafe { libc::setsid() }, Step::Session)?;
    for (target, source) in plan.stdio.iter().enumerate() {
        // SAFETY: as above.
        check(unsafe { libc::dup2(source.as_raw_fd(), target as c_int) }, Step::Descriptors)?;
    }
    if plan.controlling_tty {
        // SAFETY: as above.
        check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) }, Step::Session)?;
    }
    if let Some((soft, hard)) = plan.nofile {
        let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
        // SAFETY: as above.
        check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, Step::Descriptors)?;
    }
    if plan.reset_oom_score {
        reset_oom_score();
    }
    if let Some(user) = plan.user {
        become_user(user)?;
    }
    // Ignored signals survive exec: the Rust runtime ignores SIGPIPE, and whoever started us perhaps the others.
    for signal in [libc::SIGPIPE, libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
        // SAFETY: as above; without CLONE_SIGHAND the table of handlers is the child's own.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: as above.
    unsafe {
        libc::umask(0o022);
        let mut none = MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut());
    }
    // SAFETY: as above; a NUL-terminated path. After the change of user, whose permissions decide.
    check(unsafe { libc::chdir(plan.cwd.as_ptr()) }, Step::Directory)
}

/// Best effort: a kernel without the file has no killer to fear either.
fn reset_oom_score() {
    // SAFETY: constant path, constant bytes, a descriptor of this function's own.
    unsafe {
        let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            libc::write(fd, c"0".as_ptr().cast(), 1);
            libc::close(fd);
        }
    }
}

fn become_user(user: &User) -> Result<(), (Step, Errno)> {
    let (uid, gid) = (user.uid, user.gid);
    // SAFETY: raw calls (see the module's invariants) on integers and a slice that outlives them.
    unsafe {
        check(libc::syscall(libc::SYS_setgroups, user.groups.len(), user.groups.as_ptr()), Step::User)?;
        check(libc::syscall(libc::SYS_setresgid, gid, gid, gid), Step::User)?;
        check(libc::syscall(libc::SYS_setresuid, uid, uid, uid), Step::User)
    }
}

/// Try each file as `execvp` would: a missing one is passed over, a forbidden one is remembered.
fn execute(child: &Child<'_>) -> SpawnError {
    let mut failure = SpawnError { step: Step::Exec, errno: Errno::ENOENT, attempt: 0 };
    for (attempt, (path, argv)) in child.attempts.iter().enumerate() {
        // SAFETY: NUL-terminated strings in null-terminated arrays, all alive in the parent.
        unsafe { libc::execve(*path, argv.as_ptr(), child.env.as_ptr()) };
        let errno = Errno::last();
        match errno {
            Errno::ENOENT | Errno::ENOTDIR => {}
            Errno::EACCES => failure = SpawnError { step: Step::Exec, errno, attempt },
            _ => return SpawnError { step: Step::Exec, errno, attempt },
        }
    }
    failure
}
