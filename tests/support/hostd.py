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
import select
import signal
import sys
import time
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

_DYING_S = 2.0


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
    with contextlib.ExitStack() as closing:
        ends = select.poll()
        doomed = sorted(sandboxes)[-count:]
        for pid in doomed:
            pidfd = os.pidfd_open(pid)
            closing.callback(os.close, pidfd)
            ends.register(pidfd, select.POLLIN)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        # One that takes a moment to die would pass for alive. A frozen one dies only once it is thawed.
        until = time.monotonic() + _DYING_S
        while len(ends.poll(10)) < len(doomed) and time.monotonic() < until:
            time.sleep(0.001)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    uvloop.run(_main(json.loads(sys.argv[1])))
