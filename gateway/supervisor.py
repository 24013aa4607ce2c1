"""Starts, watches and stops the server's processes.

    lock ─▶ ports ─▶ data directory ─▶ templates ─▶ hostd, api, plane ─▶ ready ─▶ … ─▶ plane, api, hostd end

Stopping goes from the outside in: the plane lets requests end, the api finishes what it has begun, hostd ends every
machine. A second signal makes it short. What is left after that is killed, so that nothing stays on the host.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from gateway.children import Child, LogFile, StartError, adopt_orphans, dying_with, kill_orphans, reap_orphans
from gateway.first_run import Credentials, missing_templates, prepare
from gateway.orders import Order, taking_orders
from gateway.plane import plane_argv
from gateway.preflight import check_ports, instance_lock
from gateway.probes import status_of
from gateway.settings import Settings, make_private_dir, split_address
from native import BinaryMissing
from previews.plane import serving_pid
from vmm.client import HostClient
from vmm.errors import VmmError

_log = logging.getLogger(__name__)

#: Ended children of descendants are collected by SIGCHLD, and this often in case one hid behind another.
_REAP_EVERY_S = 0.5

#: What has drained for as long as it may ends by itself; this much later it is killed.
_LAST_WORDS_S = 1.0

#: hostd needs a while to end hundreds of machines.
_HOSTD_STOP_S = 60.0

#: How long to wait for a hostd that died just before the end: only hostd can end the machines it left.
_HOSTD_BACK_S = 10.0


class Supervisor:
    """One running server. say: tells the person at the terminal something, a line at a time."""

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._say = say
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._children: list[Child] = []
        self._logs: list[LogFile] = []

    async def run(self) -> None:
        """Serve until a signal arrives. Raises StartError if the server cannot start; then nothing is left running."""
        settings = self._settings
        make_private_dir(settings.home)
        with instance_lock(settings.home / "sandgate.lock", self._say) as lock:
            check_ports(settings)
            adopt_orphans()
            self._handle_signals()
            began = time.monotonic()
            keepers: list[asyncio.Task[None]] = []
            try:
                credentials = await asyncio.to_thread(prepare, settings)
                if await self._unless_stopped(self._build_templates()):
                    # Not earlier: the builder is no orphan, and its end belongs to whoever waits for it.
                    asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)
                    self._children = self._make_children(lock)
                    # From then on, also while the whole is not ready yet, a part that dies comes back.
                    if await self._unless_stopped(self._start_children()):
                        keepers = [asyncio.create_task(child.keep_running()) for child in self._children]
                    if keepers and await self._unless_stopped(self._answers()):
                        async with taking_orders(settings.orders_socket, self._orders()):
                            self._announce(credentials, time.monotonic() - began)
                            await self._stop.wait()
            finally:
                await self._shut_down(keepers)

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do it, unless the signal to stop comes first; then cancel it. Whether it was done. Raises what it raises."""
        task = asyncio.create_task(work)
        stopped = asyncio.create_task(self._stop.wait())
        waiting: set[asyncio.Task[Any]] = {task, stopped}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return False
        try:
            task.result()
        except* StartError as group:
            raise StartError("\n".join(str(error) for error in group.exceptions)) from None
        return True

    async def _build_templates(self) -> None:
        """Build what is missing, in a process of its own, which can be stopped."""
        if self._settings.driver != "gvisor" or not missing_templates(self._settings):
            return
        self._say("The default template is built now. That takes about a minute and happens once.")
        builder = await asyncio.create_subprocess_exec(
            *(sys.executable, "-u", "-m", "gateway", "templates", "build"),
            env={**os.environ, **self._settings.environment()},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=dying_with(os.getpid(), signal.SIGINT),
        )
        try:
            while builder.stdout is not None and (line := await builder.stdout.readline()):
                self._say(f"  {line.decode(errors='replace').rstrip()}")
            if await builder.wait() != 0:
                raise StartError("The default template could not be built; the reason is above.")
        finally:
            if builder.returncode is None:
                builder.send_signal(signal.SIGINT)
                await builder.wait()

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._say("Stopping now.")
            self._hurry.set()
        else:
            self._say("Stopping; a second signal makes it quicker.")
            self._stop.set()

    def _reap(self) -> None:
        reap_orphans({pid for child in self._children for pid in child.pids})

    async def _start_children(self) -> None:
        """Start all children at once and wait until each serves."""
        async with asyncio.TaskGroup() as group:
            for child in self._children:
                group.create_task(_start_child(child, self._settings.ready_timeout_s))

    async def _answers(self) -> None:
        """Wait until the whole answers from outside. Raises StartError when it does not in time."""
        settings = self._settings
        until = time.monotonic() + settings.ready_timeout_s
        while await status_of(split_address(settings.admin_listen), "/readyz") != 200:
            if time.monotonic() > until:
                raise StartError("The parts run but do not find each other: /readyz does not answer 200.")
            await asyncio.sleep(0.02)

    def _make_children(self, lock: int) -> list[Child]:
        settings = self._settings
        metrics_dir = settings.run_dir / "metrics"
        shutil.rmtree(metrics_dir, ignore_errors=True)
        make_private_dir(metrics_dir)
        environ = {**os.environ, **settings.environment()}
        api_environ = {**environ, "PROMETHEUS_MULTIPROC_DIR": str(metrics_dir)}
        try:
            plane = plane_argv(settings)
        except BinaryMissing as error:
            raise StartError(str(error)) from error
        sandgate: list[str | Path] = [sys.executable, "-m", "gateway"]
        admin = split_address(settings.admin_listen)

        async def api_is_ready() -> bool:
            return await status_of(settings.api_socket, "/healthz") == 200

        async def plane_is_ready() -> bool:
            return await status_of(admin, "/healthz") == 200

        async def hostd_is_ready() -> bool:
            return await _hostd_answers(settings.hostd_socket)

        return [
            self._child("hostd", [*sandgate, "run-hostd"], environ, hostd_is_ready, lock),
            self._child("api", [*sandgate, "run-api"], api_environ, api_is_ready, lock),
            self._child("plane", plane, environ, plane_is_ready, lock),
        ]

    def _orders(self) -> dict[str, Order]:
        plane = next(child for child in self._children if child.name == "plane")
        one_at_a_time = asyncio.Lock()

        async def serves(pid: int) -> bool:
            return await serving_pid(str(self._settings.plane_socket)) == pid

        async def restart() -> dict[str, Any]:
            async with one_at_a_time:
                if plane.is_held:
                    await plane.release(self._settings.ready_timeout_s)
                else:
                    await plane.replace("--take-over", serves=serves, timeout_s=self._settings.ready_timeout_s)
                return {"pid": plane.pid}

        async def drain() -> dict[str, Any]:
            async with one_at_a_time:
                await plane.hold(self._settings.drain_timeout_s + _LAST_WORDS_S)
                return {}

        return {"restart plane": restart, "drain plane": drain}

    def _child(
        self,
        name: str,
        argv: list[str | Path],
        environ: Mapping[str, str],
        is_ready: Callable[[], Awaitable[bool]],
        lock: int,
    ) -> Child:
        return Child(name, argv, environ, is_ready=is_ready, log=self._log_of(name), keep_fds=[lock])

    def _log_of(self, name: str) -> LogFile | None:
        if self._settings.log_to == "stderr":
            return None
        directory = self._settings.home / "logs"
        make_private_dir(directory)
        log = LogFile(directory / f"{name}.log")
        self._logs.append(log)
        return log

    async def _shut_down(self, keepers: list[asyncio.Task[None]]) -> None:
        reaper = asyncio.create_task(self._reap_often())
        settings = self._settings
        drain_s = settings.drain_timeout_s + _LAST_WORDS_S
        times_s = {"plane": drain_s, "api": drain_s, "hostd": _HOSTD_STOP_S}
        for child in reversed(self._children):
            if child.name == "hostd" and keepers:
                await self._until_back(child)
            await child.stop(times_s[child.name], self._hurry)
        await asyncio.gather(*keepers, return_exceptions=True)
        reaper.cancel()
        left = await asyncio.to_thread(kill_orphans, 5.0)
        if left:
            _log.warning("%d processes were left behind and have been killed", left)
        for log in self._logs:
            log.close()

    async def _until_back(self, hostd: Child) -> None:
        """Wait for a hostd that has just died to serve again: only hostd can end the machines it left."""
        until = time.monotonic() + _HOSTD_BACK_S
        while not self._hurry.is_set() and time.monotonic() < until:
            if hostd.pid is not None and await hostd.is_ready():
                return
            await asyncio.sleep(0.05)

    async def _reap_often(self) -> None:
        while True:
            await asyncio.sleep(_REAP_EVERY_S)
            self._reap()

    def _announce(self, credentials: Credentials, took_s: float) -> None:
        settings = self._settings
        self._say(
            f"""
Sandgate is ready ({took_s:.1f} s).

  API base URL   {credentials.base_url}
  API key        {credentials.api_key}
                 (both also in {settings.credentials_file})
  API reference  {credentials.base_url}/docs
  metrics        http://{settings.admin_listen}/metrics

Try it:
  export MIOSA_BASE_URL={credentials.base_url} MIOSA_API_KEY={credentials.api_key}
  curl -s -X POST -H "Authorization: Bearer $MIOSA_API_KEY" $MIOSA_BASE_URL/sandboxes

Ctrl-C stops everything and removes every sandbox but the paused ones.
"""
        )


async def _start_child(child: Child, timeout_s: float) -> None:
    await child.start()
    await child.wait_ready(timeout_s)


async def _hostd_answers(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        async with HostClient(str(path)) as client:
            await client.host_info(deadline=asyncio.get_running_loop().time() + 1.0)
    except VmmError:
        return False
    return True
