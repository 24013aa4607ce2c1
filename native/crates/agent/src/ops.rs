//! The operations a client may `OPEN` (docs/protocol.md, "Agent operations"): arguments in, stream or reply out.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::core::{Core, Done, Outcome};
use crate::error::{Code, OpError, OpResult};
use crate::files;
use crate::metrics;
use crate::ports;
use crate::process::{
    Asked, Command, Draft, From, Record, Request, Size, State, StreamKey, Wanted, signal, signal_from_json, spawn,
    warm_up,
};
use crate::streams::{ExecStream, ReadStream, SetIdentity, SetupStream, Stream, WatchStream, WriteStream};
use crate::watch::{WatchArguments, Watcher};
use sandgate_frame::WINDOW_BYTES;

const ID_CHARS_MAX: usize = 64;
const NAME_CHARS_MAX: usize = 256;
const LOG_BYTES_MAX: usize = 64 * 1024 * 1024;

/// What became of an `OPEN` that was not refused.
pub enum Opened {
    Stream(Box<Stream>),
    /// Answered at once: JSON of the reply.
    Reply(Vec<u8>),
}

#[derive(Deserialize)]
struct Op {
    op: String,
}

/// Start the operation a client asks for.
pub fn open(key: StreamKey, payload: &[u8], core: &mut Core) -> OpResult<Opened> {
    let Op { op } = parse(payload)?;
    match op.as_str() {
        "exec" => exec(key, parse(payload)?, core),
        "attach" => attach(key, &parse(payload)?, core),
        "processes" => Ok(Opened::Reply(processes(core)?)),
        "process" => describe(&parse(payload)?, core),
        "signal" => send_signal(&parse(payload)?, core),
        "stdin" => write_stdin(&parse(payload)?, core),
        "identity" => set_identity(parse(payload)?, core),
        "hooks" => Ok(opened(Stream::Setup(SetupStream::hooks(&parse(payload)?)?))),
        "warm_up" => {
            let (host, identity) = (Arc::clone(&core.host), Arc::clone(&core.identity));
            Ok(call(key, core, move || {
                warm_up(&host, &identity);
                Ok(b"{}".to_vec())
            }))
        }
        "read" => Ok(opened(Stream::Read(ReadStream::new(files::FileReader::new(parse(payload)?))))),
        "write" => {
            let writer = files::FileWriter::new(parse(payload)?, Arc::clone(&core.host));
            Ok(opened(Stream::Write(WriteStream::new(writer))))
        }
        "watch" => {
            let arguments: WatchArguments = parse(payload)?;
            Ok(opened(Stream::Watch(WatchStream::new(core.next_id(), Watcher::new(arguments)))))
        }
        "ports" => Ok(call(key, core, || to_json(&ports::listening()?))),
        "metrics" => Ok(call(key, core, || to_json(&metrics::measure()?))),
        other => file_call(other, key, payload, core),
    }
}

/// Operations on paths that are answered by one reply.
fn file_call(op: &str, key: StreamKey, payload: &[u8], core: &Core) -> OpResult<Opened> {
    macro_rules! on_worker {
        ($function:path) => {{
            let arguments = parse(payload)?;
            let host = Arc::clone(&core.host);
            Ok(call(key, core, move || to_json(&$function(&arguments, &host.users)?)))
        }};
    }
    match op {
        "stat" => on_worker!(files::stat),
        "list" => on_worker!(files::list),
        "mkdir" => on_worker!(files::mkdir),
        "rename" => on_worker!(files::rename),
        "copy" => on_worker!(files::copy),
        "chmod" => on_worker!(files::chmod),
        "chown" => on_worker!(files::chown),
        "remove" => on_worker!(files::remove),
        other => Err(OpError::new(Code::Unsupported, format!("there is no operation {other:?}"))),
    }
}

fn call(key: StreamKey, core: &Core, operation: impl FnOnce() -> OpResult<Vec<u8>> + Send + 'static) -> Opened {
    core.call(key, operation);
    opened(Stream::Call)
}

fn opened(stream: Stream) -> Opened {
    Opened::Stream(Box::new(stream))
}

fn parse<T: DeserializeOwned>(payload: &[u8]) -> OpResult<T> {
    serde_json::from_slice(payload).map_err(|error| OpError::bad_request(error.to_string()))
}

