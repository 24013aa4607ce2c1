//! Delivers events to the subscribers of one worker.
//!
//! ```text
//! batch ──▶ window, and for each of its topics: every subscriber takes what it wants ──▶ one write each
//! tick  ──▶ heartbeats; slow, revoked and gone subscribers are let go
//! ```
//!
//! Only [`run`] removes subscribers from the lists, so that a pass over one, which lets other work of the thread in
//! between, neither skips nor repeats anybody.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, watch};
use tokio::time::timeout;

use super::event::{Batch, Event};
use super::order::Selection;
use super::subscriber::{End, Subscriber, Transport};
use super::window::{Link, Place, Window};
use crate::config::ms;
use crate::connection::Joined;
use crate::worker::{Drain, Worker};

/// Between two looks at every subscriber.
const TICK: Duration = Duration::from_millis(500);
/// Subscribers served before other work of the thread has its turn: about half a millisecond.
const TURN: usize = 64;
/// Batches taken together when the log grows faster than it is delivered.
const BATCHES_MAX: usize = 64;
/// For the end of a stream to be sent.
const GOODBYE: Duration = Duration::from_secs(2);

/// What a connection turns into when the API has ordered events for it.
pub struct Joining {
    /// What it gets.
    pub selection: Selection,
    /// Where the backlog ended.
    pub cursor: u64,
    /// A client of HTTP/1.0.
    pub is_unchunked: bool,
}

type Subscribers = Vec<Rc<Subscriber>>;

/// The subscribers of one worker.
#[derive(Default)]
pub struct Hub {
    topics: RefCell<HashMap<Box<str>, Subscribers>>,
    window: RefCell<Window>,
    has_leavers: Cell<bool>,
}

fn join<G: 'static>(worker: &Rc<Worker>, transport: Box<dyn Transport>, joining: Joining, guard: G) {
    let Joining { selection, cursor, is_unchunked } = joining;
    let topic = selection.topic.clone();
    let subscriber = Rc::new(Subscriber::new(transport, selection, is_unchunked, cursor));
    worker.hub.add(worker, topic, &subscriber);
    let worker = Rc::clone(worker);
    tokio::task::spawn_local(async move {
        worker.counters.streams.subscribers.add(1);
        let end = std::future::poll_fn(|cx| subscriber.poll_end(cx, worker.now_ms())).await;
        subscriber.finish(end);
        worker.hub.has_leavers.set(true);
        worker.counters.streams.ended(end);
        worker.counters.streams.subscribers.sub(1);
        if matches!(end, End::Behind | End::Revoked | End::Drain) {
            // In a box: it needs room for a timer, of which there may otherwise be very many.
            let _ = Box::pin(timeout(GOODBYE, subscriber.say_goodbye())).await;
        }
        drop(guard);
    });
}

/// Takes over what has joined, if it has; `guard` is dropped when the connection has ended.
pub fn settle<C: Transport + 'static, G: 'static>(worker: &Rc<Worker>, joined: Option<Joined<C>>, guard: G) {
    if let Some(Joined { stream, joining }) = joined {
        join(worker, Box::new(stream), joining, guard);
    }
}

impl Hub {
    fn add(&self, worker: &Worker, topic: Box<str>, subscriber: &Rc<Subscriber>) {
        let window = self.window.borrow();
        match window.place(subscriber.cursor()) {
            Place::TooOld => subscriber.finish(End::Behind),
            Place::Within => {
                let missed = window.after(subscriber.cursor()).filter(|event| event.topic == topic);
                let count = subscriber.offer(missed, window.through(), worker.now_ms());
                worker.counters.streams.events.add(count as u64);
            }
        }
        self.topics.borrow_mut().entry(topic).or_default().push(Rc::clone(subscriber));
    }

    /// Takes the next stretch of the log in. Whoever misses something before it must resume.
    fn extend(&self, batch: &Batch) {
        let link = self.window.borrow_mut().extend(batch);
        if link != Link::Next {
            self.each(|subscriber| {
                if link == Link::Gap || subscriber.cursor() < batch.after {
                    subscriber.finish(End::Behind);
                }
            });
        }
    }

