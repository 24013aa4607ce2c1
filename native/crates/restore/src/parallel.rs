//! One job per item, on as many threads as there are processors.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crate::Result;

/// More would only wait for the disk.
const THREADS_MAX: usize = 8;

/// Run `job` with every number below `count`; the results in order, or one of the errors.
pub fn map<T: Send>(count: usize, job: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let (next, has_failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let done = Mutex::new(Vec::with_capacity(count));
    let work = || -> Result<()> {
        while !has_failed.load(Ordering::Relaxed) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                break;
            }
            let result = job(number).inspect_err(|_| has_failed.store(true, Ordering::Relaxed))?;
            done.lock().expect("no job panics while it holds the lock").push((number, result));
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (1..processors.min(THREADS_MAX).min(count)).map(|_| scope.spawn(work)).collect();
        let mine = work();
        threads.into_iter().fold(mine, |outcome, thread| {
            outcome.and(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    })?;
    let mut done = done.into_inner().expect("every thread has ended");
    done.sort_unstable_by_key(|&(number, _)| number);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn results_come_in_order() {
        assert_eq!(map(100, |number| Ok(number * 2)).unwrap(), (0..100).map(|number| number * 2).collect::<Vec<_>>());
        assert!(map(0, |_| Ok(())).unwrap().is_empty());
    }

    #[test]
    fn an_error_ends_it() {
        let outcome = map(1000, |number| if number == 7 { Err(Error::TooLarge) } else { Ok(()) });
        assert!(matches!(outcome, Err(Error::TooLarge)));
    }
}
