//! Idle upstream connections of one worker.

use std::cell::RefCell;
use std::collections::HashMap;

use crate::net::Socket;

/// Idle connections kept per target.
const IDLE_MAX: usize = 64;

/// Whom a connection leads to. A sandbox is filed under its incarnation, not its address: an address is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// The API.
    Api,
    /// A port of one sandbox at one address.
    Sandbox {
        /// See [`crate::table::Live::incarnation`].
        incarnation: u64,
        /// TCP port.
        port: u16,
    },
}

struct Idle {
    stream: Socket,
    since_ms: u64,
}

/// The pool.
#[derive(Default)]
pub struct Pool {
    idle: RefCell<HashMap<Target, Vec<Idle>>>,
}

impl Pool {
    /// An idle connection, the one used last first.
    pub fn take(&self, target: Target) -> Option<Socket> {
        let mut idle = self.idle.borrow_mut();
        Some(idle.get_mut(&target)?.pop()?.stream)
    }

    /// Keeps a connection whose last exchange ended in good order.
    pub fn give(&self, target: Target, stream: Socket, now_ms: u64) {
        let mut idle = self.idle.borrow_mut();
        let list = idle.entry(target).or_default();
        if list.len() < IDLE_MAX {
            list.push(Idle { stream, since_ms: now_ms });
        }
    }

    /// Closes all connections to a target that has turned out to have closed one.
    pub fn forget(&self, target: Target) {
        self.idle.borrow_mut().remove(&target);
    }

    /// Closes connections idle since before `until_ms`.
    pub fn sweep(&self, until_ms: u64) {
        self.idle.borrow_mut().retain(|_, list| {
            list.retain(|idle| idle.since_ms >= until_ms);
            !list.is_empty()
        });
    }
}
