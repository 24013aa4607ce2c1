//! What a user's login files do to the environment, found out once by running them.
//!
//! Later shell lines start with that environment and a plain `bash -c`. This is only done for files that change nothing
//! but variables (or define aliases, which mean nothing where nobody types): where they define functions, set options or
//! print something, every line gets a real login shell. A change of one of the files is noticed, a change of what they
//! in turn read is not.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{pipe2, read};

use super::spawn_unsafe::{self, Plan};
use crate::identity::Identity;
use crate::users::User;

/// Login files that take longer are no mere settings.
const PROBE_WAIT: Duration = Duration::from_secs(5);
const PROBE_BYTES_MAX: usize = 1024 * 1024;
const MARK: &[u8] = b"\0sandgate-login\0";
/// Set by any shell for itself.
const SHELL_OWN: [&str; 7] = ["_", "SHLVL", "PWD", "OLDPWD", "BASHOPTS", "SHELLOPTS", "BASH_EXECUTION_STRING"];

/// Reads the files as `bash -l` does, then prints what they left behind, by builtins alone (a fork costs more than all
/// the rest): limits before | noise | mark | limits after | functions, traps | umask | directory | options
/// unchanged | exported variables.
const PROBE: &str = r#"
__sandgate_options=$BASHOPTS:$SHELLOPTS
ulimit -a
printf '\0'
[ -r /etc/profile ] && . /etc/profile
for __sandgate_file in ~/.bash_profile ~/.bash_login ~/.profile; do
  if [ -r "$__sandgate_file" ]; then . "$__sandgate_file"; break; fi
done
printf '\0sandgate-login\0'
ulimit -a
printf '\0'
compgen -A function
trap -p
printf '\0'
umask
printf '\0%s\0' "$PWD"
[ "$__sandgate_options" = "$BASHOPTS:$SHELLOPTS" ] && printf same
printf '\0'
declare -px
"#;

/// How shell lines of a user start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Login {
    /// With these variables changed (`None`: removed), in a shell that reads nothing more.
    Variables(BTreeMap<String, Option<String>>),
    /// In a real login shell.
    Real,
    /// There is no bash.
    NoBash,
}

impl Login {
    pub fn apply(&self, env: &mut BTreeMap<String, String>) {
        let Self::Variables(changes) = self else { return };
        for (name, value) in changes {
            match value {
                Some(value) => drop(env.insert(name.clone(), value.clone())),
                None => drop(env.remove(name)),
            }
        }
    }
}

/// Variables that a shell itself obeys, or that decide which files it reads.
const SHELL_OBEYS: [&str; 8] = ["PATH", "HOME", "ENV", "IFS", "POSIXLY_CORRECT", "SHELLOPTS", "BASHOPTS", "CDPATH"];
const SHELL_OBEYS_PREFIXES: [&str; 4] = ["BASH", "LC_", "LANG", "LD_"];
/// Login files longer than this are taken to mention everything.
const TEXT_BYTES_MAX: u64 = 256 * 1024;

type Stamp = Option<(u64, u64, i64, i64)>;

#[derive(Debug)]
struct Known {
    login: Arc<Login>,
    identity: Identity,
    /// What the files say, unless that is too much to keep.
    text: Option<String>,
    stamps: Vec<(PathBuf, Stamp)>,
}

impl Known {
    /// Whether the files would come to the same with another identity: none of the variables that differ is one the
    /// shell obeys or the files mention. (They win over the login files anyway, whatever these set.)
    fn agrees_with(&self, identity: &Identity) -> bool {
        let Some(text) = &self.text else { return self.identity == *identity };
        self.identity.differing(identity).all(|name| {
            let is_obeyed = SHELL_OBEYS.contains(&name) || SHELL_OBEYS_PREFIXES.iter().any(|p| name.starts_with(p));
            !is_obeyed && !text.contains(name)
        })
    }
}

/// Per user, what their login files came to.
#[derive(Debug, Default)]
pub struct Logins {
    known: Mutex<HashMap<u32, Known>>,
}

