"""Giving back the memory of a frozen machine, page by page, to where it can be read from again.

Pages that are a copy of a file (runsc itself, the template's image) need no place to go to. Everything else, the
guest's memory and the heap of gVisor's kernel, goes to swap or stays. Measured for an idle machine, alone on its host:
of 42 MiB 11 stay without swap and 2 with it; the first answer afterwards takes some 30 ms instead of 1.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from vmm.drivers.gvisor import syscalls
from vmm.drivers.gvisor.cgroups import Groups


def reclaim(groups: Groups, machine_id: str) -> int:
    """Give back what a frozen machine holds; returns how many bytes of it are free now. Takes some 20 ms."""
    before = _resident_bytes(groups, machine_id)
    for pid in groups.processes(machine_id):
        with contextlib.suppress(OSError):  # it has ended
            _page_out(pid)
    groups.drop_memory(machine_id)
    return max(0, before - _resident_bytes(groups, machine_id))


def _resident_bytes(groups: Groups, machine_id: str) -> int:
    """Each process's share of the pages it maps, summed up: what would be free if the machine were gone."""
    total = 0
    for pid in groups.processes(machine_id):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def _page_out(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            start, end = (int(text, 16) for text in line.split(maxsplit=1)[0].split("-"))
            with contextlib.suppress(OSError):  # what is no memory, such as [vvar]
                syscalls.page_out(pidfd, start, end - start)
    finally:
        os.close(pidfd)