    fn each(&self, visit: impl FnMut(&Rc<Subscriber>)) {
        self.topics.borrow().values().flatten().for_each(visit);
    }

    fn forget_leavers(&self) {
        if self.has_leavers.replace(false) {
            self.topics.borrow_mut().retain(|_, subscribers| {
                subscribers.retain(|subscriber| !subscriber.is_ending());
                if subscribers.capacity() > 2 * subscribers.len() {
                    subscribers.shrink_to_fit();
                }
                !subscribers.is_empty()
            });
        }
    }

    /// Calls `visit` for everybody of a topic, a few at a time.
    async fn pass(&self, topic: &str, visit: impl Fn(&Subscriber)) {
        let mut next = 0;
        loop {
            let mut turn = Vec::new();
            if let Some(subscribers) = self.topics.borrow().get(topic) {
                turn.extend(subscribers.iter().skip(next).take(TURN).cloned());
            }
            turn.iter().filter(|subscriber| !subscriber.is_ending()).for_each(|subscriber| visit(subscriber));
            next += turn.len();
            if turn.len() < TURN {
                return;
            }
            tokio::task::yield_now().await;
        }
    }
}

/// Serves the subscribers of a worker, for ever.
pub async fn run(worker: Rc<Worker>, mut batches: broadcast::Receiver<Arc<Batch>>, drain: watch::Receiver<Drain>) {
    let heartbeat = Event::heartbeat();
    let mut interval = tokio::time::interval(TICK);
    loop {
        tokio::select! {
            received = batches.recv() => match received {
                Ok(first) => deliver(&worker, &first, &mut batches).await,
                // So far behind that the log here has a gap.
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    worker.hub.window.borrow_mut().reset();
                }
                Err(broadcast::error::RecvError::Closed) => return,
            },
            _ = interval.tick() => tick(&worker, &heartbeat, *drain.borrow()),
        }
        worker.hub.forget_leavers();
    }
}

async fn deliver(worker: &Worker, first: &Batch, batches: &mut broadcast::Receiver<Arc<Batch>>) {
    let mut by_topic: HashMap<Box<str>, Vec<Arc<Event>>> = HashMap::new();
    let mut take = |batch: &Batch| {
        worker.hub.extend(batch);
        for event in &batch.events {
            match by_topic.get_mut(&event.topic) {
                Some(events) => events.push(Arc::clone(event)),
                None => drop(by_topic.insert(event.topic.clone(), vec![Arc::clone(event)])),
            }
        }
        batch.through
    };
    let mut through = take(first);
    for _ in 1..BATCHES_MAX {
        let Ok(batch) = batches.try_recv() else { break };
        through = take(&batch);
    }
    let waiting_max = worker.config.limits.stream_events_max;
    for (topic, events) in &by_topic {
        let visit = |subscriber: &Subscriber| {
            let now_ms = worker.now_ms();
            let count = subscriber.offer(events.iter(), through, now_ms);
            if count > 0 {
                worker.counters.streams.events.add(count as u64);
                subscriber.push(now_ms);
            }
            if subscriber.waiting() > waiting_max {
                subscriber.finish(End::Slow);
            }
        };
        worker.hub.pass(topic, visit).await;
    }
}

fn tick(worker: &Worker, heartbeat: &Arc<Event>, drain: Drain) {
    let now_ms = worker.now_ms();
    let stalled_ms = now_ms.saturating_sub(ms(worker.config.limits.send_timeout_s));
    let quiet_ms = now_ms.saturating_sub(ms(worker.config.limits.stream_heartbeat_s));
    worker.hub.each(|subscriber| {
        let active_ms = subscriber.active_ms();
        let is_waiting = subscriber.waiting() > 0;
        let is_over = |key| worker.table.is_key_over(key, worker.wall_s());
        if drain != Drain::No {
            subscriber.finish(End::Drain);
        } else if subscriber.selection.key.as_ref().is_some_and(is_over) {
            subscriber.finish(End::Revoked);
        } else if is_waiting && active_ms < stalled_ms {
            subscriber.finish(End::Slow);
        } else if !is_waiting && active_ms <= quiet_ms {
            subscriber.offer_comment(heartbeat, now_ms);
            subscriber.push(now_ms);
        }
    });
}
