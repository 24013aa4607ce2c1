//! A copy of a machine made itself, and the hooks of a stage: `identity` and `hooks`.
//!
//! ```text
//!  begun ──worker: files, which hooks──▶ named (host name, environment, token) ──▶ hook ⟲ ──▶ reply
//! ```
//! The files come first, as only they can fail halfway; the rest takes effect at one instant. Nothing here depends on
//! what was done before, so that the same request may be repeated.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use super::Advance;
use crate::core::{Core, Done, Outcome};
use crate::error::{OpError, OpResult};
use crate::files;
use crate::hooks::{self, Stage};
use crate::identity::Identity;
use crate::process::{Asked, Command, Draft, From, Process, Request, State, StreamKey, spawn};
use crate::sender::Sender;
use crate::users;
use sandgate_frame::Kind;

const TOKEN_CHARS_MAX: usize = 256;
const ENTROPY_BYTES_MAX: usize = 4096;
const QUICK_FILES_MAX: usize = 4;
const RANDOM_DEVICE: &str = "/dev/urandom";
const HOOKS_TIMEOUT_DEFAULT_S: f64 = 5.0;
const HOOKS_TIMEOUT_MAX_S: f64 = 300.0;
/// Of a hook's output, its end: enough for the message of a failure.
const HOOK_OUTPUT_BYTES: usize = 2048;

/// Arguments of `identity`.
#[derive(Deserialize)]
pub struct SetIdentity {
    hostname: Option<String>,
    #[serde(default)]
    reset: bool,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    #[serde(default)]
    unset: Vec<String>,
    token: Option<String>,
    #[serde(default)]
    files: BTreeMap<String, String>,
    #[serde(default)]
    entropy: String,
    hooks: Option<Stage>,
    timeout_s: Option<f64>,
}

impl SetIdentity {
    pub fn check(&self) -> OpResult<()> {
        if let Some(token) = &self.token {
            if token.is_empty() || token.chars().count() > TOKEN_CHARS_MAX {
                return Err(OpError::bad_request(format!("token must have 1 to {TOKEN_CHARS_MAX} characters")));
            }
        }
        if self.entropy.len() > ENTROPY_BYTES_MAX {
            return Err(OpError::bad_request(format!("entropy must have at most {ENTROPY_BYTES_MAX} bytes")));
        }
        self.files.keys().try_for_each(|path| files::checked_path(path.clone()).map(drop))
    }

    /// A few small files at most and no process: done here, for waking a worker would take longer. In gVisor that is
    /// half a millisecond, and a claim waits for it.
    pub fn is_quick(&self) -> bool {
        self.files.len() <= QUICK_FILES_MAX && self.entropy.is_empty() && self.hooks.is_none()
    }

    /// Write the files, each at one instant.
    pub fn write_files(&self) -> OpResult<()> {
        self.files.iter().try_for_each(|(path, text)| files::replace(path, text))
    }

    /// Host name, environment and token, at one instant; on an error none of them.
    pub fn take_effect(self, core: &mut Core) -> OpResult<()> {
        if let Some(hostname) = &self.hostname {
            nix::unistd::sethostname(hostname)
                .map_err(|errno| OpError::of_errno(errno, &format!("cannot set the host name {hostname:?}")))?;
        }
        if let Some(token) = self.token {
            core.token = token;
        }
        let known = Arc::make_mut(&mut core.identity);
        if self.reset {
            *known = Identity::default();
        }
        known.update(self.env, self.unset);
        Ok(())
    }
}

/// Arguments of `hooks`.
#[derive(Deserialize)]
pub struct RunHooks {
    stage: Stage,
    timeout_s: Option<f64>,
}

/// What a worker finds out or does before anything else changes; the paths of the hooks to run.
pub type Prepared = Vec<String>;

pub struct SetupStream {
    /// Taken when it takes effect.
    identity: Option<SetIdentity>,
    stage: Option<Stage>,
    timeout: Duration,
    deadline: Option<Instant>,
    is_begun: bool,
    /// Hooks still to run, the next one last.
    waiting: Option<Prepared>,
    running: Option<(u64, String)>,
    ran: Vec<String>,
    failed: Vec<Value>,
}

impl SetupStream {
    /// The reply when there were no hooks.
    pub const NOTHING_RAN: &[u8] = br#"{"ran":[],"failed":[]}"#;

    pub fn identity(arguments: SetIdentity) -> OpResult<Self> {
        let (stage, timeout) = (arguments.hooks, hooks_timeout(arguments.timeout_s)?);
        Ok(Self::new(Some(arguments), stage, timeout))
    }

    pub fn hooks(arguments: &RunHooks) -> OpResult<Self> {
        Ok(Self::new(None, Some(arguments.stage), hooks_timeout(arguments.timeout_s)?))
    }

    fn new(identity: Option<SetIdentity>, stage: Option<Stage>, timeout: Duration) -> Self {
        Self {
            identity,
            stage,
            timeout,
            deadline: None,
            is_begun: false,
            waiting: None,
            running: None,
            ran: Vec::new(),
            failed: Vec::new(),
        }
    }

    pub fn advance(&mut self, key: StreamKey, sender: &mut Sender, core: &mut Core) -> OpResult<Advance> {
        if !self.is_begun {
            self.is_begun = true;
            self.begin(key, core);
        }
        if self.waiting.is_none() {
            return Ok(Advance::Idle);
        }
        if let Some(identity) = self.identity.take() {
            identity.take_effect(core)?;
        }
        if self.deadline.is_none() {
            self.deadline = Some(Instant::now() + self.timeout);
        }
        if !self.is_last_hook_over(core) || self.start_next(key, core) {
            return Ok(Advance::Idle);
        }
        let reply = json!({"ran": self.ran, "failed": self.failed}).to_string();
        sender.frame(Kind::Reply, key.stream, reply.as_bytes());
        sender.frame(Kind::Close, key.stream, &[]);
        Ok(Advance::Done)
    }

