//! System calls that need `unsafe`, each behind a function that is safe to call.
//!
//! Invariants: the program has one thread, and the descriptors it is told are its own from the start.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::unistd::{ForkResult, Pid};

/// Two words for each of the three sets of capabilities.
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
const CAPABILITY_LAST: libc::c_int = 63;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

/// Start a child that does `work` and ends with the status it gives.
pub fn fork(work: impl FnOnce() -> i32) -> nix::Result<Pid> {
    // SAFETY: there is one thread, so the child finds every lock as free as it is here.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let status = work();
            // SAFETY: always sound; nothing of the parent's is flushed or run twice.
            unsafe { libc::_exit(status) }
        }
    }
}

/// An inherited descriptor, for as long as nobody closes it.
pub fn borrow(descriptor: i32) -> BorrowedFd<'static> {
    // SAFETY: see the module; the callers use it before they close it.
    unsafe { BorrowedFd::borrow_raw(descriptor) }
}

/// An inherited descriptor that is read from here only.
pub fn file(descriptor: i32) -> File {
    // SAFETY: see the module; the child that calls this has no other owner of it.
    unsafe { File::from_raw_fd(descriptor) }
}

/// Close an inherited descriptor that has served.
pub fn close(descriptor: i32) {
    // SAFETY: no owned type refers to it.
    unsafe { libc::close(descriptor) };
}

/// Close every descriptor from this one on. Not for one that an owned type refers to.
pub fn close_from(first: i32) {
    // SAFETY: see above. It fails only if the kernel does not know it.
    unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) };
}

/// Close every descriptor but one. For a child that uses nothing else.
pub fn close_all_but(kept: i32) {
    // SAFETY: see above; whatever the parent owned is the parent's.
    unsafe { libc::syscall(libc::SYS_close_range, 0, kept - 1, 0) };
    close_from(kept + 1);
}

/// Let nobody write, make devices or gain rights below a mount.
pub fn make_read_only(place: &Path) -> io::Result<()> {
    let place = CString::new(place.as_os_str().as_bytes())?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: path and structure outlive the call, and the size is the structure's.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            place.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    check(result)
}

/// Empty all sets of capabilities, the one that bounds what an executed file can give among them.
pub fn drop_capabilities() -> io::Result<()> {
    for capability in 0..=CAPABILITY_LAST {
        // SAFETY: takes integers only.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        // One that this kernel does not have is none to drop.
        if result != 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL) {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: takes integers only.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) }.into())?;
    let (header, none) = (CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 }, [0_u32; 6]);
    // SAFETY: both have the layout that this version of the call asks for, and outlive it.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) })
}

/// Have a system call fail whose first argument is this one, for good, here and in every process that comes of this one.
pub fn refuse(call: libc::c_long, argument: u32, errno: i32) -> io::Result<()> {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const JUMP_IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    // Of `seccomp_data`: the call's number, and the lower half of its first argument on this processor.
    const NUMBER: u32 = 0;
    const FIRST_ARGUMENT: u32 = 16;
    let step = |code: u32, k: u32, or_skip: u8| libc::sock_filter { code: code as u16, jt: 0, jf: or_skip, k };
    let mut steps = [
        step(LOAD, NUMBER, 0),
        step(JUMP_IF_EQUAL, call as u32, 3),
        step(LOAD, FIRST_ARGUMENT, 0),
        step(JUMP_IF_EQUAL, argument, 1),
        step(RETURN, libc::SECCOMP_RET_ERRNO | errno as u32, 0),
        step(RETURN, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let filter = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: the filter and its steps outlive the call, which copies them.
    check(unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) }.into())
}

/// What `sched_setattr` takes, in its first version.
#[repr(C)]
#[derive(Default)]
struct SchedulingAttributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}

/// Be scheduled by this policy, in turns of this length.
pub fn schedule(policy: libc::c_int, turn_ns: u64) -> io::Result<()> {
    let size = size_of::<SchedulingAttributes>() as u32;
    // SAFETY: takes integers only. How nice it is stays as it is: a lower value would need a right.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let wanted = SchedulingAttributes { size, policy: policy as u32, nice, runtime_ns: turn_ns, ..Default::default() };
    // SAFETY: the structure is as long as it says and outlives the call; 0 is this thread.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const wanted, 0) })
}

#[cfg(test)]
pub fn policy() -> io::Result<libc::c_int> {
    // SAFETY: takes an integer; 0 is this thread.
    let policy = unsafe { libc::sched_getscheduler(0) };
    if policy < 0 { Err(io::Error::last_os_error()) } else { Ok(policy) }
}

#[cfg(test)]
pub fn arch_prctl(what: libc::c_int, argument: libc::c_ulong) -> io::Result<i64> {
    // SAFETY: for the codes that take integers only.
    let answer = unsafe { libc::syscall(libc::SYS_arch_prctl, what, argument) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
