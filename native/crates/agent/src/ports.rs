//! Listening TCP sockets, from `/proc/net/tcp` and `/proc/net/tcp6`.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use serde::Serialize;

use crate::error::{OpError, OpResult};

/// State of a listening socket in the kernel's table.
const LISTEN: &str = "0A";

#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Port {
    #[serde(rename = "port")]
    number: u16,
    address: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<String>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Ports {
    ports: Vec<Port>,
}

#[derive(Debug, PartialEq, Eq)]
struct Socket {
    address: IpAddr,
    port: u16,
    inode: u64,
}

/// What listens, sorted by port, our own listener left out.
pub fn listening() -> OpResult<Ports> {
    // By our own descriptors: a child between its birth and its exec holds our listener too.
    let ours: HashSet<u64> = sockets_of(Path::new("/proc/self")).collect();
    let mut sockets = read_table("/proc/net/tcp")?;
    // Without IPv6 there is no such file.
    sockets.extend(read_table("/proc/net/tcp6").unwrap_or_default());
    sockets.sort_by_key(|socket| (socket.port, socket.address));
    let owners = owners();
    let describe = |socket: Socket| {
        let owner = owners.get(&socket.inode);
        Port {
            number: socket.port,
            address: socket.address.to_string(),
            pid: owner.map(|owner| owner.0),
            process: owner.map(|owner| owner.1.clone()),
        }
    };
    Ok(Ports { ports: sockets.into_iter().filter(|socket| !ours.contains(&socket.inode)).map(describe).collect() })
}

fn read_table(path: &str) -> OpResult<Vec<Socket>> {
    let text = fs::read_to_string(path).map_err(|error| OpError::of_io(&error, path))?;
    Ok(text.lines().filter_map(parse_line).collect())
}

fn parse_line(line: &str) -> Option<Socket> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    if fields.get(3) != Some(&LISTEN) {
        return None;
    }
    let (address, port) = fields.get(1)?.split_once(':')?;
    Some(Socket {
        address: parse_address(address)?,
        port: u16::from_str_radix(port, 16).ok()?,
        inode: fields.get(9)?.parse().ok()?,
    })
}

/// Addresses are printed as 32-bit words in the machine's byte order.
fn parse_address(hex: &str) -> Option<IpAddr> {
    let words = (0..hex.len() / 8).map(|i| u32::from_str_radix(hex.get(i * 8..i * 8 + 8)?, 16).ok());
    let bytes: Vec<u8> = words.collect::<Option<Vec<u32>>>()?.into_iter().flat_map(u32::to_ne_bytes).collect();
    match bytes.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical()),
        _ => None,
    }
}

/// Process and its name for every open socket. Processes that vanish meanwhile are left out.
fn owners() -> HashMap<u64, (u32, String)> {
    let mut owners = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let process = entry.path();
        let mut name = None;
        for inode in sockets_of(&process) {
            let read_name = || fs::read_to_string(process.join("comm")).unwrap_or_default().trim().to_owned();
            owners.insert(inode, (pid, name.get_or_insert_with(read_name).clone()));
        }
    }
    owners
}

/// The inodes of the sockets that a process, a directory of /proc, has open.
fn sockets_of(process: &Path) -> impl Iterator<Item = u64> {
    let links = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    links.filter_map(|fd| {
        let link = fs::read_link(fd.path()).ok()?;
        link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_sockets_are_read_from_the_table() {
        let line =
            "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000  0 4711 1 0 100 0";
        let socket = parse_line(line).unwrap();
        assert_eq!(socket, Socket { address: Ipv4Addr::LOCALHOST.into(), port: 8080, inode: 4711 });
        assert_eq!(parse_line(&line.replace(" 0A ", " 01 ")), None);
        assert_eq!(parse_line("  sl  local_address rem_address   st tx_queue rx_queue"), None);
        assert_eq!(parse_address("00000000000000000000000000000000"), Some(Ipv6Addr::UNSPECIFIED.into()));
        assert_eq!(parse_address("0000000000000000FFFF00000100007F"), Some(Ipv4Addr::LOCALHOST.into()));
        assert_eq!(parse_address("zz"), None);
    }

    #[test]
    fn a_listener_of_another_process_would_be_listed_and_ours_is_not() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(read_table("/proc/net/tcp").unwrap().iter().any(|socket| socket.port == port));
        assert!(!listening().unwrap().ports.iter().any(|listed| listed.number == port));
    }
}
