//! What the connections share: processes, timers, worker threads, and who this machine is.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::OpResult;
use crate::files::{ReadStep, WriteStep};
use crate::identity::Identity;
use crate::poller::Poller;
use crate::pool::Pool;
use crate::process::{Host, Processes, Spawned, StreamKey};
use crate::streams::Prepared;
use crate::timers::Timers;
use crate::watch::WatchStep;

/// What a worker thread hands back.
pub struct Done {
    pub key: StreamKey,
    pub outcome: Outcome,
}

pub enum Outcome {
    /// JSON of the reply of an operation that is over with it.
    Reply(OpResult<Vec<u8>>),
    Spawned {
        serial: u64,
        result: OpResult<Spawned>,
    },
    Read(OpResult<ReadStep>),
    Write(OpResult<WriteStep>),
    Watch(OpResult<WatchStep>),
    Prepared(OpResult<Prepared>),
}

pub struct Core {
    pub poller: Poller,
    pub timers: Timers,
    pub pool: Pool<Done>,
    pub processes: Processes,
    pub host: Arc<Host>,
    pub identity: Arc<Identity>,
    pub token: String,
    pub boot_id: String,
    /// Streams of the watches the kernel reports on.
    pub watches: HashMap<u64, StreamKey>,
    next_id: u64,
}

impl Core {
    pub fn new(poller: Poller, pool: Pool<Done>, host: Host, token: String, boot_id: String) -> Self {
        Self {
            poller,
            timers: Timers::default(),
            pool,
            processes: Processes::new(),
            host: Arc::new(host),
            identity: Arc::default(),
            token,
            boot_id,
            watches: HashMap::new(),
            next_id: 1,
        }
    }

    /// A number for a connection or a watch; never given twice.
    pub fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Have a worker thread compute the reply of the stream.
    pub fn call(&self, key: StreamKey, operation: impl FnOnce() -> OpResult<Vec<u8>> + Send + 'static) {
        self.pool.submit(move || Done { key, outcome: Outcome::Reply(operation()) });
    }
}
