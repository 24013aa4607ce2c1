//! The warm pool's decisions, without I/O, clock or randomness: those come in as arguments.
//!
//! [`scheduler`] decides for one host which units to make ready ahead of their claims, and hands them out. [`demand`] is
//! its estimate of what will be asked for. [`placement`] ranks the hosts of a fleet for one machine.

pub mod demand;
pub mod placement;
pub mod scheduler;
