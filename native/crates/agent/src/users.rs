//! Accounts of the sandbox, read from `/etc/passwd` and `/etc/group` (a static binary has no NSS).

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Code, OpError, OpResult};

/// The account operations run as when the caller names none, if it exists.
const DEFAULT_USER: &str = "user";

/// One account with the groups it is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
    pub shell: String,
}

/// Both files as they were when read; `stamps` tells whether they are still the same.
#[derive(Debug, Default)]
struct Database {
    stamps: [Option<Stamp>; 2],
    users: HashMap<String, Arc<User>>,
    names: HashMap<u32, String>,
}

type Stamp = (u64, u64, i64, i64);

/// The name under which `Users::find` gives the account we run as, rather than the default one.
pub fn ourselves() -> Option<String> {
    nix::unistd::geteuid().is_root().then(|| "root".to_owned())
}

/// Look-ups that read the files again only when they have changed.
#[derive(Debug)]
pub struct Users {
    passwd: PathBuf,
    group: PathBuf,
    database: Mutex<Arc<Database>>,
}

impl Users {
    pub fn new(passwd: impl Into<PathBuf>, group: impl Into<PathBuf>) -> Self {
        Self { passwd: passwd.into(), group: group.into(), database: Mutex::default() }
    }

    /// The named account; without a name the default one, which is `user` if there is such an account, else ourselves.
    pub fn find(&self, name: Option<&str>) -> OpResult<Arc<User>> {
        let database = self.database();
        if let Some(name) = name {
            let found = database.users.get(name).cloned();
            return found.ok_or_else(|| OpError::new(Code::UserUnknown, format!("there is no user {name:?}")));
        }
        let ourselves = nix::unistd::geteuid().as_raw();
        if ourselves == 0 {
            if let Some(user) = database.users.get(DEFAULT_USER) {
                return Ok(Arc::clone(user));
            }
        }
        let own = database.names.get(&ourselves).and_then(|name| database.users.get(name));
        Ok(own.cloned().unwrap_or_else(|| Arc::new(nameless(ourselves))))
    }

    /// The account's name, or its number when it has none.
    pub fn name_of(&self, uid: u32) -> String {
        self.database().names.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }

    fn database(&self) -> Arc<Database> {
        let stamps = [stamp(&self.passwd), stamp(&self.group)];
        let mut held = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        if held.stamps != stamps || held.users.is_empty() {
            // A missing or unreadable file is an empty one: the sandbox may have removed it.
            let passwd = fs::read(&self.passwd).unwrap_or_default();
            let group = fs::read(&self.group).unwrap_or_default();
            *held = Arc::new(parse(&String::from_utf8_lossy(&passwd), &String::from_utf8_lossy(&group), stamps));
        }
        Arc::clone(&held)
    }
}

/// A container may run without any account file; its root still has to work.
fn nameless(uid: u32) -> User {
    let name = if uid == 0 { "root".to_owned() } else { uid.to_string() };
    let home = if uid == 0 { "/root" } else { "/" }.to_owned();
    User { name, uid, gid: nix::unistd::getegid().as_raw(), groups: vec![], home, shell: "/bin/sh".to_owned() }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let meta = fs::metadata(path).ok()?;
    Some((meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec()))
}

fn parse(passwd: &str, group: &str, stamps: [Option<Stamp>; 2]) -> Database {
    let mut memberships: HashMap<&str, Vec<u32>> = HashMap::new();
    for line in group.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        let [_, _, gid, members] = fields[..] else { continue };
        let Ok(gid) = gid.parse() else { continue };
        for member in members.split(',').filter(|member| !member.is_empty()) {
            memberships.entry(member).or_default().push(gid);
        }
    }
    let mut database = Database { stamps, ..Database::default() };
    for line in passwd.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, shell] = fields[..] else { continue };
        let (Ok(uid), Ok(gid)) = (uid.parse(), gid.parse()) else { continue };
        let mut groups = memberships.get(name).cloned().unwrap_or_default();
        groups.retain(|other| *other != gid);
        groups.insert(0, gid);
        let shell = if shell.is_empty() { "/bin/sh" } else { shell };
        let home = if home.is_empty() { "/" } else { home };
        let (home, shell) = (home.to_owned(), shell.to_owned());
        // The first line wins, as it does in libc.
        database.names.entry(uid).or_insert_with(|| name.to_owned());
        let user = User { name: name.to_owned(), uid, gid, groups, home, shell };
        database.users.entry(name.to_owned()).or_insert_with(|| Arc::new(user));
    }
    database
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/bash\nbroken line\nuser:x:1000:1000::/home/user:\nuser:x:7:7::/:\n";
    const GROUP: &str = "root:x:0:\nsudo:x:27:user,other\nuser:x:1000:\nbad:x:y:user\n";

    fn users(dir: &Path) -> Users {
        fs::write(dir.join("passwd"), PASSWD).unwrap();
        fs::write(dir.join("group"), GROUP).unwrap();
        Users::new(dir.join("passwd"), dir.join("group"))
    }

    #[test]
    fn accounts_come_with_home_shell_and_groups() {
        let dir = tempfile::tempdir().unwrap();
        let user = users(dir.path()).find(Some("user")).unwrap();
        assert_eq!((user.uid, user.gid, user.groups.as_slice()), (1000, 1000, &[1000, 27][..]));
        assert_eq!((user.home.as_str(), user.shell.as_str()), ("/home/user", "/bin/sh"));
    }

    #[test]
    fn an_unknown_name_is_refused_and_an_unknown_uid_is_a_number() {
        let dir = tempfile::tempdir().unwrap();
        let users = users(dir.path());
        assert_eq!(users.find(Some("nobody-here")).unwrap_err().code, Code::UserUnknown);
        assert_eq!((users.name_of(0), users.name_of(4711)), ("root".to_owned(), "4711".to_owned()));
    }

    #[test]
    fn a_changed_file_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let users = users(dir.path());
        users.find(Some("root")).unwrap();
        fs::write(dir.path().join("passwd"), format!("{PASSWD}late:x:5:5::/srv:/bin/sh\n")).unwrap();
        assert_eq!(users.find(Some("late")).unwrap().home, "/srv");
    }

    #[test]
    fn a_sandbox_without_account_files_still_has_a_default_user() {
        let users = Users::new("/nonexistent/passwd", "/nonexistent/group");
        assert_eq!(users.find(None).unwrap().uid, nix::unistd::geteuid().as_raw());
    }
}
