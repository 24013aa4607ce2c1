"""The supervisor's children: real processes."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from gateway.children import Child, LogFile, StartError


async def test_a_child_whose_descendant_keeps_its_output_open_is_started_again_and_stops(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    log = LogFile(tmp_path / "log")

    async def is_ready() -> bool:
        return True

    child = Child(
        "x", ["sh", "-c", f"sleep 60 & echo $$ >> {pids}; echo begun"], os.environ, is_ready=is_ready, log=log
    )
    await child.start()
    keeper = asyncio.create_task(child.keep_running())
    try:
        async with asyncio.timeout(60):
            while not pids.exists() or len(pids.read_text().split()) < 2:
                await asyncio.sleep(0.02)
        await child.stop(1.0, asyncio.Event())
        await asyncio.wait_for(keeper, 60)
        assert log.tail.count("begun") >= 2
    finally:
        keeper.cancel()
        for pid in pids.read_text().split():
            os.killpg(int(pid), signal.SIGKILL)
        log.close()


async def test_a_successor_that_does_not_serve_changes_nothing(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log")
    # With a further argument it ends at once.
    script = 'if [ "$1" = --take-over ]; then echo no; exit 3; fi; exec sleep 60'

    async def never(_: int) -> bool:
        return False

    async def is_ready() -> bool:
        return True

    child = Child("x", ["sh", "-c", script, "sh"], os.environ, is_ready=is_ready, log=log)
    await child.start()
    keeper = asyncio.create_task(child.keep_running())
    try:
        before = child.pid
        with pytest.raises(StartError, match=r"(?s)ended while starting.*no"):
            await child.replace("--take-over", serves=never, timeout_s=20)
        assert (child.pid, child.pids) == (before, {before})
        with pytest.raises(StartError, match="not ready after"):
            await child.replace(serves=never, timeout_s=0.05)
        assert (child.pid, child.pids) == (before, {before})
    finally:
        await child.stop(1.0, asyncio.Event())
        await asyncio.wait_for(keeper, 60)
        log.close()
    assert child.pids == set()


async def test_what_is_replaced_ends_with_the_child(tmp_path: Path) -> None:
    async def is_ready() -> bool:
        return True

    async def serves(_: int) -> bool:
        return True

    child = Child("x", ["sleep", "60"], os.environ, is_ready=is_ready, log=None)
    await child.start()
    keeper = asyncio.create_task(child.keep_running())
    first = child.pid
    second = await child.replace(serves=serves, timeout_s=20)
    assert child.pids == {first, second}
    await child.stop(5.0, asyncio.Event())
    await asyncio.wait_for(keeper, 60)
    assert child.pids == set()
