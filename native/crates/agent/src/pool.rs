//! Threads for work that may block: files and process creation. The event loop never touches a file system.
//!
//! A job runs to its end and hands its outcome back to the loop, which an eventfd wakes. Long work (streaming a file)
//! is cut into jobs of one chunk, so that a slow reader holds no thread.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Enough that a few long copies do not hold up short calls; threads start when first needed.
const THREADS_MAX: usize = 8;
const STACK_BYTES: usize = 512 * 1024;

type Job<T> = Box<dyn FnOnce() -> T + Send>;

struct Queue<T> {
    jobs: VecDeque<Job<T>>,
    done: Vec<T>,
    threads: usize,
    idle: usize,
}

struct Shared<T> {
    queue: Mutex<Queue<T>>,
    work: Condvar,
    wake: EventFd,
}

impl<T> Shared<T> {
    fn queue(&self) -> std::sync::MutexGuard<'_, Queue<T>> {
        // Jobs run outside the lock, so a panicking one cannot leave the queue half changed.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Worker threads whose jobs return a `T`.
pub struct Pool<T> {
    shared: Arc<Shared<T>>,
}

impl<T: Send + 'static> Pool<T> {
    pub fn new() -> nix::Result<Self> {
        let queue = Queue { jobs: VecDeque::new(), done: Vec::new(), threads: 0, idle: 0 };
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { shared: Arc::new(Shared { queue: Mutex::new(queue), work: Condvar::new(), wake }) })
    }

    /// Readable when an outcome waits.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.shared.wake.as_fd()
    }

    /// Run `job` on some thread. Without any thread (the sandbox is out of them) it runs here.
    pub fn submit(&self, job: impl FnOnce() -> T + Send + 'static) {
        let mut queue = self.shared.queue();
        queue.jobs.push_back(Box::new(job));
        if queue.idle >= queue.jobs.len() || queue.threads >= THREADS_MAX {
            drop(queue);
            self.shared.work.notify_one();
            return;
        }
        let shared = Arc::clone(&self.shared);
        let started = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(move || work(&shared));
        match started {
            Ok(_) => queue.threads += 1,
            Err(_) if queue.threads > 0 => {
                drop(queue);
                self.shared.work.notify_one();
            }
            Err(_) => {
                let job = queue.jobs.pop_back();
                drop(queue);
                if let Some(job) = job {
                    finish(&self.shared, job);
                }
            }
        }
    }

    /// Outcomes since the last call.
    pub fn take_done(&self) -> Vec<T> {
        // EAGAIN only says that somebody already took them.
        let _ = self.shared.wake.read();
        std::mem::take(&mut self.shared.queue().done)
    }
}

fn work<T>(shared: &Shared<T>) {
    loop {
        let mut queue = shared.queue();
        let job = loop {
            if let Some(job) = queue.jobs.pop_front() {
                break job;
            }
            queue.idle += 1;
            queue = shared.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        };
        drop(queue);
        finish(shared, job);
    }
}

fn finish<T>(shared: &Shared<T>, job: Job<T>) {
    // A panic is a bug in one operation; its stream stays without an answer, everything else goes on.
    if let Ok(outcome) = catch_unwind(AssertUnwindSafe(job)) {
        shared.queue().done.push(outcome);
        let _ = shared.wake.write(1);
    }
}
