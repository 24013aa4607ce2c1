//! The terminal request nix has no safe call for.
//!
//! Invariant: `TIOCSWINSZ` reads exactly one `winsize` from the pointer it is given, which outlives the call.
#![allow(unsafe_code)]

use std::os::fd::RawFd;

nix::ioctl_write_ptr_bad!(tiocswinsz, libc::TIOCSWINSZ, libc::winsize);

/// Set the size of the terminal behind `fd`.
pub fn set_window_size(fd: RawFd, rows: u16, cols: u16) -> nix::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: a pointer to a live `winsize`.
    unsafe { tiocswinsz(fd, &raw const size) }.map(drop)
}
