//! What one host holds in stock: which units to make next, which to give up, and to whom each goes.
//!
//! A *pool* holds units of one shape, in two kinds: *ready* (booted, its agent connected, frozen) and *shell* (created,
//! nothing running in it). The caller does what [`Scheduler::next`] says and reports back; it alone knows what a unit
//! is, here it is a number.
//!
//! ```text
//!  next: Make ─▶ making ──made──▶ stock ──claim──▶ (handed out, never comes back)
//!                  └─failed─▶ ×     ├──lost──▶ ×
//!                                   └──next: Destroy──▶ ×
//! ```
//! Rules, each checked by the property tests: a unit is handed out once; what is in stock or being made never weighs
//! more than the ceiling when something is made; at most `refills_max` are being made, and none begins while a claim is
//! under way (but one a second does, or endless claims would end all refills); no pool with a lack waits for ever; a
//! pool whose units fail is tried ever more seldom.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::demand::Demand;

/// Number of a pool; the caller's choice.
pub type PoolId = u32;
/// Number of a unit; never given twice.
pub type Unit = u64;

/// How long a surplus must last before units are given up: a demand that swings is not followed down.
const SURPLUS_S: f64 = 30.0;
/// Claims under way hold refills up for so long at most.
const HOLD_UP_S: f64 = 1.0;
const BACK_OFF_MIN_S: f64 = 1.0;
const BACK_OFF_MAX_S: f64 = 60.0;
/// Each fourth refill goes to whoever has waited longest, however little it lacks.
const FAIR_TURNS: u64 = 4;
/// Targets follow the demand down by themselves; this often somebody should look.
const LOOK_S: f64 = 5.0;

/// What a unit is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Booted: for creates.
    Ready,
    /// Created only: for restores and forks, and for creates that find nothing ready.
    Shell,
}

const KINDS: [Kind; 2] = [Kind::Ready, Kind::Shell];

/// How many units of a kind are held, whatever the demand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bounds {
    /// Also held when nobody asks.
    pub min: u32,
    /// Not exceeded whatever is asked for.
    pub max: u32,
}

/// What a pool is for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Policy {
    /// Of booted units.
    pub ready: Bounds,
    /// Of shells.
    pub shells: Bounds,
    /// MiB of the host's memory that a ready unit and a shell take.
    pub weight_mib: [f64; 2],
}

/// What all pools of the host may take together.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Units being made at once.
    pub refills_max: usize,
    /// MiB of all units in stock and being made.
    pub memory_mib_max: f64,
}

/// What the caller is to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Begin making this unit; report `made` or `failed`.
    Make {
        /// Its number.
        unit: Unit,
        /// The pool it is for.
        pool: PoolId,
        /// As what.
        kind: Kind,
    },
    /// Give this unit up. It is out of stock already.
    Destroy {
        /// Its number.
        unit: Unit,
    },
}

/// A pool for people to look at.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Status {
    /// Ready units in stock.
    pub ready: u32,
    /// Shells in stock.
    pub shells: u32,
    /// Ready units that there should be.
    pub target_ready: u32,
    /// Shells that there should be.
    pub target_shells: u32,
    /// Creates asked for, since the start.
    pub claims: u64,
    /// Those that found nothing ready.
    pub misses: u64,
    /// Seconds that making a ready unit takes.
    pub refill_s: f64,
}

#[derive(Debug, Default)]
struct Row {
    units: VecDeque<Unit>,
    making: u32,
    demand: Demand,
    surplus_since: Option<f64>,
}

#[derive(Debug, Default)]
struct Pool {
    policy: Policy,
    rows: [Row; 2],
    failures: u32,
    retry_at: f64,
    /// Turn in which it was last given a refill.
    served: u64,
    claims: u64,
    misses: u64,
}

impl Pool {
    fn row(&mut self, kind: Kind) -> &mut Row {
        &mut self.rows[kind as usize]
    }

    fn target(&self, kind: Kind, now: f64) -> u32 {
        let (bounds, demand) = match kind {
            Kind::Ready => (self.policy.ready, &self.rows[0].demand),
            Kind::Shell => (self.policy.shells, &self.rows[1].demand),
        };
        // One claim of a shape that nobody keeps in stock is no demand yet.
        let is_worth_it = bounds.min > 0 || demand.is_repeated(now);
        let wanted = if is_worth_it { demand.wanted(now).round() } else { 0.0 };
        (wanted.min(f64::from(u32::MAX)) as u32).max(bounds.min).min(bounds.max)
    }

    fn count(&self, kind: Kind) -> u32 {
        self.rows[kind as usize].units.len() as u32
    }

    fn lack(&self, kind: Kind, now: f64) -> u32 {
        self.target(kind, now).saturating_sub(self.count(kind) + self.rows[kind as usize].making)
    }

    fn weight(&self) -> f64 {
        let heavy = |kind: Kind| {
            f64::from(self.count(kind) + self.rows[kind as usize].making) * self.policy.weight_mib[kind as usize]
        };
        KINDS.into_iter().map(heavy).sum()
    }
}

