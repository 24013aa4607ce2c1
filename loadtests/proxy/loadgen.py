"""The load generator and the origin: a Rust program of this repository that is built when it is needed."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from loadtests.proxy.processes import BenchError, cores, running

ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = ROOT / "native" / "target" / "release" / "sandgate-loadgen"
#: Beyond the time that a run is to take.
_PATIENCE_S = 60.0


async def build() -> None:
    """Build the program; quick when nothing has changed."""
    command = ("cargo", "build", "--release", "--locked", "--quiet", "--package", "sandgate-loadgen")
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT / "native")
    if await process.wait() != 0:
        raise BenchError("the load generator could not be built: is cargo installed?")


@dataclass(frozen=True, slots=True)
class Origin:
    """The server behind every proxy. raw_echo, raw_flood: ports without HTTP."""

    http: int
    raw_echo: int
    raw_flood: int
    pid: int


@contextlib.asynccontextmanager
async def origin(directory: Path, listen: str = "127.0.0.1:0") -> AsyncIterator[Origin]:
    """An origin for the length of a block."""
    command = (_PROGRAM, "origin", "--listen", listen)
    async with running(command, core=cores()[1], log=directory / "origin.log", pipe=True) as process:
        assert process.stdout is not None
        ports = orjson.loads(await process.stdout.readline())
        yield Origin(**ports, pid=process.pid)


@contextlib.asynccontextmanager
async def held(arguments: Sequence[str | os.PathLike[str]]) -> AsyncIterator[dict[str, Any]]:
    """Load that stands still, once it is ready, for the length of a block; yields what it says then."""
    process = await asyncio.create_subprocess_exec(
        _PROGRAM, *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_PATIENCE_S):
            ready: dict[str, Any] = orjson.loads(await process.stdout.readline() or b"{}")
        if "ready" not in ready:
            raise BenchError(f"the load failed: {arguments}")
        yield ready
    finally:
        process.stdin.close()
        await process.wait()


async def load(arguments: Sequence[str | os.PathLike[str]], *, seconds: float) -> dict[str, Any]:
    """Run one kind of load and return what it measured. Raises BenchError when it does not end or fails."""
    process = await asyncio.create_subprocess_exec(
        _PROGRAM, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(seconds + _PATIENCE_S):
            output, _ = await process.communicate()
    except TimeoutError:
        raise BenchError(f"the load did not end: {arguments}") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise BenchError(f"the load failed: {arguments}")
    measured: dict[str, Any] = orjson.loads(output.splitlines()[-1])
    return measured
