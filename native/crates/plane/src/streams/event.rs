//! Events as they are published and sent.

use std::ops::Range;
use std::sync::Arc;

use serde::Deserialize;

/// Sent when nothing else was for a while, so that clients and proxies keep the connection.
const HEARTBEAT: &str = ": heartbeat\n\n";

/// One event, framed once for all who get it.
#[derive(Debug)]
pub struct Event {
    /// Its place in the log.
    pub seq: u64,
    /// Whose log.
    pub topic: Box<str>,
    /// Its type, such as `sandbox.created`.
    pub kind: Box<str>,
    /// What it is about.
    pub resource_type: Box<str>,
    /// Which one.
    pub resource_id: Box<str>,
    /// The frame as one chunk of the chunked coding.
    chunk: Box<[u8]>,
    content: Range<usize>,
}

impl Event {
    /// What a subscriber is sent; `is_unchunked`: for one of HTTP/1.0.
    pub fn bytes(&self, is_unchunked: bool) -> &[u8] {
        if is_unchunked { &self.chunk[self.content.clone()] } else { &self.chunk }
    }

    /// The comment that keeps a quiet stream alive.
    pub fn heartbeat() -> Arc<Self> {
        let record = Record { frame: HEARTBEAT.to_owned(), ..Record::default() };
        Arc::new(record.into())
    }
}

/// An event as the API publishes it.
#[derive(Debug, Default, Deserialize)]
pub struct Record {
    seq: u64,
    topic: Box<str>,
    #[serde(rename = "type")]
    kind: Box<str>,
    resource_type: Box<str>,
    resource_id: Box<str>,
    frame: String,
}

impl From<Record> for Event {
    fn from(record: Record) -> Self {
        let Record { seq, topic, kind, resource_type, resource_id, frame } = record;
        let mut chunk = format!("{:x}\r\n", frame.len()).into_bytes();
        let start = chunk.len();
        chunk.extend_from_slice(frame.as_bytes());
        let content = start..chunk.len();
        chunk.extend_from_slice(b"\r\n");
        Self { seq, topic, kind, resource_type, resource_id, chunk: chunk.into(), content }
    }
}

/// A stretch of the log: every event after `after` up to and including `through`.
#[derive(Debug)]
pub struct Batch {
    /// Where it begins.
    pub after: u64,
    /// Where it ends.
    pub through: u64,
    /// What lies between, in order.
    pub events: Vec<Arc<Event>>,
}

impl Batch {
    /// The records as a batch; none if they do not lie between the two in order, or one of them is empty.
    pub fn new(after: u64, through: u64, records: Vec<Record>) -> Option<Self> {
        let mut last = after;
        for record in &records {
            // An event may come in several topics' words: then it does so at once.
            let is_in_order = record.seq > after && record.seq >= last && record.seq <= through;
            if !is_in_order || record.frame.is_empty() {
                return None;
            }
            last = record.seq;
        }
        let events = records.into_iter().map(|record| Arc::new(record.into())).collect();
        (after <= through).then_some(Self { after, through, events })
    }
}