#[derive(Clone, Copy, Debug)]
struct Making {
    /// None once its pool is gone.
    pool: Option<PoolId>,
    kind: Kind,
    began: f64,
}

/// See the module. Times are seconds of a clock that does not jump.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pools: BTreeMap<PoolId, Pool>,
    stock: HashMap<Unit, (PoolId, Kind)>,
    making: HashMap<Unit, Making>,
    /// Units whose pool is gone.
    strays: VecDeque<Unit>,
    last_unit: Unit,
    turn: u64,
    last_make_at: f64,
    claims_under_way: u32,
}

impl Scheduler {
    /// Nothing is held until pools are set.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            pools: BTreeMap::new(),
            stock: HashMap::new(),
            making: HashMap::new(),
            strays: VecDeque::new(),
            last_unit: 0,
            turn: 0,
            last_make_at: f64::NEG_INFINITY,
            claims_under_way: 0,
        }
    }

    /// Add a pool or change what it is for; what it holds and has learned stays.
    pub fn set_pool(&mut self, pool: PoolId, policy: Policy) {
        self.pools.entry(pool).or_default().policy = policy;
    }

    /// Give up a pool with all it holds.
    pub fn remove_pool(&mut self, pool: PoolId) {
        let Some(removed) = self.pools.remove(&pool) else { return };
        for making in self.making.values_mut().filter(|making| making.pool == Some(pool)) {
            making.pool = None;
        }
        for unit in removed.rows.into_iter().flat_map(|row| row.units) {
            self.stock.remove(&unit);
            self.strays.push_back(unit);
        }
    }

    /// Give up everything: what is in stock now, what is being made once it is.
    pub fn drain(&mut self) {
        for pool in self.pools.keys().copied().collect::<Vec<_>>() {
            self.remove_pool(pool);
        }
    }

    /// Change the ceiling, for instance when the host runs short.
    pub fn limit_memory(&mut self, memory_mib_max: f64) {
        self.limits.memory_mib_max = memory_mib_max;
    }

    /// Somebody wants a machine: a ready unit, else a shell, else nothing. Report `settled` once it runs or has failed.
    pub fn claim(&mut self, pool: PoolId, now: f64) -> Option<(Unit, Kind)> {
        self.claims_under_way += 1;
        let asked = self.pools.get_mut(&pool)?;
        asked.claims += 1;
        asked.row(Kind::Ready).demand.arrive(now);
        if let Some(unit) = self.take(pool, Kind::Ready) {
            return Some((unit, Kind::Ready));
        }
        let asked = self.pools.get_mut(&pool)?;
        asked.misses += 1;
        asked.row(Kind::Shell).demand.arrive(now);
        self.take(pool, Kind::Shell).map(|unit| (unit, Kind::Shell))
    }

    /// Somebody wants to restore into a shell. Report `settled` as after `claim`.
    pub fn claim_shell(&mut self, pool: PoolId, now: f64) -> Option<Unit> {
        self.claims_under_way += 1;
        self.pools.get_mut(&pool)?.row(Kind::Shell).demand.arrive(now);
        self.take(pool, Kind::Shell)
    }

    /// A claim is over, well or not.
    pub fn settled(&mut self) {
        self.claims_under_way = self.claims_under_way.saturating_sub(1);
    }

    /// A unit is there. False when nobody wants it any more: it is to be destroyed.
    pub fn made(&mut self, unit: Unit, now: f64) -> bool {
        let Some(Making { pool, kind, began }) = self.making.remove(&unit) else { return false };
        let Some((pool, owner)) = pool.and_then(|id| Some((id, self.pools.get_mut(&id)?))) else { return false };
        owner.failures = 0;
        let row = owner.row(kind);
        row.making -= 1;
        row.demand.refilled(now - began);
        row.units.push_back(unit);
        self.stock.insert(unit, (pool, kind));
        true
    }

    /// A unit could not be made.
    pub fn failed(&mut self, unit: Unit, now: f64) {
        let Some(Making { pool, kind, .. }) = self.making.remove(&unit) else { return };
        let Some(owner) = pool.and_then(|id| self.pools.get_mut(&id)) else { return };
        owner.row(kind).making -= 1;
        let doublings = owner.failures.min(16);
        owner.failures += 1;
        owner.retry_at = now + (BACK_OFF_MIN_S * f64::from(1_u32 << doublings)).min(BACK_OFF_MAX_S);
    }

    /// A unit in stock has ended by itself. False when it was not in stock.
    pub fn lost(&mut self, unit: Unit) -> bool {
        let Some((pool, kind)) = self.stock.remove(&unit) else {
            let strays = self.strays.len();
            self.strays.retain(|other| *other != unit);
            return self.strays.len() < strays;
        };
        if let Some(owner) = self.pools.get_mut(&pool) {
            owner.row(kind).units.retain(|other| *other != unit);
        }
        true
    }

    /// The units that the next claims will get, in order.
    pub fn first_ready(&self, pool: PoolId, count: usize) -> Vec<Unit> {
        let row = self.pools.get(&pool).map(|pool| &pool.rows[Kind::Ready as usize]);
        row.map_or_else(Vec::new, |row| row.units.iter().take(count).copied().collect())
    }

    /// What to do now; ask until it says nothing, and again after each report and after `wait_s`.
    pub fn next(&mut self, now: f64) -> Option<Action> {
        let surplus = self.strays.pop_front().or_else(|| self.heaviest()).or_else(|| self.surplus(now));
        if let Some(unit) = surplus {
            self.lost(unit);
            return Some(Action::Destroy { unit });
        }
        self.may_make(now).then(|| self.make(now)).flatten()
    }

    /// Seconds after which `next` may say something new although nothing was reported.
    pub fn wait_s(&self, now: f64) -> f64 {
        let retries = self.pools.values().map(|pool| pool.retry_at - now).filter(|wait_s| *wait_s > 0.0);
        let held_up = (self.claims_under_way > 0).then(|| (self.last_make_at + HOLD_UP_S - now).max(0.01));
        retries.chain(held_up).fold(LOOK_S, f64::min)
    }

    /// A pool as it is now; zeros for one that is not there.
    pub fn status(&self, pool: PoolId, now: f64) -> Status {
        let Some(found) = self.pools.get(&pool) else { return Status::default() };
        Status {
            ready: found.count(Kind::Ready),
            shells: found.count(Kind::Shell),
            target_ready: found.target(Kind::Ready, now),
            target_shells: found.target(Kind::Shell, now),
            claims: found.claims,
            misses: found.misses,
            refill_s: found.rows[Kind::Ready as usize].demand.refill_s(),
        }
    }

    /// MiB of what is in stock and being made.
    pub fn memory_mib(&self) -> f64 {
        self.pools.values().map(Pool::weight).sum()
    }

    fn take(&mut self, pool: PoolId, kind: Kind) -> Option<Unit> {
        // The oldest: none grows stale at the end of the row.
        let unit = self.pools.get_mut(&pool)?.row(kind).units.pop_front()?;
        self.stock.remove(&unit);
        Some(unit)
    }

    /// When all weighs too much: a unit of whatever pool takes most.
    fn heaviest(&self) -> Option<Unit> {
        if self.memory_mib() <= self.limits.memory_mib_max {
            return None;
        }
        let held = self.pools.values().flat_map(|pool| {
            KINDS.map(|kind| {
                let units = &pool.rows[kind as usize].units;
                (units.len() as f64 * pool.policy.weight_mib[kind as usize], units.back())
            })
        });
        held.filter_map(|(mib, unit)| Some((mib, *unit?))).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, unit)| unit)
    }

    /// A unit that has been too many for a while.
    fn surplus(&mut self, now: f64) -> Option<Unit> {
        for pool in self.pools.values_mut() {
            for kind in KINDS {
                let is_too_many = pool.count(kind) > pool.target(kind, now);
                let row = pool.row(kind);
                if !is_too_many {
                    row.surplus_since = None;
                    continue;
                }
                if now - *row.surplus_since.get_or_insert(now) >= SURPLUS_S {
                    return row.units.front().copied();
                }
            }
        }
        None
    }

    fn may_make(&self, now: f64) -> bool {
        let is_held_up = self.claims_under_way > 0 && (now - self.last_make_at < HOLD_UP_S || !self.making.is_empty());
        !is_held_up && self.making.len() < self.limits.refills_max
    }

    fn make(&mut self, now: f64) -> Option<Action> {
        let room_mib = self.limits.memory_mib_max - self.memory_mib();
        let is_fair_turn = self.turn % FAIR_TURNS == FAIR_TURNS - 1;
        let lacking = self.pools.iter().filter(|(_, pool)| now >= pool.retry_at).flat_map(|(id, pool)| {
            KINDS.into_iter().filter(|kind| pool.lack(*kind, now) > 0).map(move |kind| (*id, pool, kind))
        });
        let fits = lacking.filter(|(_, pool, kind)| pool.policy.weight_mib[*kind as usize] <= room_mib);
        let (id, _, kind) = fits.min_by_key(|(_, pool, kind)| {
            let urgency = match kind {
                _ if is_fair_turn => 0,
                Kind::Ready if pool.count(Kind::Ready) == 0 => 1,
                Kind::Ready => 2,
                Kind::Shell => 3,
            };
            (urgency, pool.served, *kind as usize)
        })?;
        self.turn += 1;
        self.last_unit += 1;
        self.last_make_at = now;
        let unit = self.last_unit;
        self.making.insert(unit, Making { pool: Some(id), kind, began: now });
        if let Some(pool) = self.pools.get_mut(&id) {
            pool.served = self.turn;
            pool.row(kind).making += 1;
        }
        Some(Action::Make { unit, pool: id, kind })
    }
}