fn to_json(value: &impl serde::Serialize) -> OpResult<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| OpError::new(Code::IoError, format!("cannot encode the reply: {error}")))
}

#[derive(Deserialize)]
struct Exec {
    id: String,
    argv: Option<Vec<String>>,
    shell: Option<String>,
    cwd: Option<String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    user: Option<String>,
    timeout_s: Option<f64>,
    #[serde(default)]
    stdin: bool,
    pty: Option<Size>,
    #[serde(default)]
    background: bool,
    name: Option<String>,
    log_bytes_max: Option<usize>,
    #[serde(default)]
    offsets: BTreeMap<u8, u64>,
}

fn exec(key: StreamKey, arguments: Exec, core: &mut Core) -> OpResult<Opened> {
    let from = start_from(&arguments.offsets, None)?;
    if let Some(serial) = core.processes.serial_of(&arguments.id) {
        return attach_to(serial, key, Asked::Exec { resumed: true }, true, from, core);
    }
    let draft = Draft {
        command: command(&arguments)?,
        id: checked(arguments.id, "id", ID_CHARS_MAX)?,
        name: arguments.name.map(|name| checked(name, "name", NAME_CHARS_MAX)).transpose()?,
        background: arguments.background,
        timeout_s: arguments.timeout_s.map(checked_timeout).transpose()?,
        log_bytes_max: checked_log_bytes(arguments.log_bytes_max)?,
    };
    check_env(&arguments.env)?;
    let request = Request {
        command: draft.command.clone(),
        cwd: arguments.cwd.map(files::checked_path).transpose()?,
        env: arguments.env,
        user: arguments.user,
        stdin: arguments.stdin,
        pty: arguments.pty,
    };
    let serial = core.processes.begin(|serial| draft.into_process(serial))?;
    let opened = attach_to(serial, key, Asked::Exec { resumed: false }, true, from, core)?;
    let (host, identity) = (Arc::clone(&core.host), Arc::clone(&core.identity));
    core.pool.submit(move || {
        let result = spawn(&request, &host, &identity);
        Done { key, outcome: Outcome::Spawned { serial, result } }
    });
    Ok(opened)
}

fn command(arguments: &Exec) -> OpResult<Command> {
    match (&arguments.argv, &arguments.shell) {
        (Some(argv), None) if argv.first().is_some_and(|program| !program.is_empty()) => {
            Ok(Command::Argv(argv.clone()))
        }
        (None, Some(line)) => Ok(Command::Shell(line.clone())),
        _ => Err(OpError::bad_request("either argv with a program or shell must be given")),
    }
}

fn checked(text: String, what: &str, chars_max: usize) -> OpResult<String> {
    if text.is_empty() || text.chars().count() > chars_max {
        return Err(OpError::bad_request(format!("{what} must have 1 to {chars_max} characters")));
    }
    Ok(text)
}

fn checked_timeout(seconds: f64) -> OpResult<f64> {
    if seconds.is_finite() && seconds > 0.0 {
        return Ok(seconds);
    }
    Err(OpError::bad_request("timeout_s must be a positive number"))
}

fn checked_log_bytes(bytes: Option<usize>) -> OpResult<usize> {
    match bytes.unwrap_or(WINDOW_BYTES as usize) {
        bytes @ 1..=LOG_BYTES_MAX => Ok(bytes),
        _ => Err(OpError::bad_request(format!("log_bytes_max must be from 1 to {LOG_BYTES_MAX}"))),
    }
}

fn check_env(env: &BTreeMap<String, String>) -> OpResult<()> {
    match env.iter().find(|(key, value)| key.is_empty() || key.contains(['=', '\0']) || value.contains('\0')) {
        Some((key, _)) => Err(OpError::bad_request(format!("{key:?} cannot be an environment variable"))),
        None => Ok(()),
    }
}

fn start_from(offsets: &BTreeMap<u8, u64>, tail_bytes: Option<u64>) -> OpResult<From> {
    let mut from = From { tail_bytes, ..From::default() };
    for (channel, offset) in offsets {
        let slot = from.offsets.get_mut(usize::from(*channel));
        *slot.ok_or_else(|| OpError::bad_request(format!("there is no channel {channel}")))? = Some(*offset);
    }
    Ok(from)
}

