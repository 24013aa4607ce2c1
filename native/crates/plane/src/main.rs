//! The `sandgate-plane` program.

use clap::Parser;
use sandgate_plane::config::Config;

fn main() {
    if let Err(error) = sandgate_plane::server::run(Config::parse()) {
        sandgate_plane::log::fatal("cannot start", &error);
    }
}
