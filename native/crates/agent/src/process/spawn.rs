//! From an `exec` request to a running program: user, environment, search path, pipes.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Pid, pipe2};

use super::login::{Login, Logins};
use super::shell::{exports, plain_words};
use super::spawn_unsafe::{self, Plan, SpawnError, Step};
use super::tty::{self, Size};
use crate::error::{Code, OpError, OpResult};
use crate::identity::Identity;
use crate::users::{User, Users};

/// Asked of the kernel for output pipes; fewer, larger reads are what speeds streaming up. It may refuse.
const PIPE_BYTES: i32 = 1024 * 1024;
const PATH_ROOT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const PATH_USER: &str = "/usr/local/bin:/usr/bin:/bin";
const LOCALES: [&str; 3] = ["LANG", "LC_ALL", "LC_CTYPE"];
const WORKSPACE: &str = "/workspace";

/// Where bash may be.
pub const BASH_FILES: [&CStr; 3] = [c"/bin/bash", c"/usr/bin/bash", c"/usr/local/bin/bash"];
const SH_FILE: &CStr = c"/bin/sh";

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    Argv(Vec<String>),
    Shell(String),
}

/// One program to start.
#[derive(Debug)]
pub struct Request {
    pub command: Command,
    pub cwd: Option<String>,
    pub env: BTreeMap<String, String>,
    pub user: Option<String>,
    pub stdin: bool,
    pub pty: Option<Size>,
}

/// What the agent itself lends to every program it starts.
pub struct Host {
    pub users: Arc<Users>,
    pub logins: Logins,
    pub null: OwnedFd,
    /// Directory of the programs that run around snapshots and pauses.
    pub hooks: PathBuf,
    pub env: BTreeMap<String, String>,
    pub nofile: Option<(u64, u64)>,
    pub reset_oom_score: bool,
}

/// Our ends of a started program's pipes or terminal.
#[derive(Debug)]
pub struct Spawned {
    pub pid: Pid,
    pub user: String,
    pub cwd: String,
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    pub pty: Option<OwnedFd>,
}

/// Their ends, closed here once the program holds them.
struct Stdio {
    ours: Ends,
    theirs: [Option<OwnedFd>; 3],
}

#[derive(Default)]
struct Ends {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    pty: Option<OwnedFd>,
}

/// Start the program. May block on the file system: for a worker thread.
pub fn spawn(request: &Request, host: &Host, identity: &Identity) -> OpResult<Spawned> {
    let user = host.users.find(request.user.as_deref())?;
    let ourselves = nix::unistd::geteuid().as_raw();
    if ourselves != 0 && ourselves != user.uid {
        return Err(OpError::new(Code::PermissionDenied, format!("the agent may not become {:?}", user.name)));
    }
    let login = match &request.command {
        Command::Shell(_) => Some(login(&user, host, identity)),
        Command::Argv(_) => None,
    };
    let cwd = request.cwd.clone().unwrap_or_else(|| default_directory(&user));
    let env = environment(request, host, identity, &user, login.as_deref(), &cwd);
    let stdio = open_stdio(request, &user).map_err(|errno| OpError::of_errno(errno, "cannot open pipes"))?;
    let env_strings =
        env.iter().map(|(key, value)| c_string(format!("{key}={value}"))).collect::<OpResult<Vec<_>>>()?;
    let cwd_string = c_string(cwd.clone())?;
    let path = env.get("PATH").map_or("", String::as_str);
    let mut attempts = match &request.command {
        Command::Argv(argv) => program_attempts(argv, path)?,
        Command::Shell(line) => shell_attempts(line, path, login.as_deref(), &explicit(request, identity))?,
    };
    let null = host.null.as_fd();
    let started = loop {
        let plan = Plan {
            attempts: &attempts,
            env: &env_strings,
            cwd: &cwd_string,
            stdio: stdio.theirs.each_ref().map(|end| end.as_ref().map_or(null, AsFd::as_fd)),
            controlling_tty: request.pty.is_some(),
            user: (ourselves == 0).then_some(&user),
            nofile: host.nofile,
            reset_oom_score: host.reset_oom_score,
        };
        match spawn_unsafe::spawn(&plan) {
            Err(SpawnError { step: Step::Exec, errno: Errno::ENOEXEC, attempt }) if attempts[attempt].0 != *SH_FILE => {
                attempts = match &request.command {
                    // A script without an interpreter line is one for sh, as execvp(3) has it.
                    Command::Argv(_) => vec![script(&attempts[attempt])],
                    Command::Shell(_) => attempts.split_off(attempt + 1),
                };
            }
            other => break other,
        }
    };
    let pid = started.map_err(|error| explain(error, &request.command, &attempts, &cwd))?;
    let Ends { stdin, stdout, stderr, pty } = stdio.ours;
    Ok(Spawned { pid, user: user.name.clone(), cwd, stdin, stdout, stderr, pty })
}

