//! What the API wants of a process whose output it orders, and in which words.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::lines::{Lines, fill};
use super::machine::Trouble;

/// The signals of Linux by number.
const SIGNALS: [&str; 32] = [
    "",
    "SIGHUP",
    "SIGINT",
    "SIGQUIT",
    "SIGILL",
    "SIGTRAP",
    "SIGABRT",
    "SIGBUS",
    "SIGFPE",
    "SIGKILL",
    "SIGUSR1",
    "SIGSEGV",
    "SIGUSR2",
    "SIGPIPE",
    "SIGALRM",
    "SIGTERM",
    "SIGSTKFLT",
    "SIGCHLD",
    "SIGCONT",
    "SIGSTOP",
    "SIGTSTP",
    "SIGTTIN",
    "SIGTTOU",
    "SIGURG",
    "SIGXCPU",
    "SIGXFSZ",
    "SIGVTALRM",
    "SIGPROF",
    "SIGWINCH",
    "SIGIO",
    "SIGPWR",
    "SIGSYS",
];

/// What the API wants of a process, and in which words.
#[derive(Debug, Deserialize)]
pub struct Wanted {
    /// The operation that starts the process or attaches to it.
    op: Map<String, Value>,
    /// Before the first frame.
    pub opening: String,
    /// In pauses.
    pub heartbeat: String,
    /// What stands around a line of each channel.
    stdout: (Box<str>, Box<str>),
    stderr: (Box<str>, Box<str>),
    /// The last frame of a process that ended, and of a stream that failed.
    exit: String,
    error: String,
    /// The body of an answer that could not begin.
    refusal: String,
    /// The API's words for the codes of hostd and the agent; `internal` for all others.
    errors: HashMap<String, Spelling>,
}

/// How the API spells an error.
#[derive(Clone, Debug, Deserialize)]
struct Spelling {
    status: u16,
    code: String,
    /// Instead of what was said.
    message: Option<String>,
    /// Whether the cause is told.
    #[serde(default)]
    with_cause: bool,
}

/// An answer instead of a stream.
#[derive(Debug)]
pub struct Refusal {
    /// Its status.
    pub status: u16,
    /// Its content, JSON.
    pub body: Vec<u8>,
}

impl Wanted {
    /// The API's status, code and message for trouble.
    fn spell(&self, trouble: &Trouble) -> (u16, String, String) {
        let known = self.errors.get(&trouble.code).or_else(|| self.errors.get("internal"));
        let (status, code) = known.map_or((500, "internal"), |known| (known.status, &known.code));
        let mut message = known.and_then(|known| known.message.clone()).unwrap_or_else(|| trouble.message.clone());
        if let (Some(Spelling { with_cause: true, .. }), Some(cause)) = (known, &trouble.detail) {
            message = format!("{message} ({cause})");
        }
        (status, code.to_owned(), format!("{}.", message.trim_end_matches('.')))
    }

    /// The answer when nothing was sent yet.
    pub fn refuse(&self, trouble: &Trouble) -> Refusal {
        let (status, code, message) = self.spell(trouble);
        Refusal { status, body: fill(&self.refusal, &[("code", &code), ("message", &message)]) }
    }

    /// The operation that goes on with a process.
    pub fn attach(&self, id: &str, offsets: &[u64; 4]) -> Vec<u8> {
        let offsets: Map<_, _> = (1..4).map(|channel| (channel.to_string(), json!(offsets[channel]))).collect();
        let mut op = json!({"op": "attach", "id": id, "offsets": offsets});
        for name in ["to", "passive", "ends_with_client"] {
            if let Some(value) = self.op.get(name) {
                op[name] = value.clone();
            }
        }
        op.to_string().into_bytes()
    }

    /// The operation itself.
    pub fn open(&self) -> Vec<u8> {
        Value::from(self.op.clone()).to_string().into_bytes()
    }

    /// Standard output, standard error, terminal.
    pub fn channels(&self) -> [Lines; 3] {
        [&self.stdout, &self.stderr, &self.stdout].map(|around| Lines::new(around.clone()))
    }

    /// The last frame of a stream that failed.
    pub fn fail(&self, trouble: &Trouble) -> Vec<u8> {
        let (_, code, message) = self.spell(trouble);
        fill(&self.error, &[("code", &code), ("message", &message)])
    }

    /// The last frame of a process, which ended as the event says.
    pub fn end(&self, event: &Value) -> Vec<u8> {
        let number = |name: &str| event.get(name).and_then(Value::as_i64).unwrap_or_default().to_string();
        let signal = event.get("signal").and_then(Value::as_str).filter(|name| !name.is_empty());
        let signal = signal.and_then(|name| SIGNALS.iter().position(|known| *known == name));
        let values = [
            ("exit_code", number("exit_code")),
            ("signal", signal.map_or_else(|| "null".to_owned(), |number| number.to_string())),
            ("reason", event.get("reason").and_then(Value::as_str).unwrap_or_default().to_owned()),
            ("duration_ms", number("duration_ms")),
        ];
        fill(&self.exit, &values.each_ref().map(|(name, value)| (*name, value.as_str())))
    }
}
