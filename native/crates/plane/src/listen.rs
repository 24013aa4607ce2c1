//! Listening sockets: opened, or inherited from a predecessor.
//!
//! By TCP each worker has a socket of its own, and the kernel spreads connections over them. By a Unix socket all of
//! them share one, and whoever comes first accepts. Its file outlives a process that was killed; the next one replaces
//! a file nobody listens at, and leaves everything else alone.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use rustix::fs::Mode;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::handover::{self, Kind, Predecessor};

/// Connections the kernel queues per socket.
const BACKLOG: i32 = 4096;
/// A dead peer of a silent connection is noticed after this long (plus the kernel's probes).
const KEEPALIVE: Duration = Duration::from_secs(60);
/// How the address of a Unix socket begins.
const UNIX: &str = "unix:";

/// Where clients find us: `192.0.2.1:80`, `[2001:db8::1]:80` or `unix:/run/public.sock`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// An address of the network.
    Tcp(SocketAddr),
    /// A file.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix(UNIX) {
            Some(path) if Path::new(path).is_absolute() => Ok(Self::Unix(path.into())),
            Some(path) => Err(format!("{path} is not an absolute path")),
            None => text.parse().map(Self::Tcp).map_err(|_| format!("{text} is neither ADDRESS:PORT nor unix:/PATH")),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

/// A listening socket.
pub enum Listening {
    /// Of an address of the network.
    Tcp(TcpListener),
    /// Of a file.
    Unix(UnixListener),
}

impl Listening {
    /// One that came from another process.
    pub fn inherited(address: &Address, descriptor: OwnedFd) -> Self {
        match address {
            Address::Tcp(_) => Self::Tcp(descriptor.into()),
            Address::Unix(_) => Self::Unix(descriptor.into()),
        }
    }

    /// The same socket once more.
    pub fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Tcp(socket) => socket.try_clone().map(Self::Tcp),
            Self::Unix(socket) => socket.try_clone().map(Self::Unix),
        }
    }

    /// Where it listens.
    pub fn address(&self) -> io::Result<Address> {
        match self {
            Self::Tcp(socket) => socket.local_addr().map(Address::Tcp),
            Self::Unix(socket) => {
                let address = socket.local_addr()?;
                let path = address.as_pathname().ok_or(io::ErrorKind::AddrNotAvailable)?;
                Ok(Address::Unix(path.into()))
            }
        }
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
        }
    }
}

/// One address's sockets, at least one per worker.
pub type Group = Vec<Listening>;

/// Who may connect to a Unix socket.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// Permission bits of its file.
    pub mode: u32,
    /// The file's user and group, where they are not our own.
    pub user: Option<u32>,
    /// See there.
    pub group: Option<u32>,
}

/// Sockets at one address: the predecessor's, or else new ones.
pub fn listen(
    kind: Kind,
    address: &Address,
    count: usize,
    access: Access,
    predecessor: Option<&mut Predecessor>,
) -> io::Result<Group> {
    let opened = match (predecessor.and_then(|found| found.take(kind, address)), address) {
        (Some(inherited), _) => inherit(inherited, count, access),
        (None, Address::Tcp(address)) => open_all(*address, count),
        (None, Address::Unix(path)) => open_file(path, count, access),
    };
    opened.map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))
}

fn inherit(before: handover::Group, count: usize, access: Access) -> io::Result<Group> {
    let handover::Group { address, mut sockets, .. } = before;
    while sockets.len() < count {
        sockets.push(match &address {
            Address::Tcp(address) => open_listening(*address)?,
            Address::Unix(_) => sockets.first().ok_or(io::ErrorKind::NotFound)?.try_clone()?,
        });
    }
    if let Address::Unix(path) = &address {
        grant(path, access)?;
    }
    Ok(sockets)
}

/// Removes the files of Unix sockets that nobody will listen at.
pub fn forget<'a>(addresses: impl IntoIterator<Item = &'a Address>) {
    for address in addresses {
        if let Address::Unix(path) = address
            && let Err(error) = std::fs::remove_file(path)
        {
            crate::log::warning("cannot remove the file of a listener", &format_args!("{}: {error}", path.display()));
        }
    }
}

/// One listener per worker on the same address; the kernel spreads connections over them.
fn open_all(address: SocketAddr, count: usize) -> io::Result<Group> {
    // SO_REUSEPORT would let two planes share a port unnoticed. A bind without it fails if anybody is there.
    let probe = open(address, false)?;
    let address = probe.local_addr()?;
    drop(probe);
    (0..count).map(|_| open_listening(address)).collect()
}

fn open_listening(address: SocketAddr) -> io::Result<Listening> {
    let listener = open(address, true)?;
    SockRef::from(&listener).listen(BACKLOG)?;
    Ok(Listening::Tcp(listener))
}

/// Options are inherited by accepted connections, which saves calls on each.
fn open(address: SocketAddr, is_shared: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(is_shared)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(KEEPALIVE))?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn open_file(path: &Path, count: usize, access: Access) -> io::Result<Group> {
    clear(path)?;
    let listener = bind_private(path)?;
    listener.set_nonblocking(true)?;
    SockRef::from(&listener).listen(BACKLOG)?;
    grant(path, access)?;
    (0..count).map(|_| listener.try_clone().map(Listening::Unix)).collect()
}

/// Binds a socket that nobody but us can connect to.
pub fn bind_private(path: &Path) -> io::Result<UnixListener> {
    // The mask is the process's; no other thread makes files yet.
    let mask = rustix::process::umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(mask);
    listener
}

/// Removes the socket of a process that is gone. A live one, or a file of another kind, is an error.
pub fn clear(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "it is in use by another process")),
    }
}

/// Lets others connect, the owner set first: in between the file is no more open than it was.
fn grant(path: &Path, access: Access) -> io::Result<()> {
    if access.user.is_some() || access.group.is_some() {
        std::os::unix::fs::chown(path, access.user, access.group)?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(access.mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_as_they_are_written() {
        for text in ["127.0.0.1:80", "[::1]:0", "unix:/run/a b.sock"] {
            assert_eq!(text.parse::<Address>().map(|address| address.to_string()).as_deref(), Ok(text));
        }
        for bad in ["", "80", "localhost:80", "unix:", "unix:run/a.sock", "/run/a.sock"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}