fn attach_to(serial: u64, key: StreamKey, asked: Asked, follow: bool, from: From, core: &mut Core) -> OpResult<Opened> {
    if let Some(process) = core.processes.get(serial) {
        process.attach(key, asked, follow, from).map_err(OpError::bad_request)?;
        core.processes.reader_came(serial);
    }
    Ok(opened(Stream::Exec(ExecStream { serial })))
}

#[derive(Deserialize)]
struct Attach {
    #[serde(flatten)]
    wanted: Wanted,
    #[serde(default)]
    offsets: BTreeMap<String, u64>,
    tail_bytes: Option<u64>,
    #[serde(default = "yes")]
    follow: bool,
}

fn yes() -> bool {
    true
}

fn attach(key: StreamKey, arguments: &Attach, core: &mut Core) -> OpResult<Opened> {
    let offsets = arguments.offsets.iter().map(|(channel, offset)| {
        let channel = channel.parse().map_err(|_| OpError::bad_request(format!("there is no channel {channel:?}")))?;
        Ok((channel, *offset))
    });
    let from = start_from(&offsets.collect::<OpResult<_>>()?, arguments.tail_bytes)?;
    let serial = core.processes.find(&arguments.wanted)?.serial;
    attach_to(serial, key, Asked::Attach, arguments.follow, from, core)
}

/// A record has a pid: what its thread is still starting is no process yet.
fn describe(wanted: &Wanted, core: &mut Core) -> OpResult<Opened> {
    let process = core.processes.find(wanted)?;
    if process.state == State::Starting {
        return Err(OpError::new(Code::NoSuchProcess, "the process is only starting"));
    }
    Ok(Opened::Reply(to_json(&Record::of(process))?))
}

fn processes(core: &Core) -> OpResult<Vec<u8>> {
    let all = core.processes.all().into_iter();
    let records: Vec<_> = all.filter(|process| process.state != State::Starting).map(Record::of).collect();
    to_json(&json!({"processes": records}))
}

#[derive(Deserialize)]
struct SendSignal {
    #[serde(flatten)]
    wanted: Wanted,
    signal: Value,
    #[serde(default = "yes")]
    group: bool,
}

fn send_signal(arguments: &SendSignal, core: &mut Core) -> OpResult<Opened> {
    let which = signal_from_json(&arguments.signal)?;
    let process = core.processes.find(&arguments.wanted)?;
    match process.state {
        State::Running => signal(process, which, arguments.group),
        State::Starting => return Err(OpError::new(Code::NoSuchProcess, "the process is only starting")),
        State::Exited | State::Finished => return Err(exited()),
    }
    Ok(Opened::Reply(to_json(&Record::of(process))?))
}

fn exited() -> OpError {
    OpError::new(Code::ProcessExited, "the process has exited")
}

#[derive(Deserialize)]
struct Stdin {
    #[serde(flatten)]
    wanted: Wanted,
    #[serde(default)]
    data_base64: String,
    #[serde(default)]
    eof: bool,
}

fn write_stdin(arguments: &Stdin, core: &mut Core) -> OpResult<Opened> {
    let bytes =
        BASE64.decode(&arguments.data_base64).map_err(|error| OpError::bad_request(format!("data_base64: {error}")))?;
    let process = core.processes.find(&arguments.wanted)?;
    if matches!(process.state, State::Exited | State::Finished) {
        return Err(exited());
    }
    if !process.input.is_open() {
        return Err(OpError::bad_request("the process's input is closed"));
    }
    let written = process.input.push(&bytes);
    if arguments.eof && written == bytes.len() {
        process.input.end();
    }
    Ok(Opened::Reply(to_json(&json!({"written": written}))?))
}

fn set_identity(arguments: SetIdentity, core: &mut Core) -> OpResult<Opened> {
    arguments.check()?;
    check_env(&arguments.env)?;
    if arguments.is_quick() {
        // In order with what the client asks for next, without waiting for the answer.
        arguments.write_files()?;
        arguments.take_effect(core)?;
        return Ok(Opened::Reply(SetupStream::NOTHING_RAN.to_vec()));
    }
    Ok(opened(Stream::Setup(SetupStream::identity(arguments)?)))
}
