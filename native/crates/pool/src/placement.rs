//! On which host of a fleet a machine goes: a pure function of what the hosts last reported.
//!
//! A host that is lost, drains or lacks room is out. Of the others the best come first: prompt before slow ones, those
//! with a unit ready before those that have only the template, and these before those that would have to fetch it;
//! then those with fewer machines of the same owner, so that one host's loss is not all of theirs; then the emptiest.
//! Reports are seconds old, so several gateways would all choose the same emptiest host: load counts in coarse steps,
//! and among equals the request's own number decides.

/// How a host is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It reports, and answers as fast as it should.
    Up,
    /// It answers late: only if there is nothing else.
    Slow,
    /// It takes nothing new.
    Draining,
    /// It has not reported for too long.
    Lost,
}

/// A host as it last reported.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// How it is doing.
    pub health: Health,
    /// Processors not promised to a machine.
    pub cpu_free: f64,
    /// Memory not promised to a machine.
    pub memory_free_mib: u64,
    /// Memory in all.
    pub memory_mib: u64,
    /// Disk not promised to a machine.
    pub disk_free_mib: u64,
    /// Machines it can still take.
    pub machines_free: u32,
    /// Whether it has the template.
    pub has_template: bool,
    /// Units of the shape that are ready.
    pub ready: u32,
    /// Machines of the same owner on it.
    pub owner_machines: u32,
}

/// What is to be placed.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Processors it may use.
    pub cpu_count: f64,
    /// Memory it may use.
    pub memory_mib: u64,
    /// Disk it may use.
    pub disk_mib: u64,
    /// Any number that differs between requests, such as a hash of the machine's id.
    pub salt: u64,
}

/// Steps in which load is compared.
const LOAD_STEPS: f64 = 8.0;

/// Indexes of the hosts that can take the machine, best first: who is refused by one tries the next.
pub fn rank(request: &Request, hosts: &[Host]) -> Vec<usize> {
    let mut able: Vec<usize> = (0..hosts.len()).filter(|index| can_take(request, &hosts[*index])).collect();
    able.sort_by_cached_key(|index| cost(request, &hosts[*index], *index));
    able
}

fn can_take(request: &Request, host: &Host) -> bool {
    matches!(host.health, Health::Up | Health::Slow)
        && host.machines_free > 0
        && host.cpu_free >= request.cpu_count
        && host.memory_free_mib >= request.memory_mib
        && host.disk_free_mib >= request.disk_mib
}

fn cost(request: &Request, host: &Host, index: usize) -> (bool, u8, u32, u32, u64) {
    let distance = match (host.ready, host.has_template) {
        (1.., _) => 0,
        (0, true) => 1,
        (0, false) => 2,
    };
    let used = 1.0 - (host.memory_free_mib - request.memory_mib) as f64 / host.memory_mib.max(1) as f64;
    let load = (used * LOAD_STEPS) as u32;
    (host.health == Health::Slow, distance, host.owner_machines, load, mix(request.salt, index as u64))
}

/// Well-spread bits of two numbers (the finaliser of `SplitMix64`).
fn mix(salt: u64, index: u64) -> u64 {
    let mut bits = salt.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Host = Host {
        health: Health::Up,
        cpu_free: 8.0,
        memory_free_mib: 8192,
        memory_mib: 16_384,
        disk_free_mib: 100_000,
        machines_free: 10,
        has_template: true,
        ready: 0,
        owner_machines: 0,
    };
    const REQUEST: Request = Request { cpu_count: 1.0, memory_mib: 1024, disk_mib: 3072, salt: 7 };

    #[test]
    fn only_hosts_with_room_that_take_machines_are_named() {
        let hosts = [
            Host { health: Health::Lost, ..HOST },
            Host { health: Health::Draining, ..HOST },
            Host { cpu_free: 0.9, ..HOST },
            Host { memory_free_mib: 1023, ..HOST },
            Host { disk_free_mib: 3071, ..HOST },
            Host { machines_free: 0, ..HOST },
            Host { cpu_free: 1.0, memory_free_mib: 1024, disk_free_mib: 3072, machines_free: 1, ..HOST },
        ];
        assert_eq!(rank(&REQUEST, &hosts), [6]);
        assert_eq!(rank(&REQUEST, &[]), Vec::<usize>::new());
    }

    #[test]
    fn prompt_then_ready_then_local_then_spread_then_empty() {
        let hosts = [
            Host { health: Health::Slow, ready: 5, ..HOST },
            Host { has_template: false, ..HOST },
            HOST,
            Host { memory_free_mib: 2048, ..HOST },
            Host { owner_machines: 1, ready: 1, ..HOST },
            Host { ready: 1, ..HOST },
        ];
        assert_eq!(rank(&REQUEST, &hosts), [5, 4, 2, 3, 1, 0]);
    }

    #[test]
    fn equals_are_chosen_equally_often() {
        let hosts = [HOST; 10];
        let mut firsts = [0_u32; 10];
        for salt in 0..10_000 {
            firsts[rank(&Request { salt, ..REQUEST }, &hosts)[0]] += 1;
        }
        assert!(firsts.iter().all(|count| (800..1200).contains(count)), "{firsts:?}");
    }
}
