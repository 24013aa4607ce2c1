//! How many units will be asked for before a new one can be there.
//!
//! Two things are remembered of the arrivals: their rate, over a short and a long time, and the largest burst. The rate
//! covers steady load: while one unit is being made, a Poisson number of claims comes, and its mean plus three standard
//! deviations is enough 999 times in 1,000. The burst covers clients that ask for many at once, which no rate foretells.
//! All of it is forgotten exponentially, so it takes no history and no more than a microsecond.

/// Time constants of the two rates, in seconds: one follows a rise within seconds, one bridges a pause of a minute.
const RATE_S: [f64; 2] = [10.0, 120.0];
const PEAK_HALF_LIFE_S: f64 = 600.0;
/// Standard deviations above the mean.
const SAFETY: f64 = 3.0;
/// Until the first one was made.
const REFILL_DEFAULT_S: f64 = 0.5;
/// Weight of the newest duration among those seen.
const REFILL_WEIGHT: f64 = 0.2;
/// Claims closer together than this are one burst, however fast a refill is.
const BURST_S_MIN: f64 = 1.0;

/// A number that decays by itself.
#[derive(Clone, Copy, Debug, Default)]
struct Decaying {
    value: f64,
    at: f64,
}

impl Decaying {
    /// Its value `now`; a clock that stands still or steps back changes nothing.
    fn get(self, now: f64, time_constant_s: f64) -> f64 {
        self.value * (-(now - self.at).max(0.0) / time_constant_s).exp()
    }

    fn set(&mut self, now: f64, value: f64) {
        *self = Self { value, at: now.max(self.at) };
    }
}

/// What is known of the demand for one kind of unit. Times are seconds of any clock that does not jump.
#[derive(Clone, Debug)]
pub struct Demand {
    counts: [Decaying; 2],
    burst: Decaying,
    peak: Decaying,
    refill_s: f64,
    has_measured: bool,
}

impl Default for Demand {
    fn default() -> Self {
        let zero = Decaying::default();
        Self { counts: [zero; 2], burst: zero, peak: zero, refill_s: REFILL_DEFAULT_S, has_measured: false }
    }
}

impl Demand {
    /// A unit was asked for.
    pub fn arrive(&mut self, now: f64) {
        for (count, time_constant_s) in self.counts.iter_mut().zip(RATE_S) {
            count.set(now, count.get(now, time_constant_s) + 1.0);
        }
        self.burst.set(now, self.burst.get(now, self.refill_s.max(BURST_S_MIN)) + 1.0);
        let peak = self.burst.value.max(self.peak_at(now));
        self.peak.set(now, peak);
    }

    /// Making one took so long.
    pub fn refilled(&mut self, seconds: f64) {
        let weight = if self.has_measured { REFILL_WEIGHT } else { 1.0 };
        self.refill_s += weight * (seconds.max(0.0) - self.refill_s);
        self.has_measured = true;
    }

    /// Seconds that making one takes.
    pub fn refill_s(&self) -> f64 {
        self.refill_s
    }

    /// Arrivals per second, the faster of the two.
    pub fn rate(&self, now: f64) -> f64 {
        let rates = self.counts.iter().zip(RATE_S).map(|(count, seconds)| count.get(now, seconds) / seconds);
        rates.fold(0.0, f64::max)
    }

    /// Whether it was asked for again lately, not just once.
    pub fn is_repeated(&self, now: f64) -> bool {
        self.counts[1].get(now, RATE_S[1]) >= 1.5
    }

    /// How many should be there so that hardly anybody has to wait.
    pub fn wanted(&self, now: f64) -> f64 {
        let mean = self.rate(now) * self.refill_s;
        (mean + SAFETY * mean.sqrt()).max(self.peak_at(now))
    }

    fn peak_at(&self, now: f64) -> f64 {
        self.peak.get(now, PEAK_HALF_LIFE_S / std::f64::consts::LN_2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_wanted_where_nothing_came() {
        assert!(Demand::default().wanted(1e6) < 1e-9);
    }

    #[test]
    fn steady_load_is_covered_with_a_margin_and_forgotten_after_it_ends() {
        let mut demand = Demand::default();
        demand.refilled(0.5);
        let mut now = 0.0;
        while now < 600.0 {
            demand.arrive(now);
            now += 0.1;
        }
        assert!((demand.rate(now) - 10.0).abs() < 1.0, "{}", demand.rate(now));
        let wanted = demand.wanted(now);
        assert!((10.0..16.0).contains(&wanted), "5 come meanwhile, 11.7 at worst: {wanted}");
        assert!(demand.wanted(now + 3600.0) < 0.5);
    }

    #[test]
    fn a_burst_is_remembered_for_minutes() {
        let mut demand = Demand::default();
        for _ in 0..30 {
            demand.arrive(100.0);
        }
        assert!((29.9..30.1).contains(&demand.wanted(100.0)));
        assert!((14.0..16.0).contains(&demand.wanted(700.0)));
        assert!(demand.wanted(8000.0) < 0.5);
    }

    #[test]
    fn slower_refills_want_more_units() {
        let steady = |refill_s: f64| {
            let mut demand = Demand::default();
            demand.refilled(refill_s);
            (0..1000).for_each(|i| demand.arrive(f64::from(i)));
            demand.wanted(1000.0)
        };
        assert!(steady(0.1) < steady(1.0) && steady(1.0) < steady(10.0));
    }

    #[test]
    fn a_clock_that_steps_back_harms_nothing() {
        let mut demand = Demand::default();
        for now in [10.0, 5.0, 10.0, -1e9, 11.0] {
            demand.arrive(now);
            assert!(demand.wanted(now).is_finite() && demand.wanted(now) <= 5.0);
        }
    }
}
