//! Watching files by inotify, also below a directory.
//!
//! The kernel watches single directories; for a recursive watch each one below gets its own, new ones as they appear.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use serde::{Deserialize, Serialize};

use crate::error::{Code, OpError, OpResult};
use crate::files::check_place;

/// Directories below one watch; the kernel's own limit may be lower.
const DIRECTORIES_MAX: usize = 50_000;
/// Events of one step, so that the loop can send them before more are read.
const EVENTS_MAX: usize = 2000;
/// The other half of a rename follows at once, if it comes at all.
const PAIR_WAIT_MS: u16 = 5;

const CHANGES: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MODIFY)
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_MOVED_FROM)
    .union(AddWatchFlags::IN_MOVED_TO)
    .union(AddWatchFlags::IN_DELETE_SELF);

#[derive(Deserialize)]
pub struct WatchArguments {
    path: String,
    #[serde(default)]
    recursive: bool,
    roots: Option<Vec<String>>,
}

/// A watch; the kernel's part exists from the first step on.
pub struct Watcher {
    arguments: WatchArguments,
    inotify: Option<Inotify>,
    watched: HashMap<WatchDescriptor, PathBuf>,
    /// First half of a rename: its cookie, the path it left, whether that is a directory.
    moved: Option<(u32, PathBuf, bool)>,
    events: Vec<Event>,
}

/// What one step brought.
pub struct WatchStep {
    pub watcher: Watcher,
    pub events: Vec<Vec<u8>>,
    /// The kernel may hold more.
    pub more: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Event {
    Created { path: String, is_dir: bool },
    Modified { path: String, is_dir: bool },
    Deleted { path: String, is_dir: bool },
    Renamed { path: String, is_dir: bool, old_path: String },
    Overflow,
}

impl Watcher {
    pub fn new(arguments: WatchArguments) -> Self {
        Self { arguments, inotify: None, watched: HashMap::new(), moved: None, events: Vec::new() }
    }

    /// Readable when there are changes; `None` before the first step.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.inotify.as_ref().map(AsFd::as_fd)
    }

    /// Take the changes there are. The first step starts the watch.
    pub fn step(mut self) -> OpResult<WatchStep> {
        match self.inotify.take() {
            None => self.start()?,
            Some(inotify) => {
                self.read(&inotify);
                self.inotify = Some(inotify);
            }
        }
        let more = self.events.len() >= EVENTS_MAX;
        let events =
            std::mem::take(&mut self.events).iter().filter_map(|event| serde_json::to_vec(event).ok()).collect();
        Ok(WatchStep { watcher: self, events, more })
    }

