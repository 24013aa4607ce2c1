//! The scheduler of the warm pool and the placement over hosts; see `native.pool`.

use pyo3::prelude::*;
use sandgate_pool::placement::{Health, Host, Request, rank};
use sandgate_pool::scheduler::{self, Action, Bounds, Kind, Limits, Policy};

/// `("make", unit, pool, kind)` or `("destroy", unit, 0, "")`.
type Told = (&'static str, u64, u32, &'static str);

/// `(ready, shells, target_ready, target_shells, claims, misses, refill_s)`.
type Status = (u32, u32, u32, u32, u64, u64, f64);

/// `(health, cpu_free, memory_free_mib, memory_mib, disk_free_mib, machines_free, has_template, ready, owner_machines)`.
type HostFacts = (u8, f64, u64, u64, u64, u32, bool, u32, u32);

#[pyclass(module = "native._core")]
pub struct Scheduler(scheduler::Scheduler);

#[pymethods]
impl Scheduler {
    #[new]
    fn new(refills_max: usize, memory_mib_max: f64) -> Self {
        Self(scheduler::Scheduler::new(Limits { refills_max, memory_mib_max }))
    }

    fn set_pool(&mut self, pool: u32, ready: (u32, u32), shells: (u32, u32), weight_mib: (f64, f64)) {
        let bounds = |(min, max)| Bounds { min, max };
        let weight_mib = [weight_mib.0, weight_mib.1];
        self.0.set_pool(pool, Policy { ready: bounds(ready), shells: bounds(shells), weight_mib });
    }

    fn remove_pool(&mut self, pool: u32) {
        self.0.remove_pool(pool);
    }

    fn drain(&mut self) {
        self.0.drain();
    }

    fn limit_memory(&mut self, memory_mib_max: f64) {
        self.0.limit_memory(memory_mib_max);
    }

    fn claim(&mut self, pool: u32, now: f64) -> Option<(u64, &'static str)> {
        self.0.claim(pool, now).map(|(unit, kind)| (unit, name(kind)))
    }

    fn claim_shell(&mut self, pool: u32, now: f64) -> Option<u64> {
        self.0.claim_shell(pool, now)
    }

    fn settled(&mut self) {
        self.0.settled();
    }

    fn made(&mut self, unit: u64, now: f64) -> bool {
        self.0.made(unit, now)
    }

    fn failed(&mut self, unit: u64, now: f64) {
        self.0.failed(unit, now);
    }

    fn lost(&mut self, unit: u64) -> bool {
        self.0.lost(unit)
    }

    fn first_ready(&self, pool: u32, count: usize) -> Vec<u64> {
        self.0.first_ready(pool, count)
    }

    fn next(&mut self, now: f64) -> Option<Told> {
        self.0.next(now).map(|action| match action {
            Action::Make { unit, pool, kind } => ("make", unit, pool, name(kind)),
            Action::Destroy { unit } => ("destroy", unit, 0, ""),
        })
    }

    fn wait_s(&self, now: f64) -> f64 {
        self.0.wait_s(now)
    }

    fn status(&self, pool: u32, now: f64) -> Status {
        let found = self.0.status(pool, now);
        let (targets, claims) = ((found.target_ready, found.target_shells), (found.claims, found.misses));
        (found.ready, found.shells, targets.0, targets.1, claims.0, claims.1, found.refill_s)
    }

    fn memory_mib(&self) -> f64 {
        self.0.memory_mib()
    }
}

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Ready => "ready",
        Kind::Shell => "shell",
    }
}

/// Ranks hosts for a machine `(cpu_count, memory_mib, disk_mib)`; see `native.pool.rank_hosts`.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // What the interpreter hands over is ours.
fn rank_hosts(machine: (f64, u64, u64), salt: u64, hosts: Vec<HostFacts>) -> Vec<usize> {
    let request = Request { cpu_count: machine.0, memory_mib: machine.1, disk_mib: machine.2, salt };
    rank(&request, &hosts.into_iter().map(host).collect::<Vec<_>>())
}

fn host(facts: HostFacts) -> Host {
    Host {
        health: [Health::Up, Health::Slow, Health::Draining].get(usize::from(facts.0)).copied().unwrap_or(Health::Lost),
        cpu_free: facts.1,
        memory_free_mib: facts.2,
        memory_mib: facts.3,
        disk_free_mib: facts.4,
        machines_free: facts.5,
        has_template: facts.6,
        ready: facts.7,
        owner_machines: facts.8,
    }
}

pub fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Scheduler>()?;
    module.add_function(wrap_pyfunction!(rank_hosts, module)?)
}
