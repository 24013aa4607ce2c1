//! What is fuzzed: every parser that reads bytes from outside, each with a property and with inputs to start from.

pub mod seeds;
pub mod targets;

/// One fuzz target.
pub struct Target {
    /// As `make fuzz` spells it.
    pub name: &'static str,
    /// Panics when the property does not hold.
    pub check: fn(&[u8]),
    /// Inputs to start from.
    pub seeds: &'static [&'static [u8]],
}

/// All of them.
pub const TARGETS: [Target; 12] = [
    Target { name: "request", check: targets::request, seeds: seeds::REQUESTS },
    Target { name: "response", check: targets::response, seeds: seeds::RESPONSES },
    Target { name: "body", check: targets::body, seeds: seeds::BODIES },
    Target { name: "host", check: targets::host, seeds: seeds::HOSTS },
    Target { name: "control", check: targets::control, seeds: seeds::CONTROLS },
    Target { name: "frame", check: targets::frame, seeds: seeds::FRAMES },
    Target { name: "streams", check: targets::streams, seeds: seeds::STREAMS },
    Target { name: "output", check: targets::output, seeds: seeds::OUTPUTS },
    Target { name: "file", check: targets::file, seeds: seeds::FILES },
    Target { name: "http2", check: targets::http2, seeds: seeds::REQUESTS },
    Target { name: "index", check: targets::index, seeds: seeds::INDEXES },
    Target { name: "image", check: targets::image, seeds: seeds::IMAGES },
];
