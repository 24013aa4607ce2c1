"""What guests may reach: one static nftables table per instance.

The rules name interfaces by prefix and addresses by block, so starting or ending a machine changes no rule. The
internet is reachable through masquerading, nothing private is, and only the host opens connections to a guest.
"""

from __future__ import annotations

import ipaddress
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from vmm import programs
from vmm.errors import MachineError

#: Never the internet: this host, private networks, shared address space, link-local (cloud metadata), protocol
#: assignments, benchmarking (where machines live), multicast, reserved and broadcast. Source: IANA's IPv4 registry of
#: special-purpose addresses; its documentation ranges are left out because no real network answers there.
NOT_INTERNET = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/3",
)

_TIMEOUT_S = 10


def table_name(instance: str) -> str:
    """Name of an instance's table."""
    return f"sandgate_{instance}"


def ruleset(
    instance: str,
    *,
    prefix: str,
    block: ipaddress.IPv4Network,
    resolvers: Iterable[str],
    allowed: Iterable[str],
    denied: Iterable[str],
) -> str:
    """The table as nft reads it; loading it replaces an earlier one in one step.

    resolvers: addresses open on port 53.  allowed, denied: networks; `allowed` wins.
    """
    table = table_name(instance)
    guests = f'"{prefix}*"'
    return f"""
table inet {table} {{}}
delete table inet {table}
table inet {table} {{
    set resolvers {{ type ipv4_addr; {_elements(resolvers)} }}
    set allowed {{ type ipv4_addr; flags interval; auto-merge; {_elements(allowed)} }}
    set denied {{ type ipv4_addr; flags interval; auto-merge; {_elements(denied)} }}

    chain spoofed {{
        type filter hook prerouting priority raw; policy accept;
        iifname {guests} meta nfproto ipv6 drop
        iifname {guests} fib saddr . iif oif missing drop
    }}
    chain to_host {{
        type filter hook input priority filter; policy accept;
        iifname {guests} ct state established,related accept
        iifname {guests} drop
    }}
    chain through {{
        type filter hook forward priority filter; policy accept;
        iifname {guests} jump from_guest
        oifname {guests} ct state established,related accept
        oifname {guests} drop
    }}
    chain from_guest {{
        oifname {guests} drop
        ct state established,related accept
        ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept
        ip daddr @allowed accept
        ip daddr @denied drop
        accept
    }}
    chain source {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {block} oifname != {guests} masquerade
    }}
}}
"""


def apply(rules: str) -> None:
    """Load a ruleset. Raises MachineError(`driver_failed`) with nft's own words."""
    _nft(["-f", "-"], rules)


def remove(instance: str) -> None:
    """Remove an instance's table; none there is fine."""
    table = table_name(instance)
    _nft(["-f", "-"], f"table inet {table} {{}}\ndelete table inet {table}\n")


def host_resolvers(files: Sequence[str] = ("/run/systemd/resolve/resolv.conf", "/etc/resolv.conf")) -> list[str]:
    """IPv4 name servers of this host that a guest can use too: a resolver on the loopback address is none."""
    for path in files:
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue
        servers = [words[1] for line in lines if len(words := line.split()) > 1 and words[0] == "nameserver"]
        usable = [server for server in servers if _is_usable(server)]
        if usable:
            return usable
    return []


def enable_forwarding() -> None:
    """Let the kernel route packets between links. It stays on when hostd ends: others may rely on it by then."""
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def _is_usable(server: str) -> bool:
    try:
        return not ipaddress.IPv4Address(server).is_loopback
    except ValueError:
        return False


def _elements(values: Iterable[str]) -> str:
    listed = ", ".join(values)
    return f"elements = {{ {listed} }}" if listed else ""


def _nft(arguments: Sequence[str], text: str) -> None:
    try:
        done = subprocess.run(
            [programs.find("nft") or "nft", *arguments],
            input=text,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError("driver_failed", "nft could not be run; install nftables", detail=str(error)) from error
    if done.returncode:
        raise MachineError("driver_failed", "nft refused the firewall rules", detail=done.stderr.strip()[:2000])
