//! The scheduler's rules, over random histories. A failing seed is printed by the assertion that fails.
#![allow(missing_docs)]

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use sandgate_pool::scheduler::{Action, Bounds, Kind, Limits, Policy, Scheduler, Unit};

const POOLS: u32 = 4;
const CEILING_MIB: f64 = 1000.0;
const REFILLS_MAX: usize = 3;

/// `SplitMix64`.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let bits = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

fn policy(ready: (u32, u32), shells: (u32, u32)) -> Policy {
    let bounds = |(min, max)| Bounds { min, max };
    Policy { ready: bounds(ready), shells: bounds(shells), weight_mib: [40.0, 8.0] }
}

fn scheduler() -> Scheduler {
    Scheduler::new(Limits { refills_max: REFILLS_MAX, memory_mib_max: CEILING_MIB })
}

/// Do all that is to be done; makes take no time.
fn settle(scheduler: &mut Scheduler, now: f64) {
    while let Some(action) = scheduler.next(now) {
        if let Action::Make { unit, .. } = action {
            assert!(scheduler.made(unit, now));
        }
    }
}

/// A caller that does what it is told, in random order, and is told nothing wrong.
struct World {
    random: Random,
    scheduler: Scheduler,
    now: f64,
    making: Vec<Unit>,
    stock: HashMap<Unit, u32>,
    pools: HashMap<Unit, u32>,
    ended: HashSet<Unit>,
    under_way: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let mut scheduler = scheduler();
        for pool in 0..POOLS {
            let low = random.below(4) as u32;
            scheduler.set_pool(pool, policy((low, low + random.below(20) as u32), (0, random.below(5) as u32)));
        }
        Self {
            random,
            scheduler,
            now: 0.0,
            making: Vec::new(),
            stock: HashMap::new(),
            pools: HashMap::new(),
            ended: HashSet::new(),
            under_way: 0,
        }
    }

    fn step(&mut self) {
        self.now += self.random.below(1000) as f64 / 1000.0;
        let (now, pool) = (self.now, self.random.below(u64::from(POOLS)) as u32);
        match self.random.below(12) {
            0..3 => {
                let claimed = self.scheduler.claim(pool, now).map(|(unit, _)| unit);
                self.hand_out(claimed, pool);
            }
            3 => {
                let claimed = self.scheduler.claim_shell(pool, now);
                self.hand_out(claimed, pool);
            }
            4..7 if self.under_way > 0 => {
                self.under_way -= 1;
                self.scheduler.settled();
            }
            7..9 if !self.making.is_empty() => {
                let index = self.random.below(self.making.len() as u64) as usize;
                let unit = self.making.swap_remove(index);
                if self.random.below(10) == 0 {
                    self.scheduler.failed(unit, now);
                } else if self.scheduler.made(unit, now) {
                    self.stock.insert(unit, self.pools[&unit]);
                }
            }
            9 if !self.stock.is_empty() => {
                let unit = *self.stock.keys().min().unwrap();
                assert!(self.scheduler.lost(unit));
                assert!(!self.scheduler.lost(unit), "a unit is lost once");
                self.end(unit);
            }
            10 if self.random.below(20) == 0 => {
                self.scheduler.remove_pool(pool);
                self.scheduler.set_pool(pool, policy((1, 5), (0, 2)));
            }
            _ => self.act(),
        }
    }

    fn hand_out(&mut self, claimed: Option<Unit>, pool: u32) {
        self.under_way += 1;
        if let Some(unit) = claimed {
            assert_eq!(self.stock.get(&unit), Some(&pool), "a claim gets a unit in stock, of its own shape");
            self.end(unit);
        }
    }

    fn end(&mut self, unit: Unit) {
        self.stock.remove(&unit);
        assert!(self.ended.insert(unit), "a unit ends once: claimed, lost or destroyed");
    }

    fn act(&mut self) {
        while let Some(action) = self.scheduler.next(self.now) {
            match action {
                Action::Destroy { unit } => self.end(unit),
                Action::Make { unit, pool, .. } => {
                    assert!(self.pools.insert(unit, pool).is_none(), "numbers are not given twice");
                    self.making.push(unit);
                    assert!(self.scheduler.memory_mib() <= CEILING_MIB);
                    assert!(self.making.len() <= REFILLS_MAX);
                }
            }
        }
        assert!(self.scheduler.wait_s(self.now) > 0.0);
    }
}

#[test]
fn the_rules_hold_over_random_histories() {
    for seed in 0..300 {
        let mut world = World::new(seed);
        for _ in 0..2000 {
            world.step();
        }
        world.scheduler.drain();
        world.act();
        assert!(world.stock.is_empty(), "seed {seed}: a drained host holds nothing");
        for unit in std::mem::take(&mut world.making) {
            assert!(!world.scheduler.made(unit, world.now), "seed {seed}: and takes nothing in");
        }
    }
}

#[test]
fn a_pool_is_kept_between_its_bounds() {
    let mut scheduler = scheduler();
    scheduler.set_pool(1, policy((2, 6), (1, 3)));
    settle(&mut scheduler, 0.0);
    let status = scheduler.status(1, 0.0);
    assert_eq!((status.ready, status.shells), (2, 1));
    for _ in 0..50 {
        scheduler.claim(1, 1.0);
        scheduler.settled();
    }
    settle(&mut scheduler, 1.0);
    let status = scheduler.status(1, 1.0);
    assert_eq!((status.ready, status.shells, status.claims, status.misses), (6, 3, 50, 48));
}

