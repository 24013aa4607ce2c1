//! Who the process is: nobody, in namespaces of its own.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;

use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Gid, Uid, getpid, pipe2, setgroups, setresgid, setresuid};

use crate::{Step, call_unsafe, to};

const NOBODY: u32 = 65_534;

/// Enter new namespaces; the user namespace knows nobody but `nobody`, and belongs to who this process was.
pub fn enter_namespaces() -> Step {
    let flags =
        CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    // Whom a user namespace knows is said by somebody with rights outside of it: a child that stays there.
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).map_err(to("make a pipe"))?;
    let (mut entered, mut entering) = (File::from(reader), File::from(writer));
    let (own, other_end) = (getpid(), entering.as_raw_fd());
    let child = call_unsafe::fork(move || {
        // Or it would wait for itself, if this process ended now.
        call_unsafe::close(other_end);
        let is_told = entered.read_exact(&mut [0]).is_ok();
        let map = format!("{NOBODY} {NOBODY} 1");
        let is_done =
            is_told && ["uid_map", "gid_map"].iter().all(|name| fs::write(format!("/proc/{own}/{name}"), &map).is_ok());
        i32::from(!is_done)
    })
    .map_err(to("fork"))?;
    unshare(flags).map_err(to("enter namespaces"))?;
    entering.write_all(&[0]).map_err(|error| ("enter namespaces", error))?;
    match waitpid(child, None).map_err(to("enter namespaces"))? {
        WaitStatus::Exited(_, 0) => Ok(()),
        _ => Err(("map nobody into the user namespace", io::ErrorKind::PermissionDenied.into())),
    }
}

/// Take on the one identity there is. The capabilities within the namespaces stay, to build the tree with.
pub fn become_nobody() -> Step {
    let what = "become nobody";
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    setgroups(&[]).map_err(to(what))?;
    setresgid(group, group, group).map_err(to(what))?;
    setresuid(user, user, user).map_err(to(what))
}

/// For good: neither this process nor what it becomes can have any again.
pub fn drop_capabilities() -> Step {
    call_unsafe::drop_capabilities().map_err(|error| ("drop the capabilities", error))
}
