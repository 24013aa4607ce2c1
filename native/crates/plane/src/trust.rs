//! Proxies in front of the plane whose word about the client counts.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use crate::compose::{HTTP, HTTPS, Peer};
use crate::config::Config;
use crate::http::fields::{Field, members};

/// Who is at the other end of a connection; none: a process of this machine, by a Unix socket.
pub type Client = Option<IpAddr>;

/// How Unix sockets are named where a network could be.
pub const UNIX: &str = "unix";

/// A block of addresses, such as `10.0.0.0/8` or `::1`, or `unix`: whoever may connect to a Unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// Clients without an address.
    Unix,
    /// Addresses that agree in the first bits.
    Block {
        /// One of them.
        address: IpAddr,
        /// How many.
        bits: u8,
    },
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == UNIX {
            return Ok(Self::Unix);
        }
        let (address, bits) = text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let address: IpAddr = address.parse().map_err(|_| format!("{text} is not an address or a network"))?;
        let bits_max = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(bits_max), str::parse).ok().filter(|&bits| bits <= bits_max);
        Ok(Self::Block {
            address,
            bits: bits.ok_or_else(|| format!("{text} has a prefix of more than {bits_max} bits"))?,
        })
    }
}

impl Network {
    fn contains(self, client: Client) -> bool {
        let Self::Block { address, bits } = self else { return client.is_none() };
        let Some(client) = client else { return false };
        let differs = match (address, client) {
            (IpAddr::V4(a), IpAddr::V4(b)) => (u32::from(a) ^ u32::from(b)).leading_zeros(),
            (IpAddr::V6(a), IpAddr::V6(b)) => (u128::from(a) ^ u128::from(b)).leading_zeros(),
            _ => return false,
        };
        differs >= u32::from(bits)
    }
}

/// The peer of a connection of `client`.
pub fn peer(config: &Config, client: Client, proto: &'static str) -> Peer {
    Peer { is_trusted: is_trusted(&config.trusted_proxy, client), ..Peer::new(client, proto) }
}

/// Whether a client is a trusted proxy.
pub fn is_trusted(networks: &[Network], client: Client) -> bool {
    networks.iter().any(|network| network.contains(client))
}

/// The client and its protocol as a trusted proxy tells them; what it leaves out is as the connection says.
/// Addresses of further trusted proxies are skipped, from the nearest on.
pub fn client_of(networks: &[Network], peer: &Peer, head: &[u8], fields: &[Field]) -> Peer {
    let values = |name: &'static [u8]| {
        let named = fields.iter().filter(move |field| field.name(head).eq_ignore_ascii_case(name));
        named.flat_map(|field| members(field.value(head)))
    };
    let mut client = None;
    let mut chain: Vec<&[u8]> = values(b"x-forwarded-for").collect();
    while let Some(address) = chain.pop().and_then(address) {
        client = Some(address);
        if !is_trusted(networks, Some(address)) {
            break;
        }
    }
    let proto = match values(b"x-forwarded-proto").last() {
        Some(proto) if proto.eq_ignore_ascii_case(b"https") => HTTPS,
        Some(proto) if proto.eq_ignore_ascii_case(b"http") => HTTP,
        _ => peer.proto,
    };
    client.map_or_else(|| Peer { proto, ..peer.clone() }, |client| Peer::new(Some(client), proto))
}

/// An address as proxies write it: alone, with a port, or IPv6 in brackets.
fn address(text: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(text).ok()?;
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let parsed = bare.parse().or_else(|_| text.parse::<SocketAddr>().map(|address| address.ip()));
    parsed.ok().map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_hold_what_their_prefix_says() {
        let holds = |network: &str, address: &str| {
            let network: Network = network.parse().expect("a network");
            network.contains(Some(address.parse().expect("an address")))
        };
        assert!(holds("10.0.0.0/8", "10.255.0.1"));
        assert!(!holds("10.0.0.0/8", "11.0.0.0"));
        assert!(holds("0.0.0.0/0", "203.0.113.9"));
        assert!(holds("192.0.2.1", "192.0.2.1"));
        assert!(!holds("192.0.2.1/32", "192.0.2.2"));
        assert!(holds("2001:db8::/31", "2001:db9::1"));
        assert!(!holds("2001:db8::/32", "2001:db9::1"));
        assert!(!holds("::/0", "10.0.0.1"));
        assert!(!holds("unix", "127.0.0.1"));
        assert!("unix".parse::<Network>().is_ok_and(|unix| unix.contains(None)));
        assert!("0.0.0.0/0".parse::<Network>().is_ok_and(|all| !all.contains(None)));
        for bad in ["", "10.0.0.0/33", "::/129", "10.0.0.0/", "example.com", "10.0.0.0/-1"] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_are_read_as_proxies_write_them() {
        for (text, expected) in [
            ("192.0.2.1", Some("192.0.2.1")),
            ("192.0.2.1:8080", Some("192.0.2.1")),
            ("[2001:db8::1]", Some("2001:db8::1")),
            ("[2001:db8::1]:443", Some("2001:db8::1")),
            ("2001:db8::1", Some("2001:db8::1")),
            ("::ffff:192.0.2.1", Some("192.0.2.1")),
            ("unknown", None),
            ("", None),
        ] {
            assert_eq!(address(text.as_bytes()).map(|ip| ip.to_string()).as_deref(), expected, "{text}");
        }
    }
}
