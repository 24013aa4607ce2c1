"""Fake units in a process of their own, so that they outlive the hostd that started them, as real ones do.

    python -m vmm.drivers.fake.keeper SOCKET

serves a `FakeDriver` on a Unix socket until SIGTERM, one JSON object per line each way:

    {"n": 7, "call": "freeze", "arguments": ["<unit>"]}   ─▶   {"n": 7, "result": null}
                                                               {"n": 7, "error": {"code", "message", "detail"}}

`KeptDriver` is the driver that hostd uses then. What has been asked for is done, whatever becomes of who asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import orjson

from vmm.drivers.base import Capabilities, Exit, ImageFiles, Placement, Saved, Shape
from vmm.drivers.fake import FakeDriver
from vmm.errors import MachineError
from vmm.tasks import run_in_background, stop
from vmm.types import MachineStats, StopCause, TemplateInfo

_LINE_BYTES_MAX = 4 * 1024 * 1024


class _Call(NamedTuple):
    arguments: tuple[Any, ...]
    result: Any
    run: Callable[..., Awaitable[Any]]


async def _end_newest(driver: FakeDriver, count: int) -> list[str]:
    units = list(driver.units)[-count:]
    for unit in units:
        await driver.end(unit, Exit(StopCause.KILLED, "killed by the test"))
    return units


async def _units(driver: FakeDriver) -> list[str]:
    return list(driver.units)


#: What crosses the socket. The last two are for tests: kill the units made last, and list what there is.
_CALLS: Mapping[str, _Call] = {
    "prepare": _Call((str, Shape, str), None, lambda d, unit, shape, token: d.prepare(unit, shape, token=token)),
    "boot": _Call((str,), Placement, FakeDriver.boot),
    "restore": _Call((str, ImageFiles), Placement, FakeDriver.restore),
    "save": _Call((str, Path), Saved, FakeDriver.save),
    "reclaim": _Call((str,), int, FakeDriver.reclaim),
    "adopt": _Call((str, Placement), bool, FakeDriver.adopt),
    "wait": _Call((str,), Exit, FakeDriver.wait),
    "stats": _Call((str,), MachineStats, FakeDriver.stats),
    "freeze": _Call((str,), None, FakeDriver.freeze),
    "thaw": _Call((str,), None, FakeDriver.thaw),
    "destroy": _Call((str,), None, FakeDriver.destroy),
    "sweep": _Call((list[str],), list[str], FakeDriver.sweep),
    "end_newest": _Call((int,), list[str], _end_newest),
    "units": _Call((), list[str], _units),
}


class KeptDriver:
    """Implements `vmm.drivers.base.Driver` by asking the keeper that listens on `socket_path`."""

    name = "fake"

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = socket_path
        self._local = FakeDriver()
        self._placements: dict[str, Placement] = {}
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    def capabilities(self) -> Capabilities:
        return self._local.capabilities()

    def templates(self) -> Sequence[TemplateInfo]:
        return self._local.templates()

    async def open(self) -> None:
        try:
            reader, self._writer = await asyncio.open_unix_connection(self._socket_path, limit=_LINE_BYTES_MAX)
        except OSError as error:
            raise MachineError("driver_failed", "the keeper does not listen", detail=str(error)) from error
        self._reading = run_in_background(self._read(reader), "keeper's answers")

    async def close(self) -> None:
        await stop(self._reading)
        if self._writer is not None:
            self._writer.close()

    async def prepare(self, unit: str, shape: Shape, *, token: str) -> None:
        await self.ask("prepare", unit, shape, token)

    async def boot(self, unit: str) -> Placement:
        return await self._placed(unit, await self.ask("boot", unit))

    async def restore(self, unit: str, image: ImageFiles) -> Placement:
        return await self._placed(unit, await self.ask("restore", unit, image))

    async def start(self, unit: str, shape: Shape, *, token: str) -> Placement:
        await self.prepare(unit, shape, token=token)
        return await self.boot(unit)

    async def save(self, unit: str, directory: Path) -> Saved:
        saved: Saved = await self.ask("save", unit, directory)
        return saved

    async def reclaim(self, unit: str) -> int:
        return int(await self.ask("reclaim", unit))

    async def adopt(self, unit: str, placement: Placement) -> bool:
        self._placements[unit] = placement
        return bool(await self.ask("adopt", unit, placement))

    async def dial(self, unit: str, protocol: Callable[[], asyncio.Protocol]) -> asyncio.Transport:
        placement = self._placements.get(unit)
        if placement is None:
            raise ConnectionRefusedError(f"unit {unit} does not listen")
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(protocol, placement.address, placement.agent_port)
        return transport

    async def wait(self, unit: str) -> Exit:
        exit_: Exit = await self.ask("wait", unit)
        return exit_

    async def stats(self, unit: str) -> MachineStats:
        stats: MachineStats = await self.ask("stats", unit)
        return stats

    async def freeze(self, unit: str) -> None:
        await self.ask("freeze", unit)

    async def thaw(self, unit: str) -> None:
        await self.ask("thaw", unit)

    async def destroy(self, unit: str) -> None:
        self._placements.pop(unit, None)
        await self.ask("destroy", unit)

    async def sweep(self, keep: Collection[str]) -> Sequence[str]:
        swept: list[str] = await self.ask("sweep", list(keep))
        return swept

    async def ask(self, name: str, *arguments: Any) -> Any:
        """Make a call of `_CALLS`. Raises MachineError."""
        if self._writer is None:
            raise MachineError("driver_failed", "the driver is not open")
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        request = {"n": number, "call": name, "arguments": [_plain(argument) for argument in arguments]}
        self._writer.write(orjson.dumps(request) + b"\n")
        try:
            result = await answer
        finally:
            self._answers.pop(number, None)
        return _decode(result, _CALLS[name].result)

    async def _placed(self, unit: str, placement: Placement) -> Placement:
        self._placements[unit] = placement
        return placement

    async def _read(self, reader: asyncio.StreamReader) -> None:
        async for line in reader:
            message = orjson.loads(line)
            answer = self._answers.get(message["n"])
            if answer is None or answer.done():
                continue
            if "error" in message:
                error = message["error"]
                answer.set_exception(MachineError(error["code"], error["message"], detail=error["detail"]))
            else:
                answer.set_result(message["result"])


class _Caller:
    """A connection of a KeptDriver."""

    def __init__(self, driver: FakeDriver) -> None:
        self._driver = driver
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the caller has gone; what it asked for goes on."""
        with contextlib.suppress(ConnectionError):
            async for line in reader:
                task = asyncio.create_task(self._answer(orjson.loads(line), writer))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        writer.close()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _answer(self, request: Mapping[str, Any], writer: asyncio.StreamWriter) -> None:
        call = _CALLS[request["call"]]
        given = zip(request["arguments"], call.arguments, strict=True)
        answer: dict[str, Any] = {"n": request["n"]}
        try:
            answer["result"] = _plain(await call.run(self._driver, *(_decode(value, kind) for value, kind in given)))
        except MachineError as error:
            answer["error"] = {"code": error.code, "message": error.message, "detail": error.detail}
        if not writer.is_closing():
            writer.write(orjson.dumps(answer) + b"\n")


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value, enc_hook=str)


def _decode(value: Any, kind: Any) -> Any:
    return msgspec.convert(value, kind, dec_hook=lambda hinted, given: hinted(given))


async def _main(socket_path: str) -> None:
    driver = FakeDriver()
    await driver.open()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    server = await asyncio.start_unix_server(
        lambda reader, writer: _Caller(driver).serve(reader, writer), socket_path, limit=_LINE_BYTES_MAX
    )
    print("ready", flush=True)
    await ended.wait()
    server.close()
    await driver.close()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