impl Logins {
    /// `env` is what the login files start from.
    pub fn of(
        &self,
        user: &User,
        identity: &Identity,
        env: &BTreeMap<String, String>,
        null: &OwnedFd,
        become_user: bool,
    ) -> Arc<Login> {
        // Held while probing: whoever comes meanwhile waits for the result instead of finding it out a second time.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known.get(&user.uid) {
            let same = |(path, stamp): &(PathBuf, Stamp)| stamp_of(path) == *stamp;
            if found.agrees_with(identity) && found.stamps.iter().all(same) {
                return Arc::clone(&found.login);
            }
        }
        let text = text_of(&login_files(&user.home));
        let stamps = login_files(&user.home).into_iter().map(|path| (stamp_of(&path), path));
        let stamps = stamps.map(|(stamp, path)| (path, stamp)).collect();
        let login = Arc::new(match probe(user, env, null, become_user) {
            Ok(output) => judge(&output, env, directory_of(user)).unwrap_or(Login::Real),
            Err(Errno::ENOENT) => Login::NoBash,
            Err(_) => Login::Real,
        });
        known.insert(user.uid, Known { login: Arc::clone(&login), identity: identity.clone(), text, stamps });
        login
    }
}

fn login_files(home: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = [".bash_profile", ".bash_login", ".profile", ".bashrc"]
        .iter()
        .map(|name| Path::new(home).join(name))
        .chain(["/etc/profile", "/etc/bash.bashrc", "/etc/profile.d"].map(PathBuf::from))
        .collect();
    files.extend(fs::read_dir("/etc/profile.d").into_iter().flatten().flatten().map(|entry| entry.path()));
    files
}

/// All of the files in one, if they are text and not too long. What they read in turn is not looked at.
fn text_of(paths: &[PathBuf]) -> Option<String> {
    let files: Vec<&PathBuf> = paths.iter().filter(|path| path.is_file()).collect();
    let size = files.iter().map(|path| fs::metadata(path).map_or(0, |meta| meta.size())).sum::<u64>();
    if size > TEXT_BYTES_MAX {
        return None;
    }
    files.into_iter().map(|path| fs::read_to_string(path).ok()).collect()
}

fn stamp_of(path: &Path) -> Stamp {
    let meta = fs::metadata(path).ok()?;
    Some((meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec()))
}

/// Where the login files run: at home, if there is one.
fn directory_of(user: &User) -> &str {
    if Path::new(&user.home).is_dir() { &user.home } else { "/" }
}

/// Run the login files in a shell; what it printed.
fn probe(user: &User, env: &BTreeMap<String, String>, null: &OwnedFd, become_user: bool) -> nix::Result<Vec<u8>> {
    let strings = |words: &[&str]| words.iter().filter_map(|word| CString::new(*word).ok()).collect::<Vec<_>>();
    let attempts = super::spawn::BASH_FILES.map(|file| (file.to_owned(), strings(&["bash", "-c", PROBE])));
    let env: Vec<CString> =
        env.iter().filter_map(|(name, value)| CString::new(format!("{name}={value}")).ok()).collect();
    let cwd = CString::new(directory_of(user)).unwrap_or_default();
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    let plan = Plan {
        attempts: &attempts,
        env: &env,
        cwd: &cwd,
        stdio: [null.as_fd(), writer.as_fd(), writer.as_fd()],
        controlling_tty: false,
        user: become_user.then_some(user),
        nofile: None,
        reset_oom_score: false,
    };
    let pid = spawn_unsafe::spawn(&plan).map_err(|error| error.errno)?;
    drop(writer);
    let result = read_all(&reader);
    if result.is_err() {
        // Not reaped here, so the number is still its own or that of a zombie.
        let _ = killpg(pid, Signal::SIGKILL);
    }
    result
}

fn read_all(reader: &OwnedFd) -> nix::Result<Vec<u8>> {
    let deadline = Instant::now() + PROBE_WAIT;
    let mut output = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut waiting = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut waiting, PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO))?;
        if ready == 0 || output.len() > PROBE_BYTES_MAX {
            return Err(Errno::ETIMEDOUT);
        }
        match read(reader, &mut buffer)? {
            0 => return Ok(output),
            bytes => output.extend_from_slice(&buffer[..bytes]),
        }
    }
}

