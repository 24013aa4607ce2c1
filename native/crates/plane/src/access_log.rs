//! One JSON line per request, without queries, headers or anything else that may hold a secret.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::Path;

use serde::Serialize;

/// Written out at this size, and at every sweep.
const FLUSH_BYTES: usize = 32 * 1024;

/// What is noted of a request.
#[derive(Debug, Default, Serialize)]
pub struct Record {
    /// Unix seconds of the end of the request.
    pub ts: f64,
    /// Where it went: `api`, `preview` or `none`.
    pub class: &'static str,
    /// Method.
    pub method: String,
    /// Host header.
    pub host: String,
    /// Path without query.
    pub path: String,
    /// Client's address.
    pub client: String,
    /// Sandbox id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
    /// Status, 0 if none was sent.
    pub status: u16,
    /// Error code of an answer of our own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<&'static str>,
    /// Request id of an answer of our own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// From the end of the request's head to the end of the response.
    pub duration_ms: f64,
    /// From there to the head of the response.
    pub first_byte_ms: f64,
}

/// A worker's end of the log. Lines are whole: each write appends some number of them at once.
pub struct AccessLog {
    file: File,
    lines: Vec<u8>,
    /// Which share of the requests is noted, and how much of a line is due.
    share: f64,
    due: f64,
}

impl AccessLog {
    /// Opens `path` for appending; `-` is standard output. `share` of the requests are noted, and all that fail.
    pub fn open(path: &Path, share: f64) -> io::Result<Self> {
        let file = if path == Path::new("-") {
            File::from(io::stdout().as_fd().try_clone_to_owned()?)
        } else {
            OpenOptions::new().create(true).append(true).open(path)?
        };
        Ok(Self { file, lines: Vec::new(), share, due: 0.0 })
    }

    /// Notes a request, if it is its turn.
    pub fn push(&mut self, record: &Record) {
        self.due += self.share;
        let has_failed = record.code.is_some() || record.status >= 500 || record.status == 0;
        if self.due < 1.0 && !has_failed {
            return;
        }
        self.due = (self.due - 1.0).max(0.0);
        // Serialising to memory cannot fail for this type.
        if serde_json::to_writer(&mut self.lines, record).is_ok() {
            self.lines.push(b'\n');
        }
        if self.lines.len() >= FLUSH_BYTES {
            self.flush();
        }
    }

    /// Writes out what has gathered. A log that cannot be written loses lines, not requests.
    pub fn flush(&mut self) {
        if self.lines.is_empty() {
            return;
        }
        if let Err(error) = self.file.write_all(&self.lines) {
            crate::log::warning("access log lost lines", &error);
        }
        self.lines.clear();
    }
}
