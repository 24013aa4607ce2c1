//! Who this machine is: what the host may change after the agent has started (or was restored from a snapshot).

use std::collections::{BTreeMap, BTreeSet};

/// Variables every later process starts with, and those it must not see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    env: BTreeMap<String, String>,
    unset: BTreeSet<String>,
}

impl Identity {
    /// Merge `env` over what is known and hide `unset` from now on. A name in both is unset.
    pub fn update(&mut self, env: BTreeMap<String, String>, unset: Vec<String>) {
        for name in env.keys() {
            self.unset.remove(name);
        }
        self.env.extend(env);
        for name in unset {
            self.env.remove(&name);
            self.unset.insert(name);
        }
    }

    /// The variables, for whoever has to repeat them.
    pub fn env(&self) -> &BTreeMap<String, String> {
        &self.env
    }

    /// Names of the variables that another identity sets or hides otherwise.
    pub fn differing<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = &'a str> {
        let names = self.env.keys().chain(other.env.keys()).chain(self.unset.symmetric_difference(&other.unset));
        names
            .filter(|name| {
                self.env.get(*name) != other.env.get(*name) || self.unset.contains(*name) != other.unset.contains(*name)
            })
            .map(String::as_str)
    }

    /// Bring an environment in line.
    pub fn apply(&self, env: &mut BTreeMap<String, String>) {
        env.retain(|name, _| !self.unset.contains(name));
        env.extend(self.env.iter().map(|(name, value)| (name.clone(), value.clone())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn later_updates_win_and_unset_hides_inherited_names() {
        let mut identity = Identity::default();
        identity.update(map(&[("A", "1"), ("B", "1")]), vec!["HIDDEN".into()]);
        identity.update(map(&[("B", "2"), ("HIDDEN", "back")]), vec!["A".into()]);
        let mut env = map(&[("A", "0"), ("HIDDEN", "0"), ("KEPT", "0")]);
        identity.apply(&mut env);
        assert_eq!(env, map(&[("B", "2"), ("HIDDEN", "back"), ("KEPT", "0")]));
    }
}