#[test]
fn a_pool_shrinks_once_demand_is_over_but_not_at_once() {
    let mut scheduler = scheduler();
    scheduler.set_pool(1, policy((1, 10), (0, 0)));
    for _ in 0..10 {
        scheduler.claim(1, 0.0);
        scheduler.settled();
    }
    settle(&mut scheduler, 0.0);
    assert_eq!(scheduler.status(1, 0.0).ready, 10);
    assert_eq!(scheduler.status(1, 3600.0).target_ready, 1);
    assert_eq!(scheduler.next(3600.0), None, "it may come again");
    settle(&mut scheduler, 3631.0);
    assert_eq!(scheduler.status(1, 3631.0).ready, 1);
}

#[test]
fn a_shape_asked_for_once_is_not_kept_in_stock() {
    let mut scheduler = scheduler();
    scheduler.set_pool(1, policy((0, 10), (0, 10)));
    assert_eq!(scheduler.claim(1, 0.0), None);
    scheduler.settled();
    assert_eq!(scheduler.next(0.0), None);
    scheduler.claim(1, 5.0);
    scheduler.settled();
    assert!(matches!(scheduler.next(5.0), Some(Action::Make { .. })));
}

#[test]
fn refills_wait_for_claims_but_not_for_ever() {
    let mut scheduler = scheduler();
    scheduler.set_pool(1, policy((5, 5), (0, 0)));
    assert!(matches!(scheduler.next(0.0), Some(Action::Make { unit: 1, .. })));
    scheduler.claim(1, 0.0);
    assert_eq!(scheduler.next(0.5), None);
    assert!(scheduler.wait_s(0.5) <= 0.5);
    assert_eq!(scheduler.next(1.5), None, "one at a time");
    scheduler.made(1, 1.5);
    assert!(matches!(scheduler.next(1.5), Some(Action::Make { unit: 2, .. })));
    scheduler.settled();
    assert!(matches!(scheduler.next(1.5), Some(Action::Make { unit: 3, .. })));
}

#[test]
fn a_failing_pool_is_tried_ever_more_seldom_and_harms_no_other() {
    let mut scheduler = scheduler();
    scheduler.set_pool(1, policy((1, 1), (0, 0)));
    scheduler.set_pool(2, policy((1, 1), (0, 0)));
    let (mut now, mut tries, mut good) = (0.0, 0_u32, 0_u32);
    while now < 600.0 {
        if let Some(Action::Make { unit, pool, .. }) = scheduler.next(now) {
            if pool == 1 {
                tries += 1;
                scheduler.failed(unit, now);
            } else {
                scheduler.made(unit, now);
                scheduler.claim(2, now);
                scheduler.settled();
                good += 1;
            }
        }
        now += scheduler.wait_s(now).min(1.0);
    }
    assert!((10..=20).contains(&tries), "after 1, 2, 4 … 60, 60 seconds: {tries}");
    assert!(good >= 500, "{good}");
    settle(&mut scheduler, now + 60.0);
    assert_eq!(scheduler.status(1, now).ready, 1);
    scheduler.claim(1, now + 60.0);
    scheduler.settled();
    assert!(matches!(scheduler.next(now + 60.0), Some(Action::Make { pool: 1, .. })), "a success ends the back-off");
}

#[test]
fn no_pool_starves_beside_one_that_is_always_empty() {
    let mut scheduler = Scheduler::new(Limits { refills_max: 1, memory_mib_max: 10_000.0 });
    scheduler.set_pool(1, policy((50, 100), (50, 50)));
    scheduler.set_pool(2, policy((3, 3), (3, 3)));
    for turn in 0..100 {
        let now = f64::from(turn);
        if let Some(Action::Make { unit, .. }) = scheduler.next(now) {
            scheduler.made(unit, now);
        }
        while let Some((_, Kind::Ready)) = scheduler.claim(1, now) {
            scheduler.settled();
        }
        scheduler.settled();
    }
    let status = scheduler.status(2, 100.0);
    assert_eq!((status.ready, status.shells), (3, 3));
}

#[test]
fn a_lowered_ceiling_is_obeyed_at_once() {
    let mut scheduler = scheduler();
    scheduler.set_pool(1, policy((20, 20), (5, 5)));
    settle(&mut scheduler, 0.0);
    scheduler.limit_memory(200.0);
    settle(&mut scheduler, 1.0);
    assert!(scheduler.memory_mib() <= 200.0);
    scheduler.limit_memory(0.0);
    settle(&mut scheduler, 1.0);
    assert!(scheduler.memory_mib() < 1e-9);
}

#[test]
fn a_decision_takes_microseconds() {
    let mut scheduler = Scheduler::new(Limits { refills_max: 4, memory_mib_max: 1e9 });
    for pool in 0..64 {
        scheduler.set_pool(pool, policy((4, 50), (2, 10)));
    }
    let began = Instant::now();
    let (mut decisions, mut now) = (0_u32, 0.0);
    while decisions < 100_000 {
        now += 0.01;
        scheduler.claim(decisions % 64, now);
        scheduler.settled();
        while let Some(action) = scheduler.next(now) {
            decisions += 1;
            if let Action::Make { unit, .. } = action {
                scheduler.made(unit, now);
            }
        }
        decisions += 1;
    }
    println!("{:?} per decision over 64 pools", began.elapsed() / decisions);
}