    pub fn on_prepared(&mut self, mut paths: Prepared) {
        paths.reverse();
        self.waiting = Some(paths);
    }

    /// A hook could not be started.
    pub fn on_start_failed(&mut self, error: &OpError) {
        if let Some((_, path)) = self.running.take() {
            self.failed.push(json!({"path": path, "reason": error.code.as_str(), "output": error.message}));
        }
    }

    /// The client is gone: a hook that runs ends by itself or at its time, the rest do not start.
    pub fn abandon(self, key: StreamKey, core: &mut Core) {
        if let Some((serial, _)) = self.running {
            core.processes.detach(serial, key, &mut core.timers);
        }
    }

    fn begin(&mut self, key: StreamKey, core: &Core) {
        let texts = self.identity.as_mut().map(|identity| std::mem::take(&mut identity.files)).unwrap_or_default();
        let entropy = self.identity.as_mut().map(|identity| std::mem::take(&mut identity.entropy)).unwrap_or_default();
        let (host, stage) = (Arc::clone(&core.host), self.stage);
        core.pool.submit(move || {
            let prepare = || -> OpResult<Prepared> {
                for (path, text) in &texts {
                    files::replace(path, text)?;
                }
                stir(&entropy);
                stage.map_or(Ok(Vec::new()), |stage| hooks::find(&host.hooks, stage))
            };
            Done { key, outcome: Outcome::Prepared(prepare()) }
        });
    }

    /// Whether no hook runs; one that has just ended is put down.
    fn is_last_hook_over(&mut self, core: &mut Core) -> bool {
        let Some((serial, path)) = &self.running else { return true };
        if let Some(process) = core.processes.get(*serial) {
            if process.state != State::Finished {
                return false;
            }
            match failure(process, path) {
                None => self.ran.push(path.clone()),
                Some(failure) => self.failed.push(failure),
            }
        }
        core.processes.dismiss(*serial);
        self.running = None;
        true
    }

    /// Start the next hook, if there is one and there is time left.
    fn start_next(&mut self, key: StreamKey, core: &mut Core) -> bool {
        let left = self.deadline.map_or(Duration::ZERO, |deadline| deadline.saturating_duration_since(Instant::now()));
        while let Some(path) = self.waiting.as_mut().and_then(Vec::pop) {
            if left.is_zero() {
                self.failed.push(json!({"path": path, "reason": "not_started", "output": ""}));
                continue;
            }
            match self.start(key, &path, left, core) {
                Ok(serial) => {
                    self.running = Some((serial, path));
                    return true;
                }
                Err(error) => {
                    self.failed.push(json!({"path": path, "reason": error.code.as_str(), "output": error.message}));
                }
            }
        }
        false
    }

    fn start(&self, key: StreamKey, path: &str, left: Duration, core: &mut Core) -> OpResult<u64> {
        let command = Command::Argv(vec![path.to_owned()]);
        let stage = self.stage.map_or("", Stage::as_str);
        let request = Request {
            command: command.clone(),
            cwd: Some("/".to_owned()),
            env: BTreeMap::from([("SANDGATE_HOOK".to_owned(), stage.to_owned())]),
            user: users::ourselves(),
            stdin: false,
            pty: None,
        };
        // No client hits upon it.
        let number = core.next_id();
        let id = format!("hook {} {number}", core.boot_id);
        let serial = core.processes.begin(|serial| {
            let timeout_s = Some(left.as_secs_f64());
            Draft {
                id,
                name: Some(stage.to_owned()),
                command,
                background: true,
                timeout_s,
                log_bytes_max: HOOK_OUTPUT_BYTES,
            }
            .into_process(serial)
        })?;
        if let Some(process) = core.processes.get(serial) {
            process.attach(key, Asked::Attach, true, From::default()).map_err(OpError::bad_request)?;
        }
        let (host, identity) = (Arc::clone(&core.host), Arc::clone(&core.identity));
        core.pool.submit(move || {
            let result = spawn(&request, &host, &identity);
            Done { key, outcome: Outcome::Spawned { serial, result } }
        });
        Ok(serial)
    }
}

/// Mixed into the kernel's pool, where there is one that takes it. gVisor has none: its randomness is the host's.
fn stir(entropy: &str) {
    if !entropy.is_empty() {
        if let Ok(mut device) = OpenOptions::new().write(true).open(RANDOM_DEVICE) {
            let _ = device.write_all(entropy.as_bytes());
        }
    }
}

fn hooks_timeout(seconds: Option<f64>) -> OpResult<Duration> {
    let seconds = seconds.unwrap_or(HOOKS_TIMEOUT_DEFAULT_S);
    if seconds > 0.0 && seconds <= HOOKS_TIMEOUT_MAX_S {
        return Ok(Duration::from_secs_f64(seconds));
    }
    Err(OpError::bad_request(format!("timeout_s must be more than 0 and at most {HOOKS_TIMEOUT_MAX_S}")))
}

/// What is to be told about a hook that has ended, unless it went well.
fn failure(process: &Process, path: &str) -> Option<Value> {
    let exit = process.exit.as_ref().filter(|exit| exit.code != 0)?;
    let mut output = Vec::new();
    for channel in &process.outputs {
        for part in channel.ring.slices(channel.ring.start(), HOOK_OUTPUT_BYTES) {
            output.extend_from_slice(part);
        }
    }
    let output = String::from_utf8_lossy(&output);
    Some(json!({"path": path, "reason": exit.reason, "exit_code": exit.code, "output": output}))
}
