"""The names a machine has inside: host name, machine id, name servers.

Written through the agent, at each boot and (later) each restore, because they belong to the copy and not to the
template. A guest without them is slow rather than broken: a program that looks up its own host name waits for a
resolver to fail, ten seconds in the case of Python's HTTP server.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

from vmm.drivers.base import Placement
from vmm.host.line import AgentLine
from vmm.types import MachineSpec


async def write_names(line: AgentLine, spec: MachineSpec, placement: Placement) -> None:
    """Tell a machine who it is. Raises VmmError when its agent refuses or does not answer."""
    files = {
        "/etc/hostname": f"{spec.hostname}\n",
        "/etc/hosts": _hosts(spec.hostname, placement.address),
        "/etc/machine-id": f"{machine_id(spec.id)}\n",
        "/etc/resolv.conf": _resolv_conf(placement.resolvers),
    }
    calls = [line.call({"op": "identity", "hostname": spec.hostname, "env": dict(spec.env)})]
    for path, text in files.items():
        calls.append(line.call({"op": "write", "path": path, "mode": 0o644, "user": "root"}, text.encode()))
    await asyncio.gather(*calls)


def machine_id(sandbox_id: str) -> str:
    """The 32 hex digits of /etc/machine-id: unique to a machine, and telling nothing about its id."""
    return hashlib.sha256(f"machine-id {sandbox_id}".encode()).hexdigest()[:32]


def _hosts(hostname: str, address: str) -> str:
    return f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{address}\t{hostname}\n"


def _resolv_conf(resolvers: Sequence[str]) -> str:
    return "".join(f"nameserver {address}\n" for address in resolvers) + "options timeout:2 attempts:2\n"
