"""The writable layer of a machine: a file system of its own with exactly the size the machine may write.

gVisor keeps what a guest writes over the template in one *filestore*. Measured on runsc 20240729:

- in memory, the filestore counts against the machine's RAM: a 1 GiB file kills a machine with 1 GiB;
- in a directory of the host, nothing bounds it (`--overlay2` has no size), so a guest can fill the host's disk;
- on a file system of the wanted size, a full disk is ENOSPC for `write`, SIGBUS for a mapping, and nobody is harmed.

So each machine gets a sparse, unnamed file formatted as ext4 without a journal, on a loop device, mounted without a
place in the file tree: about 6 ms. File, device and mount hang on one descriptor, the filestore's; when the sandbox
dies, all three are gone, whatever happened to hostd. Disk quotas would save the loop device, but many kernels,
Debian's cloud kernel's configuration among them, lack the quota format or the root file system was made without.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from vmm import programs
from vmm.drivers.gvisor import syscalls

_MKFS_TIMEOUT_S = 30
#: Inode tables and the like; added so that the machine gets the bytes it was promised.
_OVERHEAD_BYTES = 8 * 1024 * 1024


class Disk:
    """An empty file system, usable as `path` by other processes too until `release`."""

    def __init__(self, root: int) -> None:
        self._root = root

    @property
    def path(self) -> str:
        """Directory of the file system's root."""
        return f"/proc/{os.getpid()}/fd/{self._root}"

    def release(self) -> None:
        """Let go of it. It is freed now, or when the sandbox that uses it ends."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1


def make_disk(directory: Path, size_bytes: int) -> Disk:
    """Make a disk whose blocks are taken from `directory`'s file system as they are written. Blocks for some ms.

    Raises OSError, also for what mkfs says.
    """
    image = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(image, size_bytes + _OVERHEAD_BYTES)
        _format(image)
        device, path = syscalls.attach_loop(image)
        try:
            return Disk(syscalls.mount_detached("ext4", path, "discard"))
        finally:
            os.close(device)
    finally:
        os.close(image)


def _format(image: int) -> None:
    # A journal would only slow down what never survives a crash; sixteen inodes are plenty for one filestore.
    command = [programs.find("mkfs.ext4") or "mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-N", "16"]
    command += ["-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1,nodiscard", f"/proc/self/fd/{image}"]
    try:
        done = subprocess.run(
            command, pass_fds=[image], capture_output=True, text=True, timeout=_MKFS_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(110, "mkfs.ext4 took too long") from error
    if done.returncode:
        raise OSError(5, f"mkfs.ext4: {done.stderr.strip()[:500]}")
