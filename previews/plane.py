"""The way to the plane: pushes routes to it and hears what it has to say (docs/protocol.md, "Plane control").

    connecting ──hello──▶ connected ──lost──▶ connecting …
                             │ a new epoch, or a sync that was cut: on_new_epoch

A push returns once the plane has acknowledged it: it is then in force for every later request. A push that is not
acknowledged in time is not lost: it is sent again on the next connection, unless a newer one of the same record
replaced it. Not for deciding what to push; that is the gateway's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import orjson

from previews.errors import PlaneError
from previews.routes import KeyRoute, SandboxRoute, Snapshot
from previews.streams import PublishedEvent

_log = logging.getLogger(__name__)

#: Longest line of the protocol.
_LINE_BYTES_MAX = 1024 * 1024
#: Pause before another attempt to connect: doubled from the first to the last.
_RETRY_FIRST_S, _RETRY_LAST_S = 0.02, 1.0
#: For the first line of a plane that is asked who it is.
_HELLO_WITHIN_S = 1.0
#: Unacknowledged records kept for the next connection; with more, a full sync is cheaper.
_UNACKED_MAX = 10_000
#: Records of a sync written between two looks at the peer's pace.
_SYNC_BATCH = 256


def _ignore(*_: object) -> None:
    """The default of every callback."""


@dataclass(frozen=True, slots=True)
class PlaneStats:
    """Figures of the plane as a whole."""

    connections: int
    requests: int
    sandboxes: int


class PlaneClient:
    """A connection to the plane that restores itself.

    socket_path: the plane's control socket.
    on_poke: called with (topic, seq) when another API worker has announced news.
    on_activity: called with the ids of sandboxes that had preview traffic; only one of all connections is told.
    on_wake: called with the id of a frozen or hibernated sandbox that somebody wants to use: push its route when it
        runs, or call `refuse_wake`. Called again, on one connection or another, while requests wait and the route
        says that it sleeps.
    on_tail: called with a position in the event log: publish what comes after it from now on (None: the latest, and
        what comes), until it is called again or on_relieved is. Without it, others are asked.
    on_new_epoch: awaited when the plane may have missed something; should call `sync`. Called again until it succeeds.
    push_timeout_s: how long a push waits for its acknowledgement.
    Use as an async context manager; connecting goes on in the background and may take for ever.
    """

    def __init__(
        self,
        socket_path: str,
        *,
        on_poke: Callable[[str, Any], None] = _ignore,
        on_activity: Callable[[Sequence[str]], None] = _ignore,
        on_wake: Callable[[str], None] = _ignore,
        on_tail: Callable[[int | None], None] | None = None,
        on_relieved: Callable[[], None] = _ignore,
        on_new_epoch: Callable[[], Awaitable[None]] | None = None,
        push_timeout_s: float = 2.0,
    ) -> None:
        self._socket_path = socket_path
        self._on_poke = on_poke
        self._on_activity = on_activity
        self._on_wake = on_wake
        self._on_tail = on_tail
        self._on_relieved = on_relieved
        self._on_new_epoch = on_new_epoch
        self._push_timeout_s = push_timeout_s
        self._writer: asyncio.StreamWriter | None = None
        self._connected = asyncio.Event()
        self._next_n = 1
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._unacked: dict[str, tuple[int, bytes]] = {}
        self._synced_epoch: str | None = None
        self._connecting: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._connecting = asyncio.create_task(self._keep_connected(), name="plane client")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection. Pushes under way fail with PlaneError."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
            self._connecting = None
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(_unavailable())

    async def wait_connected(self, timeout_s: float) -> None:
        """Wait until the plane has said hello. Raises PlaneError (plane_unavailable) when it does not in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
        except TimeoutError as error:
            raise _unavailable() from error

    @property
    def is_connected(self) -> bool:
        """Whether the plane listens now."""
        return self._connected.is_set()

    async def put_sandbox(self, route: SandboxRoute) -> None:
        """Have a sandbox's route in force. Raises PlaneError."""
        await self._push(f"sandbox {route.id}", route.message())

    async def drop_sandbox(self, sandbox_id: str, v: int) -> None:
        """Have a sandbox's hosts answer "gone". Raises PlaneError."""
        await self._push(f"sandbox {sandbox_id}", {"t": "sandbox_gone", "v": v, "id": sandbox_id})

    async def put_key(self, key: KeyRoute) -> None:
        """Have an API key open its workspace's private previews. Raises PlaneError."""
        await self._push(f"key {key.hash}", key.message())

    async def drop_key(self, key_hash: str, v: int) -> None:
        """Have an API key open nothing. Raises PlaneError."""
        await self._push(f"key {key_hash}", {"t": "key_gone", "v": v, "hash": key_hash})

    def poke(self, topic: str, seq: int) -> None:
        """Tell the other API workers of news. Without a connection nobody is told: they look by themselves later."""
        if self._writer is not None:
            self._writer.write(_line({"t": "poke", "topic": topic, "seq": seq}))

    def refuse_wake(self, sandbox_id: str) -> None:
        """Tell those who wait for a sandbox that it cannot be woken. Without a connection they wait for their time."""
        if self._writer is not None:
            self._writer.write(_line({"t": "wake_failed", "id": sandbox_id}))

    async def publish(self, after: int, through: int, events: Sequence[PublishedEvent], *, is_start: bool) -> None:
        """Have the events in (after, through] sent to who follows their topics; they must be all of the log's.

        is_start: it does not continue where the plane asked. One call at a time; it waits for a plane that takes
        nothing. Raises PlaneError when there is no connection: the plane asks again then.
        """
        writer = self._writer
        if writer is None:
            raise _unavailable()
        message = {"t": "publish", "after": after, "through": through, "start": is_start, "events": events}
        try:
            writer.write(_line(message))
            await writer.drain()
        except OSError as error:
            raise _unavailable() from error

    async def stats(self) -> PlaneStats:
        """Figures of the plane. Raises PlaneError."""
        answered = await self._query({"t": "stats"})
        return PlaneStats(answered["connections"], answered["requests"], answered["sandboxes"])

    async def routes(self) -> AsyncIterator[dict[str, Any]]:
        """The plane's table, one sandbox after the other (docs/protocol.md). Raises PlaneError."""
        after = None
        while True:
            page = await self._query({"t": "routes", "after": after})
            for route in page["routes"]:
                yield route
            after = page["next"]
            if after is None:
                return

    async def connections(self) -> dict[str, Any]:
        """Who uses the plane now (docs/protocol.md). Raises PlaneError."""
        return await self._query({"t": "connections"})

    async def _query(self, message: dict[str, Any]) -> dict[str, Any]:
        n, answer = self._expect()
        return await self._ask(n, answer, _line({**message, "n": n}))

    async def sync(self, snapshot_provider: Callable[[], Awaitable[Snapshot]]) -> None:
        """Replace the plane's table by what the provider says. Raises PlaneError if the connection does not last.

        The provider must take the snapshot's version before it reads anything else.
        """
        writer = self._writer
        if writer is None:
            raise _unavailable()
        # First of all: what is pushed from here on is kept, whether or not the provider still sees it.
        writer.write(_line({"t": "sync_begin"}))
        snapshot = await snapshot_provider()
        if writer is not self._writer:
            raise _unavailable()
        records: list[SandboxRoute | KeyRoute] = [*snapshot.sandboxes, *snapshot.keys]
        try:
            for start in range(0, len(records), _SYNC_BATCH):
                batch = records[start : start + _SYNC_BATCH]
                writer.write(b"".join(_line(record.message()) for record in batch))
                await writer.drain()
        except OSError as error:
            raise _unavailable() from error
        n, answer = self._expect()
        await self._ask(n, answer, _line({"t": "sync_end", "v": snapshot.v, "n": n}))

    async def _push(self, record: str, message: dict[str, Any]) -> None:
        n, answer = self._expect()
        line = _line({**message, "n": n})
        if len(self._unacked) >= _UNACKED_MAX:
            self._unacked.clear()
            self._synced_epoch = None
        self._unacked[record] = (n, line)
        try:
            await self._ask(n, answer, line)
        except PlaneError as error:
            if not error.is_unavailable:
                self._acked(record, n)
            raise
        self._acked(record, n)

    def _acked(self, record: str, n: int) -> None:
        if self._unacked.get(record, (None, b""))[0] == n:
            del self._unacked[record]

    def _expect(self) -> tuple[int, asyncio.Future[dict[str, Any]]]:
        n = self._next_n
        self._next_n += 1
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[n] = answer
        return n, answer

    async def _ask(self, n: int, answer: asyncio.Future[dict[str, Any]], line: bytes) -> dict[str, Any]:
        try:
            if self._writer is not None:
                self._writer.write(line)
            async with asyncio.timeout(self._push_timeout_s):
                answered = await answer
        except TimeoutError as error:
            raise _unavailable() from error
        finally:
            del self._answers[n]
        if answered["t"] == "error":
            raise PlaneError("plane_refused", f"the plane refused a record: {answered['message']}")
        return answered

    async def _keep_connected(self) -> None:
        pause_s = _RETRY_FIRST_S
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self._socket_path, limit=_LINE_BYTES_MAX + 1)
            except OSError:
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _RETRY_LAST_S)
                continue
            pause_s = _RETRY_FIRST_S
            try:
                await self._converse(reader, writer)
            except (OSError, ValueError, KeyError, TypeError) as error:
                _log.warning("connection to the plane lost: %s", error)
            finally:
                self._writer = None
                self._connected.clear()
                writer.close()
            await asyncio.sleep(pause_s)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(self._push_timeout_s):
            hello = orjson.loads(await reader.readline() or b"{}")
        if not isinstance(hello, dict) or hello.get("t") != "hello" or hello.get("version") != 1:
            raise ValueError("the plane speaks another version of the protocol")
        self._writer = writer
        writer.writelines(line for _, line in self._unacked.values())
        if self._on_tail is not None:
            writer.write(_line({"t": "volunteer"}))
        self._connected.set()
        renewal = asyncio.create_task(self._renew(hello["epoch"]), name="plane sync")
        try:
            while line := await reader.readline():
                self._hear(orjson.loads(line))
        finally:
            renewal.cancel()
            await asyncio.gather(renewal, return_exceptions=True)

    async def _renew(self, epoch: str) -> None:
        """Have the gateway sync a plane that does not know everything; try until it works or the connection ends."""
        while self._on_new_epoch is not None and epoch != self._synced_epoch:
            try:
                await self._on_new_epoch()
            except PlaneError as error:
                _log.warning("the plane could not be synced: %s", error)
            except Exception:  # noqa: BLE001 - whatever the provider has, it is to be tried again
                _log.exception("the plane could not be synced")
            else:
                self._synced_epoch = epoch
                return
            await asyncio.sleep(self._push_timeout_s)

    def _hear(self, message: dict[str, Any]) -> None:
        match message["t"]:
            case "ack" | "stats" | "routes" | "connections" | "error":
                answer = self._answers.get(message.get("n") or 0)
                if answer is not None and not answer.done():
                    answer.set_result(message)
                elif message["t"] == "error":
                    _log.error("the plane refused a record of a sync: %s", message["message"])
            case "poke":
                self._on_poke(message["topic"], message["seq"])
            case "activity":
                self._on_activity(message["ids"])
            case "wake":
                self._on_wake(message["id"])
            case "tail":
                if self._on_tail is not None:
                    self._on_tail(message["after"])
            case "relieved":
                self._on_relieved()


async def serving_pid(socket_path: str) -> int | None:
    """The process that serves a control socket; None if none does."""
    try:
        async with asyncio.timeout(_HELLO_WITHIN_S):
            reader, writer = await asyncio.open_unix_connection(socket_path)
            try:
                hello = orjson.loads(await reader.readline() or b"{}")
            finally:
                writer.close()
    except (TimeoutError, OSError, ValueError):
        return None
    return hello.get("pid") if isinstance(hello, dict) else None


def _line(message: dict[str, Any]) -> bytes:
    return orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE)


def _unavailable() -> PlaneError:
    return PlaneError("plane_unavailable", "the plane does not answer")
