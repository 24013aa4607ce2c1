"""Everything peculiar to the runsc program: its control socket, and what goes wrong with it.

Only the start of a sandbox uses a command line (`launch`). The rest of its life goes over its control socket, JSON with
descriptors as SCM_RIGHTS: 0.1 ms a call, where a command costs 20 to 60. As both are internal to runsc, only releases
that they were tried with are accepted (`RELEASES`).

Quirks of release 20240729 that this module or its users work around:

- `runsc start` with a network fails on kernels from 6.11 on ("cannot run with network enabled in root network
  namespace"), because it looks for /proc/sys/net/core/rmem_default. The check belongs to the command: the call that it
  would make, `Network.CreateLinksAndRoutes`, works, and needs no address in the namespace either.
- `PortForward` crashes the sandbox when an answer exceeds one buffer: never called.
- `runsc delete` waits up to two seconds for processes that nobody reaps: the driver kills, reaps and removes itself.
- A control socket's path holds at most 107 bytes: each machine has a state directory of its own, named after it, and
  within it the same short names.
- The first process inherits three streams. A guest could fill a file or block on a pipe, so they are /dev/null.
- A checkpoint resets open TCP connections while it writes down what it finds, so that an `epoll` that watched one may
  be half in the old state and half in the new: in copies it never reports anything again (12 of 12 tries with an event
  loop of ours; the original is well). So there is a first checkpoint to nowhere, for the resets, and another to keep;
  only the latter if there is nothing to reset.
  A connection attempt without an answer yet makes it fail, which harms nobody.
- A pids limit that gVisor's own threads reach, and running out of memory, end the whole sandbox.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import ipaddress
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from vmm import programs
from vmm.drivers.gvisor.launch import CONTROL_SOCKET, ID, Resources, launch
from vmm.drivers.gvisor.network import Slot
from vmm.errors import MachineError

#: Releases whose `boot` command and control socket we know.
RELEASES = ("20240729",)

#: The files of an image: the kernel's state, where which pages lie, and the pages.
IMAGE_FILES = ("checkpoint.img", "pages_meta.img", "pages.img")

_ROOT_LINK = "eth0"
_CALL_TIMEOUT_S = 20.0
#: Saving and restoring move gigabytes, on a bad day at a disk's speed.
_COPY_TIMEOUT_S = 300.0
_ANSWER_BYTES_MAX = 1024 * 1024
_DETAIL_MAX = 2000
_OPEN_CONNECTIONS = "netstack_tcp_current_open"
#: Where a checkpoint fails over a connection attempt without an answer.
_OPENING = "resetConnectionLocked"
#: Segments that guest and host may hand each other in one piece; what a veth pair allows.
_GSO_BYTES_MAX = 65_536
_QDISC_FIFO = 1


def find() -> str | None:
    """Path of the runsc program, or None."""
    return programs.find("runsc")


def release(program: str) -> str:
    """Release of a runsc program, such as "20240729"; what it printed when that has no date in it."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    found = re.search(r"(\d{8})", done.stdout)
    return found.group(1) if found else done.stdout.strip()[:80]


def may_pass(error: MachineError) -> bool:
    """Whether a failed save was due to a connection that was just being opened."""
    return _OPENING in (error.detail or "")


