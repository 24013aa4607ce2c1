//! Streams that the API has ordered: it says who may have what, the plane moves the bytes.
//!
//! The API answers a request with the private header `X-Sandgate-Stream`, an [`order::Order`]. The plane takes the
//! header off and carries the order out on the client's connection (docs/protocol.md, "Streams").
//!
//! ```text
//! api ──publish──▶ tail (control thread) ──batch──▶ hub (one per worker) ──▶ subscribers
//! api ──order: events, backlog──▶ exchange ──joins──▲
//! api ──order: output──▶ exchange ──▶ output ◀──frames──▶ hostd
//! api ──order: file────▶ exchange ──▶ file   ◀──frames─── hostd
//! api ──order: upload──▶ exchange ──▶ upload ───frames──▶ hostd
//! ```

pub mod asking;
pub mod backlog;
pub mod chunk;
pub mod counters;
pub mod event;
pub mod file;
pub mod hub;
pub mod lines;
pub mod machine;
pub mod order;
pub mod output;
pub mod pattern;
pub mod report;
pub mod span;
pub mod subscriber;
pub mod tail;
pub mod time;
pub mod upload;
pub mod wanted;
pub mod window;
