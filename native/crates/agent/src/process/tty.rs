//! Pseudo-terminals, opened the old way: gVisor has neither `TIOCGPTPEER` nor `/dev/tty`.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::pty::{PtyMaster, posix_openpt, ptsname_r, unlockpt};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, fchown};

use super::tty_unsafe;
use crate::users::User;

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, serde::Deserialize)]
pub struct Size {
    pub rows: u16,
    pub cols: u16,
}

/// The agent's and the program's end of a new terminal.
pub struct Pair {
    pub master: OwnedFd,
    pub slave: OwnedFd,
}

/// A terminal of `size` that belongs to `user`.
pub fn open_pair(size: Size, user: &User) -> nix::Result<Pair> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master: PtyMaster = posix_openpt(flags | OFlag::O_NONBLOCK)?;
    unlockpt(&master)?;
    let slave = open(ptsname_r(&master)?.as_str(), flags, Mode::empty())?;
    // The program holds the descriptor already; owning the node only lets it open the path again (`tty`, `mesg`).
    match fchown(&slave, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid))) {
        Ok(()) | Err(Errno::EPERM) => {}
        Err(errno) => return Err(errno),
    }
    let master = OwnedFd::from(master);
    resize(&master, size)?;
    Ok(Pair { master, slave })
}

/// Tell the terminal, and by `SIGWINCH` its programs, how large it is.
pub fn resize(master: &OwnedFd, size: Size) -> nix::Result<()> {
    tty_unsafe::set_window_size(master.as_raw_fd(), size.rows, size.cols)
}
