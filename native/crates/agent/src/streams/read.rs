//! A file on its way to the client, one chunk per job of a worker thread.

use super::Advance;
use crate::core::{Core, Done, Outcome};
use crate::files::{FileReader, ReadStep};
use crate::process::StreamKey;
use crate::sender::Sender;
use sandgate_frame::{CHANNEL_STDOUT, DATA_BYTES_MAX, Kind, WINDOW_BYTES};

pub struct ReadStream {
    /// Here between two steps, with a worker during one.
    reader: Option<FileReader>,
    step: Option<ReadStep>,
    sent: u64,
    credit: u64,
}

impl ReadStream {
    pub fn new(reader: FileReader) -> Self {
        Self { reader: Some(reader), step: None, sent: 0, credit: WINDOW_BYTES }
    }

    pub fn on_credit(&mut self, bytes: u64) {
        self.credit = self.credit.saturating_add(bytes);
    }

    pub fn on_step(&mut self, step: ReadStep) {
        self.step = Some(step);
    }

    pub fn advance(&mut self, key: StreamKey, sender: &mut Sender, core: &Core) -> Advance {
        if let Some(step) = self.step.take() {
            if let Some(info) = &step.info {
                sender.frame(Kind::Reply, key.stream, info);
            }
            if !step.chunk.is_empty() {
                sender.data(CHANNEL_STDOUT, key.stream, self.sent, [&step.chunk, &[]]);
                self.sent += step.chunk.len() as u64;
                self.credit -= step.chunk.len() as u64;
            }
            if step.is_last {
                sender.end_lazily(CHANNEL_STDOUT, key.stream, self.sent);
                sender.frame(Kind::Close, key.stream, &[]);
                return Advance::Done;
            }
            self.reader = Some(step.reader);
        }
        if self.credit > 0 {
            if let Some(reader) = self.reader.take() {
                let bytes = self.credit.min(DATA_BYTES_MAX as u64) as usize;
                core.pool.submit(move || Done { key, outcome: Outcome::Read(reader.step(bytes)) });
            }
        }
        Advance::Idle
    }
}
