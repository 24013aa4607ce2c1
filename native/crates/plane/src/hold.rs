//! A request for a sandbox that sleeps: held until a record says that it runs, then decided anew.
//!
//! ```text
//! held ──it runs──▶ forwarded to its address of now     ──destroyed, or access withdrawn──▶ answered so
//!      ──time-out──▶ wake_timeout                       ──client leaves──▶ closed
//!      ──it cannot be woken──▶ wake_failed
//! ```

use std::future::pending;
use std::pin::pin;

use tokio::io::AsyncRead;

use crate::buf::Inbox;
use crate::failure::{Code, Failure};
use crate::prepare::{AnswerKind, Decision, Hold, Plan};
use crate::wake::Place;
use crate::watch::{Phase, Watch};
use crate::worker::Worker;

/// A held request in the figures of its worker.
struct Held<'a> {
    worker: &'a Worker,
    since_us: u64,
}

impl<'a> Held<'a> {
    fn new(worker: &'a Worker) -> Self {
        worker.counters.waiting.add(1);
        Self { worker, since_us: worker.now_us() }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.worker.counters.waiting.sub(1);
        self.worker.counters.wake_waits.observe(self.worker.now_us() - self.since_us);
    }
}

/// Holds a request until `decide` has another plan for it. None if the client left. What the client sends ahead
/// gathers in `inbox`.
pub async fn hold<R: AsyncRead + Unpin>(
    worker: &Worker,
    watch: &Watch,
    client: &mut R,
    inbox: &mut Inbox,
    hold: Hold,
    decide: impl Fn() -> Result<Decision, Failure>,
) -> Option<Result<Plan, Failure>> {
    let limits = &worker.config.limits;
    let failures = hold.sandbox.wake.failures();
    if let Some(rest_s) = hold.sandbox.wake.rest_s() {
        return Some(Ok(Plan::Answer(hold.refused(failed(rest_s)))));
    }
    let Some(place) = Place::take(&hold.sandbox.wake, limits.wake_waiting_max) else {
        return Some(Ok(Plan::Answer(hold.refused(Code::TooManyWaiting))));
    };
    let _held = Held::new(worker);
    watch.down.set(Phase::Wake, worker.after(limits.wake_timeout_s));
    let decided = async {
        loop {
            let mut changed = pin!(place.wake().changed());
            changed.as_mut().enable();
            match decide() {
                Ok(Decision::Hold(hold)) if place.wake().failures() != failures => {
                    return Ok(Plan::Answer(hold.refused(failed(place.wake().rest_s().unwrap_or(0)))));
                }
                Ok(Decision::Hold(hold)) => worker.knock(&hold.sandbox),
                Ok(Decision::Now(plan)) if is_starting(&plan) => {}
                Ok(Decision::Now(plan)) => return Ok(plan),
                Err(failure) => return Err(failure),
            }
            changed.await;
        }
    };
    let left = async {
        while !inbox.is_full() {
            match inbox.fill(client).await {
                Ok(0) => {
                    watch.up.set(Phase::HalfClosed, worker.after(limits.half_closed_timeout_s));
                    break;
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
        pending::<()>().await;
    };
    let plan = tokio::select! {
        plan = decided => Some(plan),
        () = left => None,
    };
    watch.up.clear();
    watch.down.clear();
    plan
}

/// It cannot be woken; the next try is possible after `rest_s`.
fn failed(rest_s: u32) -> Failure {
    Failure { retry_after_s: Some(rest_s), ..Code::WakeFailed.into() }
}

/// On its way from sleep: not worth an answer to somebody who waits already.
fn is_starting(plan: &Plan) -> bool {
    let Plan::Answer(answer) = plan else { return false };
    matches!(&answer.kind, AnswerKind::Failure(failure) if failure.code == Code::SandboxStarting)
}