/// Where a command starts that does not say: the workspace, else home, else the root, whichever is there.
fn default_directory(user: &User) -> String {
    let candidates = [WORKSPACE, &user.home];
    candidates.into_iter().find(|path| Path::new(path).is_dir()).unwrap_or("/").to_owned()
}

/// Find out what the default user's login files do, before the first shell line has to wait for it.
pub fn warm_up(host: &Host, identity: &Identity) {
    if let Ok(user) = host.users.find(None) {
        login(&user, host, identity);
    }
}

fn login(user: &User, host: &Host, identity: &Identity) -> Arc<Login> {
    let mut env = account_environment(host, user);
    identity.apply(&mut env);
    host.logins.of(user, identity, &env, &host.null, nix::unistd::geteuid().is_root())
}

/// Later sources win: the agent's own environment, the account, its login files, the machine's identity, the request.
fn environment(
    request: &Request,
    host: &Host,
    identity: &Identity,
    user: &User,
    login: Option<&Login>,
    cwd: &str,
) -> BTreeMap<String, String> {
    let mut env = account_environment(host, user);
    env.insert("PWD".to_owned(), cwd.to_owned());
    if request.pty.is_some() {
        env.insert("TERM".to_owned(), "xterm-256color".to_owned());
    }
    if let Some(login) = login {
        login.apply(&mut env);
    }
    identity.apply(&mut env);
    env.extend(request.env.iter().map(|(key, value)| (key.clone(), value.clone())));
    env
}

/// What the machine's identity and the request set themselves.
fn explicit<'a>(request: &'a Request, identity: &'a Identity) -> BTreeMap<&'a str, &'a str> {
    let both = identity.env().iter().chain(&request.env);
    both.map(|(name, value)| (name.as_str(), value.as_str())).collect()
}

fn account_environment(host: &Host, user: &User) -> BTreeMap<String, String> {
    let mut env = host.env.clone();
    env.entry("PATH".to_owned()).or_insert_with(|| if user.uid == 0 { PATH_ROOT } else { PATH_USER }.to_owned());
    if !LOCALES.iter().any(|name| env.contains_key(*name)) {
        // Not LANG: that makes every program look for a dozen files, of which only this one differs from none.
        env.insert("LC_CTYPE".to_owned(), "C.UTF-8".to_owned());
    }
    let account = [("HOME", &user.home), ("USER", &user.name), ("LOGNAME", &user.name), ("SHELL", &user.shell)];
    env.extend(account.map(|(key, value)| (key.to_owned(), value.clone())));
    env
}

fn c_string(text: String) -> OpResult<CString> {
    CString::new(text).map_err(|_| OpError::bad_request("a NUL byte in the command, its environment or directory"))
}

/// Files to try in turn, each with its arguments.
type Attempts = Vec<(CString, Vec<CString>)>;

/// The files `execvp` would try, in its order.
fn program_attempts(argv: &[String], path: &str) -> OpResult<Attempts> {
    let arguments = c_strings(argv.iter().map(String::as_str))?;
    let program = argv.first().map_or("", String::as_str);
    if program.contains('/') {
        return Ok(vec![(c_string(program.to_owned())?, arguments)]);
    }
    path.split(':')
        .map(|dir| if dir.is_empty() { program.to_owned() } else { format!("{dir}/{program}") })
        .map(|file| Ok((c_string(file)?, arguments.clone())))
        .collect()
}

