"""Starting the kernel of a sandbox: all that `runsc create` does for one of ours, in a fifth of its processor time.

`runsc create` starts itself three times more, each a Go program of 30 MB: to enter namespaces, to unmount `/proc`, and
to be the sandbox without its rights. Here `sandgate-jailer` (`native/crates/jailer`) does the first two and becomes the
third, `runsc boot`. That command is internal to runsc, with flags and descriptors of its own: see `runsc.RELEASES`.

The sandbox is shut in at least as tightly as by `runsc create`, which `tests/vmm/gvisor/test_launch.py` compares.
Without `--directfs` it runs as nobody instead of as root in its user namespace, without any capability, and its filter
has no system call that opens a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import select
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

import native
from vmm.errors import MachineError

#: runsc's own id of every sandbox; the state directory tells them apart.
ID = "sandbox"
CONTROL_SOCKET = f"runsc-{ID}.sock"

_TIMEOUT_S = 30.0
_LOG = "boot.log"
_DETAIL_MAX = 2000
#: The overlay of an image is named with its descriptor; the rest is what a guest's kernel is to be like.
_FLAGS = (
    "--log-format=json",
    "--platform=systrap",
    "--network=sandbox",
    "--overlay2=none",
    "--directfs=false",
    "--net-disconnect-ok=true",
    "--log-fd=2",
)
#: A program that finds fewer processors may leave out locks that it needs on several.
_PROCESSORS_MIN = 2
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND
_OWN_MIN = 64


@dataclass(frozen=True, slots=True)
class Resources:
    """What a sandbox is made of. None of the descriptors is closed here.

    image: EROFS image of the template.  disk: directory for what the guest writes over it.
    network: descriptor of its network namespace.  groups: directories of its control groups.
    cpu_count: processors it may use.  memory_bytes: what the guest is told it has.
    """

    image: Path
    disk: str
    network: int
    groups: Sequence[Path]
    cpu_count: float
    memory_bytes: int


def launch(program: str, place: Path, config: dict[str, Any], resources: Resources) -> int:
    """Start a sandbox that runs nothing yet; returns its process id. Takes some 30 ms, nearly all of it CPU.

    place: a directory for its control socket.  config: its OCI configuration.
    Raises MachineError(`driver_failed`), OSError; no process is left then.
    """
    pid, started = _spawn(program, place, config, resources)
    try:
        _wait(started, place / _LOG)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(started)
    return pid


def _spawn(program: str, place: Path, config: dict[str, Any], resources: Resources) -> tuple[int, int]:
    """Returns the process id, and a descriptor that gives a byte when it has started and an end when it has ended."""
    (place / "config.json").write_bytes(orjson.dumps(config))
    with contextlib.ExitStack() as closing:
        gifts = _Gifts(closing)
        for path, flags in ((os.devnull, os.O_RDONLY), (os.devnull, os.O_WRONLY), (place / _LOG, _APPEND)):
            gifts.open(path, flags)
        proc_is_done, proc_done = gifts.pipe()
        started, starting = os.pipe2(os.O_CLOEXEC)
        try:
            sandbox = {
                "apply-caps": "false",
                "bundle": place,
                "controller-fd": gifts.give(_control_socket(place).detach()),
                "cpu-num": _processors(resources.cpu_count),
                "gofer-filestore-fds": gifts.open(resources.disk, os.O_TMPFILE | os.O_RDWR),
                "gofer-mount-confs": "erofs:anon",
                "host-shmem-huge": _huge_pages(),
                "io-fds": gifts.open(resources.image, os.O_RDONLY),
                "proc-mount-sync-fd": proc_done,
                "setup-root": "false",
                "spec-fd": gifts.open(place / "config.json", os.O_RDONLY),
                "start-sync-fd": gifts.give(starting),
                "stdio-fds": ",".join(str(gifts.open(os.devnull, os.O_RDWR)) for _ in range(3)),
                "total-host-memory": _memory_bytes(),
                "total-memory": min(resources.memory_bytes, _memory_bytes()),
            }
            command = [
                *("sandgate-jailer", *(f"--group={group}" for group in resources.groups)),
                *(f"--network={gifts.give(os.dup(resources.network))}", f"--proc-until={proc_is_done}"),
                *(f"--descriptors={len(gifts)}", program),
                *("runsc-sandbox", f"--root={place}", *_FLAGS, "boot", *_as_flags(sandbox), ID),
            ]
            pid = gifts.spawn(str(native.jailer_path()), command)
        except BaseException:
            os.close(started)
            raise
    return pid, started


class _Gifts:
    """Descriptors for a new process, closed here with `closing`. Each is known by its number there, from 0 on."""

    def __init__(self, closing: contextlib.ExitStack) -> None:
        self._closing = closing
        self._own: list[int] = []

    def __len__(self) -> int:
        return len(self._own)

    def open(self, path: str | Path, flags: int) -> int:
        """Open a file."""
        return self.give(os.open(path, flags | os.O_CLOEXEC, 0o600))

    def pipe(self) -> tuple[int, int]:
        """Both ends."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        return self.give(reader), self.give(writer)

    def give(self, descriptor: int) -> int:
        """An open one, which is closed as the others."""
        try:
            # Out of the way of the numbers that they get.
            own = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _OWN_MIN)
        finally:
            os.close(descriptor)
        self._closing.callback(os.close, own)
        self._own.append(own)
        return len(self._own) - 1

    def spawn(self, program: str, arguments: list[str]) -> int:
        """Start a program with them; returns its process id."""
        actions = [(os.POSIX_SPAWN_DUP2, own, number) for number, own in enumerate(self._own)]
        # What Python ignores is nothing that a program should begin with.
        ours = [signal.SIGPIPE, signal.SIGXFSZ]
        return os.posix_spawn(program, arguments, {}, file_actions=actions, setsigdef=ours, setsigmask=[])


def _control_socket(place: Path) -> socket.socket:
    """Where the sandbox will listen."""
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        control.bind(str(place / CONTROL_SOCKET))
    except BaseException:
        control.close()
        raise
    return control


def _wait(started: int, log: Path) -> None:
    poll = select.poll()
    poll.register(started, select.POLLIN)
    if not poll.poll(_TIMEOUT_S * 1000):
        raise MachineError("driver_failed", "the sandbox could not be created", detail="it took too long")
    if not os.read(started, 1):
        raise MachineError("driver_failed", "the sandbox could not be created", detail=_complaint(log))


def _complaint(log: Path) -> str:
    """The last error in the log, else its last line, which is the jailer's or the Go runtime's."""
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").splitlines()
        for line in reversed(lines):
            with contextlib.suppress(orjson.JSONDecodeError, TypeError):
                entry = orjson.loads(line)
                if entry.get("level") in ("error", "warning"):
                    return str(entry["msg"])[:_DETAIL_MAX]
        if lines:
            return lines[-1][:_DETAIL_MAX]
    return "it ended without a word"


def _as_flags(settings: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def _processors(cpu_count: float) -> int:
    return min(max(_PROCESSORS_MIN, math.ceil(cpu_count)), len(os.sched_getaffinity(0)))


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _huge_pages() -> str:
    """Whether the host gives huge pages to files in memory; the sandbox cannot look any more."""
    with contextlib.suppress(OSError):
        found = re.search(r"\[(\w+)\]", Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text())
        if found:
            return found.group(1)
    return "never"
