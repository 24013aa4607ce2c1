"""Talks to hostd: machine operations, the life of machines as a stream, and the agents behind it.

One connection carries everything. It is made when it is first needed and again after it broke, by whoever needs it
next: nothing runs in the background, so there is nothing to supervise. Deadlines are those of `vmm.calls`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Collection, Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Self

from vmm.agent import Agent
from vmm.calls import Patience, ask, call, decode, is_break, limit_of, open_stream, within
from vmm.errors import LinkError, VmmError
from vmm.link import Link, unix
from vmm.stream import Chunk, Event, Stream
from vmm.types import (
    ChildSpec,
    Fork,
    ForkFailure,
    HostInfo,
    IdleAction,
    MachineInfo,
    MachineSpec,
    MachineState,
    MachineStats,
    PoolStatus,
    Sample,
    SnapshotInfo,
    StopCause,
    TemplateInfo,
)

#: A restarted hostd listens again within a second or two; asking more often than this only costs.
_CONNECT_DELAY_MIN_S = 0.02
_CONNECT_DELAY_MAX_S = 0.25

_OVER = (MachineState.STOPPED, MachineState.FAILED)


class _Unset:
    """The type of an argument that was not given, where None has a meaning of its own."""


UNSET = _Unset()


class HostClient:
    """A client of the hostd that listens on a Unix socket. Use as an async context manager, or `close` it."""

    def __init__(self, socket_path: str) -> None:
        self._dial = unix(socket_path)
        self._link: Link | None = None
        self._connecting = asyncio.Lock()
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; everything under way fails with LinkError."""
        self._is_closed = True
        if self._link is not None:
            self._link.close()

    @property
    def is_connected(self) -> bool:
        """Whether there is a working connection right now."""
        return self._link is not None and self._link.is_open

    async def link(self, deadline: float) -> Link:
        """The connection, made if need be. Raises LinkError `host_unreachable` at the deadline."""
        if self._link is not None and self._link.is_open:
            return self._link
        try:
            async with asyncio.timeout_at(deadline), self._connecting:
                return await self._connect()
        except TimeoutError as error:
            raise LinkError("host_unreachable", "the host service does not answer") from error

    def agent(self, machine_id: str, *, passive: bool = False, roots: Sequence[str] | None = None) -> Agent:
        """The agent of a machine; `passive` and `roots` as in `Agent`."""
        return Agent(self.link, machine_id, passive=passive, roots=roots)

    async def create_machine(
        self, spec: MachineSpec, *, is_early: bool = False, deadline: float | None = None
    ) -> MachineInfo:
        """Make a machine and wait until its agent answers; the same id twice yields the same machine.

        is_early: do not wait for the agent. The address is another one later if it does not answer.
        """
        fields = asdict(spec) | ({"early": True} if is_early else {})
        return decode(MachineInfo, await self._call("machine.create", deadline, **fields))

    async def destroy_machine(
        self, machine_id: str, cause: StopCause, *, unwanted_for_s: float = 0.0, deadline: float | None = None
    ) -> bool:
        """End a machine; returns whether it existed.

        Raises MachineError `in_use` if somebody has asked to create it within the last `unwanted_for_s`.
        """
        fields = {"id": machine_id, "cause": cause, "unwanted_for_s": unwanted_for_s}
        reply = await self._call("machine.destroy", deadline, **fields)
        return decode(bool, reply.get("existed"))

    async def get_machine(self, machine_id: str, *, deadline: float | None = None) -> MachineInfo:
        """One machine. Raises MachineError `machine_not_found`."""
        return decode(MachineInfo, await self._call("machine.get", deadline, id=machine_id))

    async def list_machines(self, *, deadline: float | None = None) -> list[MachineInfo]:
        """Every machine that the host knows."""
        return decode(list[MachineInfo], (await self._call("machine.list", deadline)).get("machines"))

    async def update_machine(
        self,
        machine_id: str,
        *,
        expires_at: float | _Unset | None = UNSET,
        idle_timeout_s: float | _Unset | None = UNSET,
        idle_action: IdleAction | _Unset = UNSET,
        auto_resume: bool | _Unset = UNSET,
        hibernate_after_s: float | _Unset | None = UNSET,
        deadline: float | None = None,
    ) -> MachineInfo:
        """Change what is given, of a paused machine too. None: never, and the host's default for hibernation."""
        given = {
            "expires_at": expires_at,
            "idle_timeout_s": idle_timeout_s,
            "idle_action": idle_action,
            "auto_resume": auto_resume,
            "hibernate_after_s": hibernate_after_s,
        }
        fields = {name: value for name, value in given.items() if not isinstance(value, _Unset)}
        return decode(MachineInfo, await self._call("machine.update", deadline, id=machine_id, **fields))

    async def pause_machine(
        self, machine_id: str, *, hibernate: bool = False, deadline: float | None = None
    ) -> MachineInfo:
        """Stop everything in a machine where it is, or write it to disk and free its memory; no effect on one that is.

        Raises MachineError `machine_not_running`, and for `hibernate` also `no_space`, `snapshot_failed`.
        """
        return decode(MachineInfo, await self._call("machine.pause", deadline, id=machine_id, hibernate=hibernate))

    async def resume_machine(self, machine_id: str, *, deadline: float | None = None) -> MachineInfo:
        """Have a machine run again; no effect on one that does. Many callers cause one wake.

        Raises MachineError `machine_not_running`, `no_capacity`, `wake_timeout`, `snapshot_corrupt`.
        """
        return decode(MachineInfo, await self._call("machine.resume", deadline, id=machine_id))

    async def restore_machine(
        self, machine_id: str, snapshot_id: str, restore_id: str | None = None, *, deadline: float | None = None
    ) -> MachineInfo:
        """Take a machine back to a snapshot: memory, processes and files. On an error it goes on as it was.

        restore_id: names this restore; asked for once more, it is not made again.
        """
        named = {} if restore_id is None else {"restore": restore_id}
        answer = await self._call("machine.restore", deadline, id=machine_id, snapshot=snapshot_id, **named)
        return decode(MachineInfo, answer)

    async def fork_machine(
        self, machine_id: str, children: Sequence[ChildSpec], *, deadline: float | None = None
    ) -> Fork:
        """Copy a machine, which runs on. Children that exist already are returned as they are."""
        fields = [asdict(child) for child in children]
        reply = await self._call("machine.fork", deadline, id=machine_id, children=fields)
        machines = tuple(map(_child, decode(list[dict[str, Any]], reply.get("machines"))))
        return Fork(machines, decode(float, reply.get("pause_ms")))

    async def create_snapshot(
        self, snapshot_id: str, machine_id: str, *, deadline: float | None = None
    ) -> SnapshotInfo:
        """Take a snapshot under an id of the caller's (a UUID); the same id twice is the same snapshot.

        Raises MachineError `machine_not_running`, `snapshot_failed`, `no_space`.
        """
        return decode(SnapshotInfo, await self._call("snapshot.create", deadline, id=snapshot_id, machine=machine_id))

    async def get_snapshot(self, snapshot_id: str, *, deadline: float | None = None) -> SnapshotInfo:
        """One snapshot. Raises MachineError `snapshot_not_found`."""
        return decode(SnapshotInfo, await self._call("snapshot.get", deadline, id=snapshot_id))

    async def list_snapshots(self, *, deadline: float | None = None) -> list[SnapshotInfo]:
        """Every snapshot that the host has."""
        return decode(list[SnapshotInfo], (await self._call("snapshot.list", deadline)).get("snapshots"))

    async def delete_snapshot(self, snapshot_id: str, *, deadline: float | None = None) -> bool:
        """Delete a snapshot; returns whether it existed. Raises MachineError `in_use` while machines start from it."""
        return decode(bool, (await self._call("snapshot.delete", deadline, id=snapshot_id)).get("existed"))

    async def export_snapshot(self, snapshot_id: str, *, deadline: float | None = None) -> AsyncIterator[bytes]:
        """A snapshot as one file, in parts. deadline: of its first byte. Raises MachineError `snapshot_not_found`."""
        stream, _ = await ask(self.link, {"op": "snapshot.export", "id": snapshot_id}, Patience(limit_of(deadline)))
        with stream:
            async for item in stream:
                if isinstance(item, Chunk):
                    yield item.data

    async def import_snapshot(
        self, snapshot_id: str, content: AsyncIterable[bytes], *, deadline: float | None = None
    ) -> SnapshotInfo:
        """Add an exported snapshot under a new id. deadline: of each step. Raises MachineError `snapshot_corrupt`."""
        op = {"op": "snapshot.import", "id": snapshot_id}
        with await open_stream(self.link, op, Patience(limit_of(deadline))) as stream:
            async for part in content:
                async with within(deadline):
                    await stream.send(part)
            async with within(deadline):
                stream.end()
                return decode(SnapshotInfo, await stream.reply())

    async def pool_status(self, *, deadline: float | None = None) -> list[PoolStatus]:
        """The warm machines of the host, by shape."""
        return decode(list[PoolStatus], (await self._call("pool.status", deadline)).get("pools"))

    async def touch(self, machine_ids: Sequence[str], *, deadline: float | None = None) -> None:
        """Report activity that hostd cannot see, such as preview traffic."""
        await self._call("machine.touch", deadline, ids=list(machine_ids))

    async def stats(self, machine_id: str, *, deadline: float | None = None) -> MachineStats:
        """Resource use as the host accounts it."""
        return decode(MachineStats, await self._call("machine.stats", deadline, id=machine_id))

    async def history(self, machine_id: str, since: float, *, deadline: float | None = None) -> list[Sample]:
        """What it had used at times since then, oldest first; only while it ran, and only what the host remembers."""
        reply = await self._call("machine.history", deadline, id=machine_id, since=since)
        return decode(list[Sample], reply.get("samples"))

    async def templates(self, *, deadline: float | None = None) -> list[TemplateInfo]:
        """What machines can be made from."""
        return decode(list[TemplateInfo], (await self._call("template.list", deadline)).get("templates"))

    async def host_info(self, *, deadline: float | None = None) -> HostInfo:
        """What the host can do and how full it is."""
        return decode(HostInfo, await self._call("host.info", deadline))

    async def events(self, states: Collection[MachineState] | None = None) -> AsyncIterator[MachineInfo]:
        """Every machine as it is now, then every change of one, for as long as the caller listens.

        states: tell only changes into one of these.

        After a break the machines are listed again and what differs is told, so that no change stays unseen. One that
        is not known any more is told as stopped with cause `lost`.
        """
        seen: dict[str, MachineInfo] = {}
        while not self._is_closed:
            try:
                async for machine in self._events_of_one_link(seen, states):
                    yield machine
            except VmmError as error:
                if not is_break(error) and error.code != "host_unreachable":
                    raise
            await asyncio.sleep(_CONNECT_DELAY_MIN_S)

    async def snapshot_events(self) -> AsyncIterator[SnapshotInfo]:
        """Every snapshot as it is now, then each step and change of one. After a break all are told again."""
        while not self._is_closed:
            try:
                op = {"op": "machine.events", "of": "snapshot"}
                stream, _ = await ask(self.link, op, Patience(limit_of(None)))
                with stream:
                    for snapshot in await self.list_snapshots():
                        yield snapshot
                    async for event in _events(stream, "snapshot"):
                        yield decode(SnapshotInfo, event.get("snapshot"))
            except VmmError as error:
                if not is_break(error) and error.code != "host_unreachable":
                    raise
            await asyncio.sleep(_CONNECT_DELAY_MIN_S)

    async def _events_of_one_link(
        self, seen: dict[str, MachineInfo], states: Collection[MachineState] | None
    ) -> AsyncIterator[MachineInfo]:
        op: dict[str, Any] = {"op": "machine.events", "of": "machine"}
        if states is not None:
            op["states"] = list(states)
        stream, _ = await ask(self.link, op, Patience(limit_of(None)))
        with stream:
            for machine in _differences(seen, await self.list_machines()):
                yield machine
            async for event in _events(stream, "machine"):
                yield _note(seen, decode(MachineInfo, event.get("machine")))

    async def _call(self, name: str, deadline: float | None, **fields: Any) -> dict[str, Any]:
        return await call(self.link, {"op": name, **fields}, deadline=deadline, is_repeatable=True)

    async def _connect(self) -> Link:
        delay_s = _CONNECT_DELAY_MIN_S
        while not self._is_closed:
            if self._link is not None and self._link.is_open:
                return self._link
            try:
                self._link = await Link.connect(self._dial, role="api")
            except (OSError, LinkError):
                # Refused or cut while it starts. What is wrong for good shows as `host_unreachable` at the deadline.
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, _CONNECT_DELAY_MAX_S)
        raise LinkError("host_unreachable", "the client has been closed")


def _child(reply: dict[str, Any]) -> MachineInfo | ForkFailure:
    if "error" not in reply:
        return decode(MachineInfo, reply)
    return decode(ForkFailure, {"id": reply.get("id")} | decode(dict[str, Any], reply["error"]))


async def _events(stream: Stream, kind: str) -> AsyncIterator[Event]:
    """Those of one kind, until the stream ends or some were lost."""
    async for item in stream:
        if isinstance(item, Event):
            if item.get("type") == "overflow":
                return
            if item.get("type") == kind:
                yield item


def _note(seen: dict[str, MachineInfo], machine: MachineInfo) -> MachineInfo:
    if machine.state in _OVER:
        seen.pop(machine.id, None)
    else:
        seen[machine.id] = machine
    return machine


def _differences(seen: dict[str, MachineInfo], machines: Sequence[MachineInfo]) -> list[MachineInfo]:
    known = {machine.id for machine in machines}
    gone = [machine for machine_id, machine in seen.items() if machine_id not in known]
    changed = [machine for machine in machines if seen.get(machine.id) != machine]
    lost = [replace(m, state=MachineState.STOPPED, cause=StopCause.LOST, stopped_at=time.time()) for m in gone]
    return [_note(seen, machine) for machine in (*lost, *changed)]