    fn start(&mut self) -> OpResult<()> {
        check_place(&self.arguments.path, self.arguments.roots.as_deref())?;
        let path = PathBuf::from(&self.arguments.path);
        let failed = |errno| match errno {
            Errno::ENOSPC => OpError::new(Code::TooMany, "the kernel's limit of watches is reached"),
            errno => OpError::of_errno(errno, &path.to_string_lossy()),
        };
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).map_err(failed)?;
        self.add(&inotify, &path).map_err(failed)?;
        if self.arguments.recursive {
            self.add_below(&inotify, &path, false);
        }
        self.inotify = Some(inotify);
        Ok(())
    }

    fn add(&mut self, inotify: &Inotify, path: &Path) -> nix::Result<()> {
        if self.watched.len() >= DIRECTORIES_MAX {
            return Err(Errno::ENOSPC);
        }
        let descriptor = inotify.add_watch(path, CHANGES)?;
        self.watched.insert(descriptor, path.to_owned());
        Ok(())
    }

    /// Watch every directory below `path`. With `announce`, tell of what is there: it was made before the watch was.
    fn add_below(&mut self, inotify: &Inotify, path: &Path, announce: bool) {
        let mut stack = vec![path.to_owned()];
        while let Some(directory) = stack.pop() {
            for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
                let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
                if announce {
                    self.push(Event::Created { path: text(&entry.path()), is_dir });
                }
                if !is_dir {
                    continue;
                }
                match self.add(inotify, &entry.path()) {
                    Ok(()) => stack.push(entry.path()),
                    // What cannot be watched is as good as dropped.
                    Err(Errno::ENOSPC) => self.push(Event::Overflow),
                    Err(_) => {} // gone again
                }
            }
        }
    }

    fn read(&mut self, inotify: &Inotify) {
        while self.events.len() < EVENTS_MAX {
            match inotify.read_events() {
                Ok(batch) => batch.iter().for_each(|event| self.take(inotify, event)),
                Err(Errno::EINTR) => {}
                Err(_) if self.moved.is_none() => return,
                Err(_) => {
                    let mut waiting = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
                    if !poll(&mut waiting, PollTimeout::from(PAIR_WAIT_MS)).is_ok_and(|ready| ready > 0) {
                        self.flush_moved();
                        return;
                    }
                }
            }
        }
    }

    fn take(&mut self, inotify: &Inotify, event: &InotifyEvent) {
        let mask = event.mask;
        if mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            return self.push(Event::Overflow);
        }
        if mask.contains(AddWatchFlags::IN_IGNORED) {
            self.watched.remove(&event.wd);
            return;
        }
        let Some(directory) = self.watched.get(&event.wd) else { return };
        let is_dir = mask.contains(AddWatchFlags::IN_ISDIR);
        // Without a name it is about the watched file itself; inside a tree the parent's watch has told already.
        let path = match &event.name {
            Some(name) => directory.join(name),
            None if *directory == Path::new(&self.arguments.path) => directory.clone(),
            None => return,
        };
        let second_half = self.moved.as_ref().is_some_and(|(cookie, ..)| *cookie == event.cookie)
            && mask.contains(AddWatchFlags::IN_MOVED_TO);
        if !second_half {
            self.flush_moved();
        }
        if mask.contains(AddWatchFlags::IN_MOVED_FROM) {
            self.moved = Some((event.cookie, path, is_dir));
        } else if mask.contains(AddWatchFlags::IN_MOVED_TO) {
            self.moved_to(inotify, &path, is_dir);
        } else if mask.contains(AddWatchFlags::IN_CREATE) {
            self.push(Event::Created { path: text(&path), is_dir });
            self.follow(inotify, &path, is_dir);
        } else if mask.intersects(AddWatchFlags::IN_DELETE | AddWatchFlags::IN_DELETE_SELF) {
            self.push(Event::Deleted { path: text(&path), is_dir });
        } else if mask.intersects(AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ATTRIB) {
            self.push(Event::Modified { path: text(&path), is_dir });
        }
    }

    fn moved_to(&mut self, inotify: &Inotify, path: &Path, is_dir: bool) {
        let Some((_, old, _)) = self.moved.take() else {
            // It comes from outside of what is watched.
            self.push(Event::Created { path: text(path), is_dir });
            return self.follow(inotify, path, is_dir);
        };
        for watched in self.watched.values_mut() {
            if let Ok(rest) = watched.strip_prefix(&old) {
                *watched = path.join(rest);
            }
        }
        self.push(Event::Renamed { path: text(path), is_dir, old_path: text(&old) });
    }

    fn follow(&mut self, inotify: &Inotify, path: &Path, is_dir: bool) {
        if !is_dir || !self.arguments.recursive {
            return;
        }
        match self.add(inotify, path) {
            Ok(()) => self.add_below(inotify, path, true),
            Err(Errno::ENOSPC) => self.push(Event::Overflow),
            Err(_) => {} // gone again
        }
    }

    /// The first half of a rename without a second: it left what is watched.
    fn flush_moved(&mut self) {
        if let Some((_, path, is_dir)) = self.moved.take() {
            self.watched.retain(|_, watched| !watched.starts_with(&path));
            self.push(Event::Deleted { path: text(&path), is_dir });
        }
    }

    /// Many writes in a row are one change.
    fn push(&mut self, event: Event) {
        if self.events.last() != Some(&event) {
            self.events.push(event);
        }
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
