//! A fuzzer for stable compilers: mutates known inputs at random, without coverage to guide it.
//!
//! `sandgate-fuzz seeds [TARGET…]` writes the inputs to start from to `corpus/TARGET/`, where libFuzzer looks for them.
//! `sandgate-fuzz SECONDS [TARGET…]` fuzzes; each target runs for that long. An input that breaks a property is written to
//! `artifacts/TARGET/` and the exit status is 1. The seed is printed and can be given as `SANDGATE_FUZZ_SEED`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sandgate_fuzz::seeds::WORDS;
use sandgate_fuzz::{TARGETS, Target};

const INPUT_BYTES_MAX: usize = 4096;
/// Inputs between two looks at the clock.
const BATCH: u64 = 1024;

/// Xorshift: quick, and the same for a seed everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn one_of<'a>(&mut self, all: &[&'a [u8]]) -> &'a [u8] {
        all[self.below(all.len())]
    }
}

fn mutate(input: &mut Vec<u8>, seeds: &[&[u8]], random: &mut Random) {
    let at = random.below(input.len() + 1);
    let end = (at + random.below(16)).min(input.len());
    match random.below(7) {
        0 => drop(input.drain(at..end)),
        1 => drop(input.splice(at..at, random.one_of(WORDS).iter().copied())),
        2 => drop(input.splice(at..end, random.one_of(WORDS).iter().copied())),
        3 => input.insert(at, random.next() as u8),
        4 if at < input.len() => input[at] = random.next() as u8,
        5 => {
            let repeated = input[at..end].to_vec();
            input.splice(at..at, repeated);
        }
        _ => {
            let other = random.one_of(seeds);
            input.truncate(at);
            input.extend_from_slice(&other[random.below(other.len() + 1)..]);
        }
    }
    input.truncate(INPUT_BYTES_MAX);
}

/// Runs one target; the input that broke it, if any.
fn run(target: &Target, time: Duration, random: &mut Random) -> Option<Vec<u8>> {
    let began = Instant::now();
    let mut count = 0;
    while began.elapsed() < time {
        for _ in 0..BATCH {
            let mut input = random.one_of(target.seeds).to_vec();
            for _ in 0..random.below(6) {
                mutate(&mut input, target.seeds, random);
            }
            if catch_unwind(AssertUnwindSafe(|| (target.check)(&input))).is_err() {
                return Some(input);
            }
        }
        count += BATCH;
    }
    println!("{}: {count} inputs, none broke it", target.name);
    None
}

fn save(kind: &str, target: &Target, name: &str, input: &[u8]) -> std::io::Result<PathBuf> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(kind).join(target.name);
    std::fs::create_dir_all(&directory)?;
    let path = directory.join(name);
    std::fs::write(&path, input)?;
    Ok(path)
}

/// Fuzzes a target; whether it held.
fn holds(target: &Target, time: Duration, seed: u64) -> bool {
    let Some(input) = run(target, time, &mut Random(seed)) else { return true };
    match save("artifacts", target, &format!("broken-{}", std::process::id()), &input) {
        Ok(path) => eprintln!("{}: broken by {}", target.name, path.display()),
        Err(error) => eprintln!("{}: broken by {input:?} (not saved: {error})", target.name),
    }
    false
}

fn write_seeds(target: &Target) -> bool {
    let write = |(index, seed): (usize, &&[u8])| save("corpus", target, &format!("seed-{index}"), seed);
    let written: std::io::Result<Vec<_>> = target.seeds.iter().enumerate().map(write).collect();
    written.inspect_err(|error| eprintln!("{}: {error}", target.name)).is_ok()
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((what, wanted)) = arguments.split_first() else {
        eprintln!("usage: sandgate-fuzz SECONDS|seeds [TARGET...]");
        return ExitCode::from(2);
    };
    let targets = TARGETS.iter().filter(|target| wanted.is_empty() || wanted.iter().any(|name| name == target.name));
    let are_good: Vec<bool> = if what == "seeds" {
        targets.map(write_seeds).collect()
    } else {
        let Ok(seconds) = what.parse() else {
            eprintln!("sandgate-fuzz: {what} is no number of seconds");
            return ExitCode::from(2);
        };
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |now| now.as_nanos() as u64);
        let seed = std::env::var("SANDGATE_FUZZ_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(clock | 1);
        println!("seed {seed}");
        targets.map(|target| holds(target, Duration::from_secs(seconds), seed)).collect()
    };
    if are_good.is_empty() {
        eprintln!("sandgate-fuzz: there is no such target");
        return ExitCode::from(2);
    }
    if are_good.contains(&false) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
