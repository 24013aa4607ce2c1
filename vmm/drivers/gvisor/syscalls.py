"""System calls that Python 3.11 has no function for. Thin: no policy, every failure is an OSError."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import socket
import struct

_libc = ctypes.CDLL(None, use_errno=True)

_CLONE_NEWNET = 0x4000_0000
_PR_SET_CHILD_SUBREAPER = 36

# fsopen and its kin have the same numbers on every architecture.
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSOPEN_CLOEXEC = 1
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_FSMOUNT_CLOEXEC = 1
_MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 2, 4

_SYS_PIDFD_GETFD, _SYS_PROCESS_MADVISE = 438, 440
_MADV_PAGEOUT = 21

_SO_ATTACH_FILTER = 26
#: One instruction of classic BPF: return 0, which is how much of each packet is kept.
_BPF_DROP = struct.pack("HBBI", 0x06, 0, 0, 0)

_LOOP_CONFIGURE, _LOOP_CTL_GET_FREE, _LOOP_CLR_FD = 0x4C0A, 0x4C82, 0x4C01
_LO_FLAGS_AUTOCLEAR, _LO_FLAGS_DIRECT_IO = 4, 16
#: struct loop_config: fd, block_size, loop_info64 (five u64, four u32, two names, a key, two u64), eight u64 spare.
_LOOP_CONFIG = struct.Struct("<II QQQQQ IIII 64s64s32s QQ 64s")


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def unshare_network() -> None:
    """Give the calling thread a new, empty network namespace."""
    _check(_libc.unshare(_CLONE_NEWNET))


def enter_network(namespace: int) -> None:
    """Move the calling thread into the network namespace behind a descriptor."""
    _check(_libc.setns(namespace, _CLONE_NEWNET))


def become_subreaper() -> None:
    """Make orphans among this process's descendants its children, so that it can reap them."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def attach_loop(image: int) -> tuple[int, str]:
    """Make a block device of an open file; returns its descriptor and path.

    The device frees itself when its last user, the returned descriptor or a mount, is gone. Direct I/O keeps the
    image's blocks from being cached twice; file systems without it are used without.
    """
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for flags in (_LO_FLAGS_AUTOCLEAR | _LO_FLAGS_DIRECT_IO, _LO_FLAGS_AUTOCLEAR):
            config = _LOOP_CONFIG.pack(image, 0, 0, 0, 0, 0, 0, 0, 0, 0, flags, b"", b"", b"", 0, 0, b"")
            # Another process may take the free device first; a handful of tries outlasts any plausible rush.
            for _ in range(16):
                path = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
                device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.ioctl(device, _LOOP_CONFIGURE, config)
                except BlockingIOError:
                    os.close(device)
                    continue
                except OSError as error:
                    os.close(device)
                    if error.errno == 16:  # EBUSY: taken meanwhile
                        continue
                    break
                return device, path
        raise OSError(16, "no free loop device")
    finally:
        os.close(control)


def mount_detached(kind: str, source: str, *flags: str) -> int:
    """Mount a block device without putting it into the file tree; returns a descriptor of its root.

    The mount lives as long as something has a file of it open, so a crash leaves none behind.
    """
    context = _check(_libc.syscall(_SYS_FSOPEN, kind.encode(), _FSOPEN_CLOEXEC))
    try:
        _check(_libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_STRING, b"source", source.encode(), 0))
        for flag in flags:
            _check(_libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_FLAG, flag.encode(), None, 0))
        _check(_libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0))
        # Not without execution: the sentry maps a guest's programs from here, and without it they end by SIGSEGV.
        attributes = _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV
        return _check(_libc.syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes))
    finally:
        os.close(context)


def take_descriptor(pidfd: int, number: int) -> int:
    """A copy of an open descriptor of another process."""
    return _check(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0))


def drop_packets(packets: socket.socket) -> None:
    """Have a socket receive nothing, in whatever process, until its filter is detached (SO_DETACH_FILTER)."""
    program = ctypes.create_string_buffer(_BPF_DROP)
    packets.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))


class _Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("length", ctypes.c_size_t))


def page_out(pidfd: int, start: int, length: int) -> None:
    """Have the kernel write out and forget a range of a process's memory, as far as that has a place to go to."""
    memory = _Range(start, length)
    _check(_libc.syscall(_SYS_PROCESS_MADVISE, pidfd, ctypes.byref(memory), 1, _MADV_PAGEOUT, 0))


def is_little_endian_64bit() -> bool:
    """Whether the structures above fit this machine."""
    return platform.machine() in ("x86_64", "aarch64")
