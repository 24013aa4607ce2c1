//! Metrics of the sandboxes with most requests; all others are one more.
//!
//! Which ones those are is decided at each scrape, by the requests since the one before. A sandbox's series is what it
//! has had in all; `other` grows by what sandboxes that are not shown have had since. So neither ever goes back.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use crate::histogram::{Figures, write_head};
use crate::table::{Entry, Live, Table};

const NAME: &str = "sandgate_plane_sandbox_request_seconds";

/// What was known at the last scrape.
#[derive(Default)]
pub struct Busiest {
    seen: HashMap<u64, Seen>,
    other: Option<Figures>,
}

struct Seen {
    live: Arc<Live>,
    figures: Figures,
    is_current: bool,
}

impl Busiest {
    /// Writes the series of at most `max` sandboxes and of the others together.
    pub fn write(&mut self, out: &mut String, table: &Table, max: usize) {
        let mut other = self.other.take().unwrap_or_else(Figures::of_sandboxes);
        let mut current = Vec::new();
        for seen in self.seen.values_mut() {
            seen.is_current = false;
        }
        table.each_entry(|_, entry| {
            let Entry::Here(sandbox) = entry else { return };
            let figures = sandbox.live.seconds.figures();
            if figures.count() == 0 {
                return;
            }
            let seen = self.seen.entry(sandbox.live.incarnation).or_insert_with(|| Seen {
                live: Arc::clone(&sandbox.live),
                figures: Figures::of_sandboxes(),
                is_current: true,
            });
            seen.is_current = true;
            let before = std::mem::replace(&mut seen.figures, figures.clone());
            current.push((Reverse(figures.count() - before.count()), sandbox.id.clone(), figures, before));
        });
        self.seen.retain(|_, seen| {
            if !seen.is_current {
                other.add_growth(&seen.live.seconds.figures(), &seen.figures);
            }
            seen.is_current
        });
        current.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
        write_head(out, NAME, "Time from a request's header to the end of its response, by sandbox.");
        for (at, (_, id, figures, before)) in current.into_iter().enumerate() {
            if at < max {
                figures.write(out, NAME, &format!("sandbox=\"{id}\""));
            } else {
                other.add_growth(&figures, &before);
            }
        }
        other.write(out, NAME, "sandbox=\"other\"");
        self.other = Some(other);
    }
}
