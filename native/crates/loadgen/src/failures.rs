//! What went wrong, counted by name.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// Failures by name.
#[derive(Default)]
pub struct Failures(BTreeMap<String, u64>);

impl Failures {
    pub fn add(&mut self, name: impl Into<String>) {
        *self.0.entry(name.into()).or_default() += 1;
    }

    pub fn json(&self) -> Value {
        json!(self.0)
    }
}