class Runsc:
    """The sandboxes below one state directory. All methods block: call them from a worker thread."""

    def __init__(self, program: str, state_dir: Path) -> None:
        self._program = program
        self._state_dir = state_dir

    def ids(self) -> set[str]:
        """Machines that have a state directory."""
        return {path.name for path in self._state_dir.iterdir()} if self._state_dir.is_dir() else set()

    def create(self, machine_id: str, config: dict[str, Any], resources: Resources) -> int:
        """Start a sandbox that runs nothing yet; returns its process id. Raises as `launch` does."""
        place = self._state_dir / machine_id
        place.mkdir(parents=True, mode=0o700)
        return launch(self._program, place, config, resources)

    def start(self, machine_id: str, slot: Slot) -> None:
        """Connect a created sandbox to its slot and start its agent: about 40 ms. Raises MachineError."""
        with self._connect(machine_id) as control:
            _call(control, "Network.CreateLinksAndRoutes", _links(slot), descriptors=[slot.packets.fileno()])
            _call(control, "containerManager.StartRoot", ID)

    def restore(self, machine_id: str, slot: Slot, directory: Path) -> None:
        """Connect a created sandbox to its slot and go on from what `save` wrote.

        The call resets the control socket's handlers, so no connection from before it may be used after it.
        Raises MachineError (`snapshot_corrupt` when the files cannot be read back), OSError.
        """
        with self._connect(machine_id) as control, _opened(directory, os.O_RDONLY) as files:
            _call(control, "Network.CreateLinksAndRoutes", _links(slot), descriptors=[slot.packets.fileno()])
            options = {"HavePagesFile": True, "HaveDeviceFile": False}
            # The files are as they were saved, and the template and the release too: what is left is a bad image.
            with _failing("snapshot_corrupt", "the snapshot could not be restored"):
                _call(control, "containerManager.Restore", options, descriptors=files, timeout_s=_COPY_TIMEOUT_S)

    def connections(self, machine_id: str) -> int:
        """TCP connections of the guest, open or not closed to the end, since it was booted. Raises MachineError."""
        with self._connect(machine_id) as control:
            return _connections(control)

    def save(self, machine_id: str, directory: Path, *, counts_connections: bool) -> tuple[float, bool]:
        """Write a running sandbox's memory and files into `directory`; it stands still meanwhile and runs on.

        counts_connections: whether `connections` can be believed.
        Returns for how many seconds it stood still, and whether it is sure that no connection was open. Those that
        were are reset; no packet may reach the guest meanwhile. Raises MachineError(`snapshot_failed`, `no_space`);
        the sandbox runs on then as well, and whatever was written is left to the caller to remove.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        with _failing("snapshot_failed", "the machine could not be saved"), self._connect(machine_id) as control:
            began = time.monotonic()
            _call(control, "containerManager.Pause", None)
            try:
                is_quiet = counts_connections and _connections(control) == 0
                if not is_quiet:
                    with Path(os.devnull).open("r+b", buffering=0) as nowhere:
                        _checkpoint(control, [nowhere.fileno()] * len(IMAGE_FILES), skip_zero_pages=False)
                with _opened(directory, flags) as files:
                    _checkpoint(control, files, skip_zero_pages=True)
            finally:
                _call(control, "containerManager.Resume", None)
            return time.monotonic() - began, is_quiet

    def remove(self, machine_id: str) -> None:
        """Forget a sandbox whose processes are gone."""
        shutil.rmtree(self._state_dir / machine_id, ignore_errors=True)

    @contextlib.contextmanager
    def _connect(self, machine_id: str) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            try:
                control.connect(str(self._state_dir / machine_id / CONTROL_SOCKET))
            except OSError as error:
                raise MachineError("driver_failed", "the sandbox does not answer", detail=str(error)) from error
            yield control


def _links(slot: Slot) -> dict[str, Any]:
    """Arguments that describe a loopback link and one link to the slot's packet socket."""
    loopback = {
        "Name": "lo",
        "Addresses": [{"Address": "127.0.0.1", "PrefixLen": 8}, {"Address": "::1", "PrefixLen": 128}],
        "Routes": [_route("127.0.0.0", 8), _route("::1", 128)],
        "GVisorGRO": False,
    }
    link = {
        "Name": _ROOT_LINK,
        "InterfaceIndex": 0,
        "MTU": slot.mtu,
        "Addresses": [{"Address": slot.address, "PrefixLen": 30}],
        "Routes": [_route(str(ipaddress.ip_interface(f"{slot.address}/30").network.network_address), 30)],
        "GSOMaxSize": _GSO_BYTES_MAX,
        "GVisorGSOEnabled": False,
        "GVisorGRO": False,
        "TXChecksumOffload": False,
        "RXChecksumOffload": True,
        "LinkAddress": base64.b64encode(slot.mac).decode(),
        "QDisc": _QDISC_FIFO,
        "Neighbors": None,
        "NumChannels": 1,
        "ProcessorsPerChannel": 0,
    }
    none = {"Route": {"Destination": {"IP": "", "Mask": None}, "Gateway": ""}, "Name": ""}
    return {
        "LoopbackLinks": [loopback],
        "FDBasedLinks": [link],
        "XDPLinks": None,
        "Defaultv4Gateway": {"Route": _route("0.0.0.0", 0, gateway=slot.gateway), "Name": _ROOT_LINK},  # noqa: S104
        "Defaultv6Gateway": none,
        "PCAP": False,
        "LogPackets": False,
        "NATBlob": False,
        "DisconnectOk": True,
    }