/// A shell for the line, and before it the program itself if the line is nothing more.
fn shell_attempts(
    line: &str,
    path: &str,
    login: Option<&Login>,
    explicit: &BTreeMap<&str, &str>,
) -> OpResult<Attempts> {
    let mut attempts = Vec::new();
    if let (Some(Login::Variables(_)), Some(words)) = (login, plain_words(line)) {
        let argv: Vec<String> = words.into_iter().map(str::to_owned).collect();
        attempts = program_attempts(&argv, path)?;
    }
    let bash = match login {
        Some(Login::Variables(_)) => c_strings(["bash", "-c", line])?,
        // What the caller asks for wins over what the login files set.
        _ => c_strings(["bash", "-lc", &format!("{}{line}", exports(explicit))])?,
    };
    attempts.extend(BASH_FILES.map(|file| (file.to_owned(), bash.clone())));
    attempts.push((SH_FILE.to_owned(), c_strings(["sh", "-c", line])?));
    Ok(attempts)
}

fn c_strings<'a>(strings: impl IntoIterator<Item = &'a str>) -> OpResult<Vec<CString>> {
    strings.into_iter().map(|string| c_string(string.to_owned())).collect()
}

fn script((file, argv): &(CString, Vec<CString>)) -> (CString, Vec<CString>) {
    let shell = SH_FILE.to_owned();
    let arguments = [shell.clone(), file.clone()].into_iter().chain(argv.iter().skip(1).cloned());
    (shell, arguments.collect())
}

fn open_stdio(request: &Request, user: &User) -> nix::Result<Stdio> {
    if let Some(size) = request.pty {
        let pair = tty::open_pair(size, user)?;
        let theirs = [Some(pair.slave.try_clone_cloexec()?), Some(pair.slave.try_clone_cloexec()?), Some(pair.slave)];
        let stdin = Some(pair.master.try_clone_cloexec()?);
        return Ok(Stdio { ours: Ends { stdin, pty: Some(pair.master), ..Ends::default() }, theirs });
    }
    let mut ours = Ends::default();
    let mut theirs = [None, None, None];
    if request.stdin {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        set_nonblocking(&writer)?;
        (ours.stdin, theirs[0]) = (Some(writer), Some(reader));
    }
    for (ours, theirs) in [&mut ours.stdout, &mut ours.stderr].into_iter().zip(&mut theirs[1..]) {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        set_nonblocking(&reader)?;
        // Refused where the user's pipe budget is used up; the default size works too.
        let _ = fcntl(&reader, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
        (*ours, *theirs) = (Some(reader), Some(writer));
    }
    Ok(Stdio { ours, theirs })
}

fn set_nonblocking(fd: &OwnedFd) -> nix::Result<()> {
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map(drop)
}

trait TryClone {
    fn try_clone_cloexec(&self) -> nix::Result<OwnedFd>;
}

impl TryClone for OwnedFd {
    fn try_clone_cloexec(&self) -> nix::Result<OwnedFd> {
        self.try_clone().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
    }
}

/// What a failed start means to the caller.
fn explain(error: SpawnError, command: &Command, attempts: &[(CString, Vec<CString>)], cwd: &str) -> OpError {
    let program = match command {
        Command::Argv(argv) => argv.first().map_or("", String::as_str),
        Command::Shell(_) => "a shell",
    };
    let tried = attempts.get(error.attempt).map_or("", |(file, _)| file.to_str().unwrap_or(""));
    match (error.step, error.errno) {
        (Step::Clone, errno) => OpError::new(Code::TooMany, format!("cannot start a process: {}", errno.desc())),
        (Step::Directory, Errno::ENOENT | Errno::ENOTDIR) => {
            OpError::new(Code::CwdMissing, format!("{cwd:?} is not a directory"))
        }
        (Step::Directory, errno) => OpError::of_errno(errno, cwd),
        (Step::Exec, Errno::ENOENT) if Path::new(tried).is_file() => {
            OpError::new(Code::NotExecutable, format!("{program:?} names an interpreter that does not exist"))
        }
        (Step::Exec, Errno::ENOENT | Errno::ENOTDIR) => {
            OpError::new(Code::CommandNotFound, format!("command not found: {program}"))
        }
        (Step::Exec, Errno::EACCES | Errno::ENOEXEC | Errno::EPERM) => {
            OpError::new(Code::NotExecutable, format!("{program:?} cannot be executed: {}", error.errno.desc()))
        }
        // Linux says E2BIG to an argument of 128 KiB or too many of them; gVisor says ENAMETOOLONG.
        (Step::Exec, Errno::E2BIG | Errno::ENAMETOOLONG) => {
            OpError::bad_request("the command cannot be started: its name, arguments or environment are too long")
        }
        (step, errno) => OpError::of_errno(errno, &format!("cannot start {program:?} ({step:?})")),
    }
}
