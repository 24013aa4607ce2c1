//! Taking the token out of the environment before anybody can read it there.
//!
//! Removing the variable only unlinks it; the bytes stay on the initial stack, where `/proc/<pid>/environ` shows them.
//!
//! Invariant: called before any thread exists, so nobody else reads or changes the environment.
#![allow(unsafe_code)]

use std::ffi::CString;

/// The value of `name`, which is gone from the environment and overwritten where it was.
pub fn take(name: &str) -> Option<String> {
    let value = std::env::var(name).ok();
    let key = CString::new(name).ok()?;
    // SAFETY: see the module's invariant. getenv points into the environment block, which is ours and writable; strlen
    // bytes before its terminator are overwritten, the terminator stays.
    unsafe {
        let bytes = libc::getenv(key.as_ptr());
        if !bytes.is_null() {
            libc::explicit_bzero(bytes.cast(), libc::strlen(bytes));
        }
        std::env::remove_var(name);
    }
    value
}
