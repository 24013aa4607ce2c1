"""Runs a real hostd with the gVisor driver, for `HostProcess`: `python -m tests.support.hostd SETTINGS_AS_JSON`.

Prints "ready" once it serves. SIGTERM ends it in order, and so does the end of its standard input: a test run that
is killed takes it along.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from pathlib import Path

import msgspec
import uvloop

from tests.support.fuse import Fuse
from vmm.drivers.gvisor.config import GvisorConfig, instance_id
from vmm.drivers.gvisor.driver import GvisorDriver
from vmm.host import crash
from vmm.host.config import HostConfig, PoolConfig
from vmm.host.server import serve
from vmm.templates.store import TemplateStore


async def _main(settings: dict[str, dict[str, object]]) -> None:
    home = Path(str(settings["host"].pop("home")))
    crash.arm(Fuse(home / "fuse", lambda count: _kill_sandboxes(instance_id(home), count)).on_point)
    socket_path = Path(str(settings["host"].pop("socket_path")))
    pool = msgspec.convert(settings["host"].pop("pool", {}), PoolConfig)
    config = HostConfig(home, socket_path, pool=pool, **settings["host"])  # type: ignore[arg-type]
    templates = TemplateStore(Path(str(settings["templates"]["cache"])), Path(str(settings["templates"]["agent"])))
    driver = GvisorDriver(GvisorConfig.for_home(home, **settings["gvisor"]), templates)
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    loop.add_reader(sys.stdin.fileno(), lambda: loop.remove_reader(sys.stdin.fileno()) and task.cancel())
    with contextlib.suppress(asyncio.CancelledError):
        await serve(config, driver, ready=lambda: print("ready", flush=True))


def _kill_sandboxes(instance: str, count: int) -> None:
    """Those made last, as a crash of gVisor would end them."""
    sandboxes = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes()
            if line.startswith(b"runsc-sandbox") and instance.encode() in line:
                sandboxes.append(int(path.parent.name))
    for pid in sorted(sandboxes)[-count:]:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    uvloop.run(_main(json.loads(sys.argv[1])))
