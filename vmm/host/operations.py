"""The machine operations of docs/protocol.md, as functions from a decoded request to an answer."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from vmm.errors import MachineError
from vmm.host.machines import Machines
from vmm.types import (
    ChildSpec,
    ForkFailure,
    HostInfo,
    IdleAction,
    MachineInfo,
    MachineSpec,
    MachineStats,
    PoolStatus,
    SnapshotInfo,
    StopCause,
)

Handler = Callable[["Host", Mapping[str, Any]], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Host:
    """What the operations work on."""

    machines: Machines
    host_id: str
    version: str
    started_at: float

    async def call(self, op: Mapping[str, Any]) -> Any:
        """Run the operation named by `op`; returns its reply. Raises MachineError."""
        handler = _HANDLERS.get(str(op.get("op")))
        if handler is None:
            raise MachineError("bad_request", f"there is no operation {str(op.get('op'))[:64]!r}")
        return await handler(self, op)


async def _create(host: Host, op: Mapping[str, Any]) -> MachineInfo:
    spec = _decode(MachineSpec, {key: op[key] for key in op if key not in ("op", "early")})
    return await host.machines.create(spec, is_early=_decode(bool, op.get("early", False)))


async def _destroy(host: Host, op: Mapping[str, Any]) -> dict[str, bool]:
    cause = _decode(StopCause, op.get("cause", StopCause.REQUESTED))
    unwanted_for_s = _decode(float, op.get("unwanted_for_s", 0.0))
    return {"existed": await host.machines.destroy(_text(op, "id"), cause, unwanted_for_s)}


async def _get(host: Host, op: Mapping[str, Any]) -> MachineInfo:
    return host.machines.find(_text(op, "id")).record.info()


async def _list(host: Host, _: Mapping[str, Any]) -> dict[str, list[MachineInfo]]:
    return {"machines": host.machines.infos()}


async def _update(host: Host, op: Mapping[str, Any]) -> MachineInfo:
    machine = host.machines.find_live(_text(op, "id"))
    machine.update(**{name: _decode(shape, op[name]) for name, shape in _SETTINGS.items() if name in op})
    return machine.record.info()


async def _pause(host: Host, op: Mapping[str, Any]) -> MachineInfo:
    return await host.machines.pause(_text(op, "id"), hibernate=_decode(bool, op.get("hibernate", False)))


async def _resume(host: Host, op: Mapping[str, Any]) -> MachineInfo:
    return await host.machines.resume(_text(op, "id"))


async def _restore(host: Host, op: Mapping[str, Any]) -> MachineInfo:
    restore_id = _text(op, "restore") if "restore" in op else None
    return await host.machines.restore(_text(op, "id"), _text(op, "snapshot"), restore_id)


async def _fork(host: Host, op: Mapping[str, Any]) -> dict[str, Any]:
    fork = await host.machines.fork(_text(op, "id"), _decode(list[ChildSpec], op.get("children")))
    return {"machines": [_child(made) for made in fork.machines], "pause_ms": fork.pause_ms}


def _child(made: MachineInfo | ForkFailure) -> MachineInfo | dict[str, Any]:
    if isinstance(made, MachineInfo):
        return made
    return {"id": made.id, "error": {"code": made.code, "message": made.message, "detail": made.detail}}


async def _snapshot(host: Host, op: Mapping[str, Any]) -> SnapshotInfo:
    return await host.machines.snapshot(_text(op, "id"), _text(op, "machine"))


async def _get_snapshot(host: Host, op: Mapping[str, Any]) -> SnapshotInfo:
    return host.machines.snapshots.find(_text(op, "id")).info


async def _list_snapshots(host: Host, _: Mapping[str, Any]) -> dict[str, list[SnapshotInfo]]:
    return {"snapshots": host.machines.snapshots.infos()}


async def _delete_snapshot(host: Host, op: Mapping[str, Any]) -> dict[str, bool]:
    return {"existed": await host.machines.snapshots.delete(_text(op, "id"))}


async def _touch(host: Host, op: Mapping[str, Any]) -> dict[str, Any]:
    for machine_id in _decode(list[str], op.get("ids")):
        try:
            host.machines.find(machine_id).touch()
        except MachineError:
            # Gone meanwhile: its traffic is of no interest to anybody.
            continue
    return {}


async def _stats(host: Host, op: Mapping[str, Any]) -> MachineStats:
    return await host.machines.stats(_text(op, "id"))


async def _history(host: Host, op: Mapping[str, Any]) -> dict[str, Any]:
    machine = host.machines.find_live(_text(op, "id"))
    return {"samples": host.machines.history.since(machine.id, _decode(float, op.get("since", 0.0)))}


async def _templates(host: Host, _: Mapping[str, Any]) -> dict[str, Any]:
    return {"templates": list(host.machines.driver.templates())}


async def _info(host: Host, _: Mapping[str, Any]) -> HostInfo:
    driver = host.machines.driver
    return HostInfo(
        host_id=host.host_id,
        driver=driver.name,
        capabilities=asdict(driver.capabilities()),
        templates=tuple(template.name for template in driver.templates()),
        machines=host.machines.live_count,
        cpu_count=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        started_at=host.started_at,
        version=host.version,
        backing_bytes=host.machines.backing.held_bytes,
    )


#: What `machine.update` takes.
_SETTINGS: dict[str, Any] = {
    "expires_at": float | None,
    "idle_timeout_s": float | None,
    "idle_action": IdleAction,
    "auto_resume": bool,
    "hibernate_after_s": float | None,
}


async def _pool_status(host: Host, _: Mapping[str, Any]) -> dict[str, list[PoolStatus]]:
    return {"pools": host.machines.pool.status()}


_HANDLERS: dict[str, Handler] = {
    "machine.create": _create,
    "machine.destroy": _destroy,
    "machine.get": _get,
    "machine.list": _list,
    "machine.update": _update,
    "machine.touch": _touch,
    "machine.stats": _stats,
    "machine.history": _history,
    "machine.pause": _pause,
    "machine.resume": _resume,
    "machine.restore": _restore,
    "machine.fork": _fork,
    "snapshot.create": _snapshot,
    "snapshot.get": _get_snapshot,
    "snapshot.list": _list_snapshots,
    "snapshot.delete": _delete_snapshot,
    "template.list": _templates,
    "host.info": _info,
    "pool.status": _pool_status,
}


def _decode(shape: Any, value: Any) -> Any:
    try:
        return msgspec.convert(value, shape, strict=True)
    except msgspec.ValidationError as error:
        raise MachineError("bad_request", str(error)) from error


def _text(op: Mapping[str, Any], name: str) -> str:
    value = op.get(name)
    if not isinstance(value, str):
        raise MachineError("bad_request", f"{name} must be a string")
    return value