def _route(destination: str, prefix: int, gateway: str = "") -> dict[str, Any]:
    network = ipaddress.ip_network(f"{destination}/{prefix}")
    mask = base64.b64encode(network.netmask.packed).decode()
    return {"Destination": {"IP": destination, "Mask": mask}, "Gateway": gateway}


@contextlib.contextmanager
def _opened(directory: Path, flags: int) -> Iterator[list[int]]:
    """Descriptors of the files of an image, in the order that both calls expect."""
    with contextlib.ExitStack() as closing:
        files = []
        for name in IMAGE_FILES:
            files.append(os.open(directory / name, flags | os.O_CLOEXEC, 0o600))
            closing.callback(os.close, files[-1])
        yield files


def _connections(control: socket.socket) -> int:
    answer = _call(control, "Metrics.Export", {"only_metrics": f"^{_OPEN_CONNECTIONS}$"})
    [gauge] = answer["snapshot"]["data"]
    # Nought is left out.
    return int(gauge["val"].get("int", 0))


def _checkpoint(control: socket.socket, files: Sequence[int], *, skip_zero_pages: bool) -> None:
    options = {
        "key": None,
        # Compressing takes ten times as long as writing, with the guest standing still.
        "metadata": {"compression": "none"},
        "MemoryFileSaveOpts": {"ExcludeCommittedZeroPages": skip_zero_pages},
        "have_pages_file": True,
        "Resume": True,
    }
    _call(control, "containerManager.Checkpoint", options, descriptors=files, timeout_s=_COPY_TIMEOUT_S)


def _call(
    control: socket.socket,
    method: str,
    argument: object,
    descriptors: Sequence[int] = (),
    timeout_s: float = _CALL_TIMEOUT_S,
) -> Any:
    """One call. The answer is a JSON value without an end mark, so it is complete when it parses."""
    control.settimeout(timeout_s)
    request = orjson.dumps({"method": method, "arg": argument})
    try:
        socket.send_fds(control, [request], list(descriptors))
        answer = b""
        while True:
            received = control.recv(65_536)
            answer += received
            with contextlib.suppress(orjson.JSONDecodeError):
                result = orjson.loads(answer)
                break
            if not received or len(answer) > _ANSWER_BYTES_MAX:
                raise OSError(f"broken answer to {method}")
    except OSError as error:
        raise MachineError("driver_failed", "the sandbox does not answer", detail=f"{method}: {error}") from error
    if not result["success"]:
        raise MachineError("driver_failed", "the sandbox refused", detail=f"{method}: {result['err']}"[:_DETAIL_MAX])
    return result["result"]


@contextlib.contextmanager
def _failing(code: str, message: str) -> Iterator[None]:
    """Name a failure after what was tried; a full disk is told apart."""
    try:
        yield
    except (MachineError, OSError) as error:
        detail = str(error.detail if isinstance(error, MachineError) else error)
        if os.strerror(errno.ENOSPC).lower() in detail.lower():
            code, message = "no_space", "the host's disk is full"
        raise MachineError(code, message, detail=detail) from error
