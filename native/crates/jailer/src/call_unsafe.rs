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

fn check(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
