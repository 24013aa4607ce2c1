//! From a caller's path to a directory descriptor and a name in it.
//!
//! The directory is opened first and asked where it really is; everything after works relative to it. So a link that
//! is swapped meanwhile cannot move an operation out of the roots it was checked against.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat, readlink, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat, mkdirat};

use crate::error::{Code, OpError, OpResult};
use crate::users::User;

/// Longest path and name the kernel takes.
const PATH_BYTES_MAX: usize = 4095;
const NAME_BYTES_MAX: usize = 255;
/// Links followed before it must be a loop, as the kernel counts.
const LINKS_MAX: usize = 40;
const DIRECTORY: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

/// Where an operation takes place: `name` in `directory`, whose path without links is `parent`.
#[derive(Debug)]
pub struct Target {
    pub directory: OwnedFd,
    pub name: OsString,
    parent: PathBuf,
}

/// What to do about a final component that is a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    Follow,
    Keep,
}

impl Target {
    /// The path without links.
    pub fn path(&self) -> PathBuf {
        if self.name == "." { self.parent.clone() } else { self.parent.join(&self.name) }
    }

    /// What is there, links not followed; `None` when nothing is.
    pub fn stat(&self) -> nix::Result<Option<FileStat>> {
        match fstatat(&self.directory, self.name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => Ok(None),
            other => other.map(Some),
        }
    }

    /// As [`Target::stat`] where nothing is an error.
    pub fn stat_existing(&self) -> OpResult<FileStat> {
        self.stat().and_then(|stat| stat.ok_or(Errno::ENOENT)).map_err(|errno| self.error(errno))
    }

    /// A failed call on this target.
    pub fn error(&self, errno: Errno) -> OpError {
        OpError::of_errno(errno, &self.path().to_string_lossy())
    }

    /// Whether the name can be given to something else: not the root, not a path ending in `..`.
    pub fn require_name(&self) -> OpResult<()> {
        if self.name == "." {
            return Err(OpError::new(
                Code::InvalidPath,
                format!("{}: not a name in a directory", self.path().display()),
            ));
        }
        Ok(())
    }
}

pub fn is_type(stat: &FileStat, wanted: SFlag) -> bool {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == wanted
}

/// A path the kernel could take: absolute, no NUL, not too long.
pub fn checked_path(path: String) -> OpResult<String> {
    check(&path).map(|()| path)
}

fn check(path: &str) -> OpResult<()> {
    let problem = if path.contains('\0') {
        "contains a NUL byte"
    } else if !path.starts_with('/') {
        "is not absolute"
    } else if path.len() > PATH_BYTES_MAX || path.split('/').any(|name| name.len() > NAME_BYTES_MAX) {
        "is too long"
    } else {
        return Ok(());
    };
    let shown: String = path.chars().take(200).collect();
    Err(OpError::new(Code::InvalidPath, format!("the path {shown:?} {problem}")))
}

/// Find the target of `path`. With `roots`, it must lie in one of them once links are resolved.
pub fn locate(path: &str, links: Links, roots: Option<&[String]>) -> OpResult<Target> {
    check(path)?;
    let mut path = PathBuf::from(path);
    for _ in 0..=LINKS_MAX {
        let target = locate_name(&path).map_err(|errno| OpError::of_errno(errno, &path.to_string_lossy()))?;
        if links == Links::Follow {
            if let Ok(next) = readlinkat(&target.directory, target.name.as_os_str()) {
                path = target.parent.join(next);
                continue;
            }
        }
        check_roots(&target.path(), roots)?;
        return Ok(target);
    }
    Err(OpError::of_errno(Errno::ELOOP, &path.to_string_lossy()))
}

/// Whether `path` is well-formed and leads into one of `roots`.
pub fn check_place(path: &str, roots: Option<&[String]>) -> OpResult<()> {
    locate(path, Links::Follow, roots).map(drop)
}

fn locate_name(path: &Path) -> nix::Result<Target> {
    // `file_name` takes "a/b/." and "a/b/" for b, as mkdir and rename do; ".." and the root have no name.
    let (parent, name) = match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => (parent, name.to_owned()),
        _ => (path, OsString::from(".")),
    };
    let directory = openat(AT_FDCWD, parent, DIRECTORY, Mode::empty())?;
    let parent = path_of(&directory)?;
    Ok(Target { directory, name, parent })
}

/// As [`locate`], creating the missing directories on the way; they belong to `owner`.
pub fn locate_making_parents(path: &str, links: Links, roots: Option<&[String]>, owner: &User) -> OpResult<Target> {
    match locate(path, links, roots) {
        Err(error) if error.code == Code::NotFound => {}
        other => return other,
    }
    let parent = Path::new(path).parent().unwrap_or(Path::new("/"));
    make_directories(parent, 0o755, roots, owner)?;
    locate(path, links, roots)
}

/// Create `path` and what is missing above it.
pub fn make_directories(path: &Path, mode: u32, roots: Option<&[String]>, owner: &User) -> OpResult<()> {
    let failed = |errno| OpError::of_errno(errno, &path.to_string_lossy());
    let components: Vec<&OsStr> = path.components().filter_map(named).collect();
    let mut directory = openat(AT_FDCWD, "/", DIRECTORY, Mode::empty()).map_err(failed)?;
    for (depth, name) in components.iter().enumerate() {
        directory = match openat(&directory, *name, DIRECTORY, Mode::empty()) {
            Err(Errno::ENOENT) => {
                let rest = &components[depth..];
                if rest.iter().any(|name| *name == "..") {
                    return Err(failed(Errno::ENOENT));
                }
                let whole = rest.iter().fold(path_of(&directory).map_err(failed)?, |path, name| path.join(name));
                check_roots(&whole, roots)?;
                make_directory(&directory, name, mode, owner).map_err(failed)?
            }
            other => other.map_err(failed)?,
        };
    }
    Ok(())
}

