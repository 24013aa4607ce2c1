//! Where the load goes, and the request's head that all kinds of load share.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Target {
    #[arg(long)]
    pub connect: SocketAddr,
    /// A file with a host per line. HTTP asks them in turn, everything else the first.
    #[arg(long)]
    hosts: PathBuf,
    #[arg(long, default_value = "/")]
    path: String,
    /// Another header line; may be given several times.
    #[arg(long = "header")]
    headers: Vec<String>,
}

impl Target {
    /// The lines of the hosts' file, at least one.
    pub fn hosts(&self) -> io::Result<Vec<String>> {
        let text = fs::read_to_string(&self.hosts)?;
        let lines: Vec<String> = text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect();
        if lines.is_empty() { Err(io::Error::other("no host is given")) } else { Ok(lines) }
    }

    /// A GET request to `host`, with further header lines.
    pub fn request(&self, host: &str, more: &[&str]) -> Vec<u8> {
        let mut head = format!("GET {} HTTP/1.1\r\nHost: {host}\r\n", self.path);
        for line in self.headers.iter().map(String::as_str).chain(more.iter().copied()) {
            head.push_str(line);
            head.push_str("\r\n");
        }
        head.push_str("\r\n");
        head.into_bytes()
    }
}
