//! Sandgate's plane: the public listener.
//!
//! It looks at the `Host` header of each request. Preview hosts lead to a port of a sandbox, everything else to the
//! API's Unix socket. Bytes are streamed both ways and never buffered whole. All decisions are made from the route
//! table that the API pushes over the control socket.
//!
//! ```text
//!              ┌ worker (thread) ── connection ── prepare ── exchange ── tunnel ┐
//! clients ────▶│   one listener each, one current-thread runtime, no locks      │──▶ sandboxes, API
//!              └──────────▲─────────────────────────────────────────────────────┘
//!                         │ table (atomic pointers)
//!              control thread: control socket, journal, admin listener, signals
//! ```

pub mod access_log;
pub mod admin;
pub mod admit;
pub mod buf;
pub mod busiest;
pub mod compose;
pub mod config;
pub mod connection;
pub mod control;
pub mod exchange;
pub mod failure;
pub mod handover;
pub mod histogram;
pub mod hold;
pub mod http;
pub mod http2;
pub mod journal;
pub mod listen;
pub mod log;
pub mod message;
pub mod metrics;
pub mod net;
pub mod operator;
pub mod pace;
pub mod policy;
pub mod pool;
pub mod prepare;
pub mod pump;
pub mod rouse;
pub mod server;
pub mod splice;
pub mod streams;
pub mod table;
pub mod tls;
pub mod trust;
pub mod tunnel;
pub mod wake;
pub mod watch;
pub mod worker;
