//! Preview host names and the decision who may see a preview.
//!
//! Pure functions of their arguments: no I/O, no clock, no allocation in [`host`]. The Python twin of the grammar is
//! `previews/hosts.py`; both are tested against `tests/vectors/hosts.json`.

pub mod access;
pub mod host;