/// What the output of [`PROBE`] says; `None` unless all that happened is that variables changed.
fn judge(output: &[u8], before: &BTreeMap<String, String>, directory: &str) -> Option<Login> {
    let at = output.windows(MARK.len()).position(|window| window == MARK)?;
    let limits = output[..at].strip_suffix(b"\0")?;
    let rest = std::str::from_utf8(&output[at + MARK.len()..]).ok()?;
    let fields: Vec<&str> = rest.splitn(6, '\0').map(|field| field.trim_end_matches('\n')).collect();
    let [settings @ .., exported] = fields.as_slice() else { return None };
    let limits = std::str::from_utf8(limits).ok()?.trim_end_matches('\n');
    if settings != [limits, "", "0022", directory, "same"] {
        return None;
    }
    let variables = exported.lines().filter_map(|line| exported_variable(line).transpose());
    let after = variables.collect::<Result<BTreeMap<_, _>, _>>().ok()?;
    let mut changes = BTreeMap::new();
    for (name, value) in &after {
        if !SHELL_OWN.contains(name) && before.get(*name) != Some(value) {
            changes.insert((*name).to_owned(), Some(value.clone()));
        }
    }
    for name in before.keys().filter(|name| !after.contains_key(name.as_str())) {
        changes.insert(name.clone(), None);
    }
    Some(Login::Variables(changes))
}

/// A declaration that says more than a name and a simple value.
struct NotSimple;

/// The variable of a line of `declare -px`; none if it has no value, which means that it is not in the environment.
fn exported_variable(line: &str) -> Result<Option<(&str, String)>, NotSimple> {
    let declaration = line.strip_prefix("declare -x ").ok_or(NotSimple)?;
    let Some((name, quoted)) = declaration.split_once('=') else { return Ok(None) };
    let inner = quoted.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).ok_or(NotSimple)?;
    let mut value = String::with_capacity(inner.len());
    let mut characters = inner.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => value.extend(characters.next()),
            other => value.push(other),
        }
    }
    Ok(Some((name, value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe_with(profile: &str) -> Login {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join(".bash_profile"), profile).unwrap();
        let home = home.path().canonicalize().unwrap().to_str().unwrap().to_owned();
        let uid = nix::unistd::geteuid().as_raw();
        let user = User { name: "x".into(), uid, gid: 0, groups: vec![], home: home.clone(), shell: "/bin/sh".into() };
        let env = BTreeMap::from([("HOME", home.as_str()), ("PATH", "/usr/bin:/bin"), ("GONE", "1")])
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let null = fs::File::options().read(true).write(true).open("/dev/null").unwrap().into();
        let logins = Logins::default();
        (*logins.of(&user, &Identity::default(), &env, &null, false)).clone()
    }

    #[test]
    fn variables_of_the_login_files_are_found() {
        let Login::Variables(changes) =
            probe_with(r#"export NEW='a "b" \$c' PATH=$HOME/bin:/bin EMPTY= NONE; unset GONE; local=1; alias a=b"#)
        else {
            panic!("files that only export must be recognised as such");
        };
        assert_eq!(changes["NEW"], Some(r#"a "b" \$c"#.to_owned()));
        assert!(changes["PATH"].as_ref().unwrap().ends_with("/bin:/bin"));
        assert_eq!(changes["GONE"], None);
        assert!(!changes.contains_key("local") && !changes.contains_key("PWD") && !changes.contains_key("HOME"));
    }

    #[test]
    fn only_variables_that_matter_to_the_files_have_them_read_again() {
        let known = |text: Option<&str>| Known {
            login: Arc::new(Login::NoBash),
            identity: Identity::default(),
            text: text.map(str::to_owned),
            stamps: Vec::new(),
        };
        let with = |name: &str| {
            let mut identity = Identity::default();
            identity.update(BTreeMap::from([(name.to_owned(), "1".to_owned())]), vec![]);
            identity
        };
        let files = known(Some("export EDITOR=vi; [ -n \"$FLAG\" ] && export X=$FLAG"));
        assert!(files.agrees_with(&Identity::default()));
        assert!(files.agrees_with(&with("API_KEY")));
        for name in ["FLAG", "EDITOR", "PATH", "BASH_ENV", "LC_ALL"] {
            assert!(!files.agrees_with(&with(name)), "{name}");
        }
        assert!(!known(None).agrees_with(&with("API_KEY")));
    }

    #[test]
    fn files_that_do_more_need_a_real_login() {
        for profile in [
            "f() { :; }",
            "shopt -s extglob",
            "set -u",
            "echo hello",
            "umask 077",
            "cd /",
            "exit 0",
            "trap ls EXIT",
            "ulimit -n 10",
            "echo oops >&2",
        ] {
            assert_eq!(probe_with(profile), Login::Real, "{profile}");
        }
    }
}
