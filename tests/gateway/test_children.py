"""The supervisor's children: real processes."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from gateway.children import Child, LogFile


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
        async with asyncio.timeout(20):
            while not pids.exists() or len(pids.read_text().split()) < 2:
                await asyncio.sleep(0.02)
        await child.stop(1.0, asyncio.Event())
        await asyncio.wait_for(keeper, 10)
        assert log.tail.count("begun") >= 2
    finally:
        keeper.cancel()
        for pid in pids.read_text().split():
            os.killpg(int(pid), signal.SIGKILL)
        log.close()