fn make_directory(parent: &OwnedFd, name: &OsStr, mode: u32, owner: &User) -> nix::Result<OwnedFd> {
    match mkdirat(parent, name, Mode::from_bits_truncate(mode)) {
        // Somebody else was faster; what they made may still be no directory, which opening tells.
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(errno) => return Err(errno),
    }
    let directory = openat(parent, name, DIRECTORY | OFlag::O_NOFOLLOW, Mode::empty())?;
    give(parent, name, owner)?;
    Ok(directory)
}

/// Make `name` belong to `owner`. An agent that is not root owns what it makes already.
pub fn give(directory: &OwnedFd, name: &OsStr, owner: &User) -> nix::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let (uid, gid) = (owner.uid.into(), owner.gid.into());
    nix::unistd::fchownat(directory, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
}

fn named(component: Component<'_>) -> Option<&OsStr> {
    match component {
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        Component::ParentDir => Some(OsStr::new("..")),
        Component::Normal(name) => Some(name),
    }
}

/// Where an open directory is, without links.
pub fn path_of(directory: &OwnedFd) -> nix::Result<PathBuf> {
    let path = PathBuf::from(readlink(format!("/proc/self/fd/{}", directory.as_raw_fd()).as_str())?);
    // The kernel marks a directory that was removed meanwhile; it has no path any more.
    if path.as_os_str().as_bytes().ends_with(b" (deleted)") && !path.exists() {
        return Err(Errno::ENOENT);
    }
    Ok(path)
}

fn check_roots(path: &Path, roots: Option<&[String]>) -> OpResult<()> {
    match roots {
        Some(roots) if !roots.iter().any(|root| path.starts_with(root)) => {
            Err(OpError::new(Code::ForbiddenPath, format!("{} is outside the permitted directories", path.display())))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn text(path: &Path) -> String {
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn paths_no_kernel_would_take_are_refused() {
        let long_name = format!("/{}", "n".repeat(256));
        let long_path = "/d".repeat(2048);
        for path in ["", "relative", "/nul\0byte", &long_name, &long_path] {
            assert_eq!(locate(path, Links::Keep, None).unwrap_err().code, Code::InvalidPath, "{path:?}");
        }
        assert!(checked_path(format!("/{}", "n".repeat(255))).is_ok());
    }

    #[test]
    fn links_are_resolved_and_loops_end() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        std::fs::create_dir(base.join("real")).unwrap();
        std::fs::write(base.join("real/file"), "x").unwrap();
        symlink("real", base.join("dir")).unwrap();
        symlink("dir/file", base.join("link")).unwrap();
        symlink("loop", base.join("loop")).unwrap();
        let follow = |name: &str| locate(&text(&base.join(name)), Links::Follow, None);
        assert_eq!(follow("link").unwrap().path(), base.join("real/file"));
        assert_eq!(follow("dir/new").unwrap().path(), base.join("real/new"));
        assert_eq!(follow("real/..").unwrap().path(), base);
        assert_eq!(follow("loop").unwrap_err().code, Code::InvalidPath);
        assert_eq!(locate(&text(&base.join("link")), Links::Keep, None).unwrap().path(), base.join("link"));
    }

    #[test]
    fn roots_hold_against_links_dots_and_similar_names() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        for name in ["in", "in-not", "out"] {
            std::fs::create_dir(base.join(name)).unwrap();
        }
        symlink(base.join("out"), base.join("in/escape")).unwrap();
        symlink(base.join("out/file"), base.join("in/file")).unwrap();
        let roots = [text(&base.join("in"))];
        let code = |name: &str| locate(&text(&base.join(name)), Links::Follow, Some(&roots)).map_err(|e| e.code).err();
        assert_eq!(code("in/fine"), None);
        assert_eq!(code("in"), None);
        for name in ["in/escape/x", "in/file", "in/../out/x", "in-not/x", "out/x", "."] {
            assert_eq!(code(name), Some(Code::ForbiddenPath), "{name}");
        }
    }

    #[test]
    fn missing_parents_are_made_inside_the_roots_only() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        std::fs::create_dir(base.join("in")).unwrap();
        std::fs::create_dir(base.join("out")).unwrap();
        symlink(base.join("out"), base.join("in/escape")).unwrap();
        let users = crate::users::Users::new("/etc/passwd", "/etc/group");
        let owner = users.find(Some("root")).unwrap();
        let roots = [text(&base.join("in"))];
        let make = |name: &str| locate_making_parents(&text(&base.join(name)), Links::Follow, Some(&roots), &owner);
        assert_eq!(make("in/a/b/c").unwrap().path(), base.join("in/a/b/c"));
        assert!(base.join("in/a/b").is_dir());
        assert_eq!(make("in/escape/a/b").unwrap_err().code, Code::ForbiddenPath);
        assert!(!base.join("out/a").exists());
        assert_eq!(make("in/x/../y/z").unwrap_err().code, Code::NotFound);
    }
}
