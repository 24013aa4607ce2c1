"""The names a machine has inside: host name, machine id, name servers; its environment and its token.

They belong to the copy and not to the template, so they are set at each boot, claim and restore: in one round trip to
the agent, before anybody else may use the machine. A guest without them is slow rather than broken: a program that
looks up its own host name waits for a resolver to fail, ten seconds in the case of Python's HTTP server.

What this cannot renew is the state of random generators inside processes that were copied with their memory: the
kernel's randomness differs from the first moment, theirs does not until a hook of stage `after-restore` tells them.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from typing import Any

from vmm.calls import decode
from vmm.drivers.base import Placement
from vmm.guest import HooksRun, HookStage
from vmm.host.line import CALL_TIMEOUT_S, AgentLine
from vmm.types import MachineSpec

logger = logging.getLogger(__name__)

#: For all hooks of one stage. A snapshot, pause or wake waits for them, so they are to be short.
HOOKS_TIMEOUT_S = 5.0
#: The agent gives a hook that is out of time two seconds to go.
_HOOKS_GRACE_S = 3.0
_ENTROPY_BYTES = 32


async def write_names(
    line: AgentLine,
    spec: MachineSpec,
    placement: Placement,
    *,
    has_resolvers: bool = False,
    keeps_env: bool = False,
    token: str | None = None,
    hooks: HookStage | None = None,
) -> HooksRun:
    """Tell a machine who it is, whoever it was before. Raises VmmError when its agent refuses or does not answer.

    has_resolvers: `warm_up` has told it already.  keeps_env: leave its variables as they are in its memory.
    token: what later connections to its agent have to show; the one in use stays. hooks: run these once it knows.
    """
    op: dict[str, Any] = {
        "op": "identity",
        "hostname": spec.hostname,
        "files": {
            "/etc/hostname": f"{spec.hostname}\n",
            "/etc/hosts": _hosts(spec.hostname, placement.address),
            "/etc/machine-id": f"{machine_id(spec.id)}\n",
        },
    }
    if not has_resolvers:
        op["files"] |= _resolver_files(placement)
    if not keeps_env:
        op |= {"reset": True, "env": dict(spec.env)}
    if token is not None:
        op["token"] = token
    if hooks is not None:
        op |= {"hooks": hooks, "timeout_s": HOOKS_TIMEOUT_S}
    if hooks is HookStage.AFTER_RESTORE:
        op["entropy"] = secrets.token_hex(_ENTROPY_BYTES)
    return await _call(line, op, hooks)


async def run_hooks(line: AgentLine, stage: HookStage) -> HooksRun:
    """Let the machine's owner prepare for what comes, or mend what came. Raises VmmError as `write_names` does."""
    return await _call(line, {"op": "hooks", "stage": stage, "timeout_s": HOOKS_TIMEOUT_S}, stage)


async def warm_up(line: AgentLine, placement: Placement) -> None:
    """Have the agent see to what a claim and the first command would otherwise wait for. Raises as `write_names`."""
    await line.call({"op": "identity", "files": _resolver_files(placement)})
    await line.call({"op": "warm_up"})


async def _call(line: AgentLine, op: dict[str, Any], stage: HookStage | None) -> HooksRun:
    timeout_s = CALL_TIMEOUT_S if stage is None else HOOKS_TIMEOUT_S + _HOOKS_GRACE_S
    run = decode(HooksRun, await line.call(op, timeout_s=timeout_s))
    for hook in run.failed:
        logger.warning("machine %s: its hook %s failed: %s", line.name, hook.path, hook.reason)
    return run


def machine_id(sandbox_id: str) -> str:
    """The 32 hex digits of /etc/machine-id: unique to a machine, and telling nothing about its id."""
    return hashlib.sha256(f"machine-id {sandbox_id}".encode()).hexdigest()[:32]


def _hosts(hostname: str, address: str) -> str:
    return f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{address}\t{hostname}\n"


def _resolver_files(placement: Placement) -> dict[str, str]:
    servers = "".join(f"nameserver {address}\n" for address in placement.resolvers)
    return {"/etc/resolv.conf": f"{servers}options timeout:2 attempts:2\n"}
