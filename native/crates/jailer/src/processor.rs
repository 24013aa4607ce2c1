//! How the processors serve the sandbox: what they leave to its kernel, and who runs next.

use crate::{Step, call_unsafe};

/// Leave the instruction CPUID to the processor, for this process and all that come of it.
///
/// gVisor has it trapped wherever the processor can, and answers itself, 45 µs each time. The C library asks some
/// sixty times before it comes to a program's `main`, half of the time that a short command takes. The answer is
/// nearly the same; where a processor cannot trap it, gVisor is content as well.
#[cfg(target_arch = "x86_64")]
pub fn keep_cpuid() -> Step {
    const ARCH_SET_CPUID: u32 = 0x1012;
    call_unsafe::refuse(libc::SYS_arch_prctl, ARCH_SET_CPUID, libc::ENODEV)
        .map_err(|error| ("leave CPUID to the processor", error))
}

#[cfg(not(target_arch = "x86_64"))]
pub fn keep_cpuid() -> Step {
    Ok(())
}

/// Let a thread that wakes another run on until it sleeps, and keep turns short: see `vmm/drivers/gvisor/turns.py`.
/// All threads that come of this one inherit it.
pub fn take_turns() -> Step {
    /// The shortest that Linux grants. Before 6.12 it has one length for all and ignores this.
    const TURN_NS: u64 = 100_000;
    call_unsafe::schedule(libc::SCHED_BATCH, TURN_NS).map_err(|error| ("choose a scheduling policy", error))
}

#[cfg(test)]
mod tests {
    use nix::sys::wait::{WaitStatus, waitpid};

    use super::*;

    /// What a child ends with that does `work`: a filter cannot be taken off again.
    fn status_of(work: impl FnOnce() -> i32) -> i32 {
        let child = call_unsafe::fork(work).expect("a child");
        match waitpid(child, None).expect("its end") {
            WaitStatus::Exited(_, status) => status,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn threads_are_scheduled_as_a_batch() {
        let status = status_of(|| {
            take_turns().expect("a policy");
            call_unsafe::policy().expect("one's own")
        });
        assert_eq!(status, libc::SCHED_BATCH);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn nothing_can_have_cpuid_trapped_and_other_calls_pass() {
        const NOT_TRAPPED: i64 = 1;
        let status = status_of(|| {
            // What a test runner without rights has to say first.
            nix::sys::prctl::set_no_new_privs().expect("no new rights");
            keep_cpuid().expect("a filter");
            let trapping = call_unsafe::arch_prctl(0x1012, 0);
            let is_refused = trapping.is_err_and(|error| error.raw_os_error() == Some(libc::ENODEV));
            let is_native = call_unsafe::arch_prctl(0x1011, 0).is_ok_and(|answer| answer == NOT_TRAPPED);
            i32::from(is_refused) | i32::from(is_native) << 1
        });
        assert_eq!(status, 0b11);
    }
}
