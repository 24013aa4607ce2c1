//! A file on its way from the client: what has come in since the last step goes to a worker thread as one job.

use super::Advance;
use crate::core::{Core, Done, Outcome};
use crate::error::{OpError, OpResult};
use crate::files::{FileWriter, WriteStep};
use crate::process::StreamKey;
use crate::sender::Sender;
use sandgate_frame::{CHANNEL_INPUT, Kind, WINDOW_BYTES};

pub struct WriteStream {
    /// Here between two steps, with a worker during one.
    writer: Option<FileWriter>,
    opened: bool,
    chunks: Vec<Vec<u8>>,
    waiting: u64,
    received: u64,
    ended: bool,
    finished: Option<Vec<u8>>,
    /// Credit to return once the worker has written that much.
    written: u64,
}

impl WriteStream {
    pub fn new(writer: FileWriter) -> Self {
        Self {
            writer: Some(writer),
            opened: false,
            chunks: Vec::new(),
            waiting: 0,
            received: 0,
            ended: false,
            finished: None,
            written: 0,
        }
    }

    pub fn on_data(&mut self, offset: u64, bytes: &[u8]) -> OpResult<()> {
        if self.ended || offset != self.received {
            return Err(OpError::bad_request(format!("content at offset {offset}, expected {}", self.received)));
        }
        if self.waiting + bytes.len() as u64 > WINDOW_BYTES {
            return Err(OpError::bad_request("more content than the credit allows"));
        }
        self.waiting += bytes.len() as u64;
        self.received += bytes.len() as u64;
        self.chunks.push(bytes.to_vec());
        Ok(())
    }

    pub fn on_end(&mut self, total: u64) -> OpResult<()> {
        if self.ended || total != self.received {
            let received = self.received;
            return Err(OpError::bad_request(format!("the end at {total} bytes, but {received} were sent")));
        }
        self.ended = true;
        Ok(())
    }

    pub fn on_step(&mut self, step: WriteStep) {
        self.written += step.written;
        self.waiting -= step.written;
        self.finished = step.reply;
        self.writer = step.writer;
    }

    pub fn advance(&mut self, key: StreamKey, sender: &mut Sender, core: &Core) -> Advance {
        if let Some(reply) = self.finished.take() {
            sender.frame(Kind::Reply, key.stream, &reply);
            sender.frame(Kind::Close, key.stream, &[]);
            return Advance::Done;
        }
        if self.written > 0 && !self.ended {
            sender.credit(CHANNEL_INPUT, key.stream, std::mem::take(&mut self.written));
        }
        // The first step opens the file, so that a path that cannot be written is known before its content is sent.
        if self.opened && self.chunks.is_empty() && !self.ended {
            return Advance::Idle;
        }
        if let Some(writer) = self.writer.take() {
            self.opened = true;
            let chunks = std::mem::take(&mut self.chunks);
            let ended = self.ended;
            core.pool.submit(move || Done { key, outcome: Outcome::Write(writer.step(&chunks, ended)) });
        }
        Advance::Idle
    }
}
