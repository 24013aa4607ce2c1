//! A watch: changes below a path, told as they come.

use super::Advance;
use crate::core::{Core, Done, Outcome};
use crate::poller::{Interest, Token};
use crate::process::StreamKey;
use crate::sender::Sender;
use crate::watch::{WatchStep, Watcher};
use sandgate_frame::Kind;

pub struct WatchStream {
    pub serial: u64,
    /// Here between two steps, with a worker during one.
    watcher: Option<Watcher>,
    replied: bool,
    readable: bool,
    events: Vec<Vec<u8>>,
}

impl WatchStream {
    pub fn new(serial: u64, watcher: Watcher) -> Self {
        Self { serial, watcher: Some(watcher), replied: false, readable: true, events: Vec::new() }
    }

    pub fn on_readable(&mut self) {
        self.readable = true;
    }

    pub fn on_step(&mut self, key: StreamKey, step: WatchStep, core: &mut Core) {
        if let (false, Some(fd)) = (self.replied, step.watcher.fd()) {
            core.watches.insert(self.serial, key);
            core.poller.watch(fd, Interest::Reading, Token::Watch { serial: self.serial });
        }
        self.readable |= step.more;
        self.events = step.events;
        self.watcher = Some(step.watcher);
    }

    pub fn advance(&mut self, key: StreamKey, sender: &mut Sender, core: &Core) -> Advance {
        let Some(watcher) = self.watcher.take() else { return Advance::Idle };
        if !self.replied && watcher.fd().is_some() {
            self.replied = true;
            sender.frame(Kind::Reply, key.stream, b"{}");
        }
        for event in self.events.drain(..) {
            sender.frame(Kind::Event, key.stream, &event);
        }
        if self.readable {
            self.readable = false;
            core.pool.submit(move || Done { key, outcome: Outcome::Watch(watcher.step()) });
        } else {
            self.watcher = Some(watcher);
        }
        Advance::Idle
    }
}
