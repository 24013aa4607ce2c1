//! Open streams of a connection: each is one operation under way.

mod exec;
mod read;
mod setup;
mod watch;
mod write;

pub use exec::ExecStream;
pub use read::ReadStream;
pub use setup::{Prepared, SetIdentity, SetupStream};
pub use watch::WatchStream;
pub use write::WriteStream;

use crate::core::{Core, Outcome};
use crate::error::{OpError, OpResult};
use crate::process::StreamKey;
use crate::sender::Sender;

/// What a stream wants after it was given a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advance {
    /// Nothing to do until something happens.
    Idle,
    /// There is more; let the others go first.
    Again,
    /// It is over and has said so.
    Done,
}

pub enum Stream {
    /// A worker computes its reply.
    Call,
    Exec(ExecStream),
    Read(ReadStream),
    Write(WriteStream),
    Watch(WatchStream),
    Setup(SetupStream),
}

impl Stream {
    /// Send what may be sent and start what may be started. An error ends the stream.
    pub fn advance(&mut self, key: StreamKey, sender: &mut Sender, core: &mut Core) -> OpResult<Advance> {
        match self {
            Self::Call => Ok(Advance::Idle),
            Self::Exec(stream) => stream.advance(key, sender, core),
            Self::Read(stream) => Ok(stream.advance(key, sender, core)),
            Self::Write(stream) => Ok(stream.advance(key, sender, core)),
            Self::Watch(stream) => Ok(stream.advance(key, sender, core)),
            Self::Setup(stream) => stream.advance(key, sender, core),
        }
    }

    /// `DATA` from the client.
    pub fn on_data(&mut self, key: StreamKey, core: &mut Core, offset: u64, bytes: &[u8]) -> OpResult<()> {
        match self {
            Self::Exec(stream) => stream.on_data(key, core, offset, bytes),
            Self::Write(stream) => stream.on_data(offset, bytes),
            _ => Err(OpError::bad_request("this operation takes no input")),
        }
    }

    /// `END` from the client.
    pub fn on_end(&mut self, core: &mut Core, total: u64) -> OpResult<()> {
        match self {
            Self::Exec(stream) => {
                stream.on_end(core);
                Ok(())
            }
            Self::Write(stream) => stream.on_end(total),
            _ => Err(OpError::bad_request("this operation takes no input")),
        }
    }

    /// `CREDIT` from the client.
    pub fn on_credit(&mut self, key: StreamKey, core: &mut Core, channel: u8, bytes: u64) {
        match self {
            Self::Exec(stream) => stream.on_credit(key, core, channel, bytes),
            Self::Read(stream) => stream.on_credit(bytes),
            _ => {}
        }
    }

    /// `CONTROL` from the client.
    pub fn on_control(&mut self, core: &mut Core, payload: &[u8]) -> OpResult<()> {
        match self {
            Self::Exec(stream) => stream.on_control(core, payload),
            _ => Err(OpError::bad_request("this operation takes no control")),
        }
    }

    /// A worker is done with the stream's last step.
    pub fn on_outcome(&mut self, key: StreamKey, outcome: Outcome, core: &mut Core) -> OpResult<()> {
        match (self, outcome) {
            (Self::Read(stream), Outcome::Read(step)) => stream.on_step(step?),
            (Self::Write(stream), Outcome::Write(step)) => stream.on_step(step?),
            (Self::Watch(stream), Outcome::Watch(step)) => stream.on_step(key, step?, core),
            (Self::Setup(stream), Outcome::Prepared(paths)) => stream.on_prepared(paths?),
            _ => {}
        }
        Ok(())
    }

    /// The client is gone or not interested any more.
    pub fn abandon(self, key: StreamKey, core: &mut Core) {
        match self {
            Self::Exec(stream) => core.processes.detach(stream.serial, key, &mut core.timers),
            Self::Watch(stream) => drop(core.watches.remove(&stream.serial)),
            Self::Setup(stream) => stream.abandon(key, core),
            // What a worker holds is dropped when it comes back; an unfinished write removes its file.
            Self::Call | Self::Read(_) | Self::Write(_) => {}
        }
    }
}
