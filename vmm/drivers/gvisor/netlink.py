"""The rtnetlink requests that a sandbox's link needs: create a veth pair, bring a link up, give it an address, a route.

A spawned `ip` costs several milliseconds of CPU per sandbox; a request here costs some 50 microseconds.
"""

from __future__ import annotations

import os
import socket
import struct
from types import TracebackType
from typing import Self

_RTM_NEWLINK, _RTM_DELLINK, _RTM_NEWADDR, _RTM_NEWROUTE = 16, 17, 20, 24
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_REPLACE, _NLM_F_EXCL, _NLM_F_CREATE = 1, 4, 0x100, 0x200, 0x400
_NLMSG_ERROR = 2
_IFF_UP = 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 3, 4, 18, 28
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_VETH_INFO_PEER = 1
_RT_TABLE_MAIN, _RTPROT_KERNEL, _RT_SCOPE_LINK, _RTN_UNICAST = 254, 2, 253, 1
_RTA_DST, _RTA_OIF, _RTA_PREFSRC, _RTA_METRICS = 1, 4, 7, 8
_RTAX_QUICKACK = 15

_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BBHiII")
_ADDRESS = struct.Struct("=BBBBi")
_ROUTE = struct.Struct("=BBBBBBBBI")


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(-length % 4)


def _link(index: int = 0, flags: int = 0) -> bytes:
    return _LINK.pack(socket.AF_UNSPEC, 0, 0, index, flags, flags)


class Netlink:
    """A socket for requests in the network namespace that the calling thread was in when it was made."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._socket.settimeout(5)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def add_veth(self, name: str, peer: str, *, peer_namespace: int, mtu: int) -> None:
        """Make a pair: `name` here, `peer` in the namespace behind a descriptor."""
        size = _attribute(_IFLA_MTU, struct.pack("=I", mtu))
        other = _link() + _attribute(_IFLA_IFNAME, peer.encode() + b"\0") + size
        other += _attribute(_IFLA_NET_NS_FD, struct.pack("=I", peer_namespace))
        data = _attribute(_IFLA_INFO_DATA, _attribute(_VETH_INFO_PEER, other))
        info = _attribute(_IFLA_LINKINFO, _attribute(_IFLA_INFO_KIND, b"veth") + data)
        message = _link() + _attribute(_IFLA_IFNAME, name.encode() + b"\0") + size + info
        self._request(_RTM_NEWLINK, _NLM_F_CREATE | _NLM_F_EXCL, message)

    def set_up(self, name: str) -> None:
        """Bring a link up."""
        self._request(_RTM_NEWLINK, 0, _link(socket.if_nametoindex(name), _IFF_UP))

    def delete(self, name: str) -> None:
        """Remove a link. A veth pair goes with either end."""
        self._request(_RTM_DELLINK, 0, _link(socket.if_nametoindex(name)))

    def add_address(self, name: str, address: str, prefix: int) -> None:
        """Give a link an IPv4 address."""
        raw = socket.inet_aton(address)
        message = _ADDRESS.pack(socket.AF_INET, prefix, 0, 0, socket.if_nametoindex(name))
        self._request(
            _RTM_NEWADDR, _NLM_F_CREATE, message + _attribute(_IFA_LOCAL, raw) + _attribute(_IFA_ADDRESS, raw)
        )

    def acknowledge_at_once(self, name: str, source: str, network: str, prefix: int) -> None:
        """Have TCP answer what comes from a link's own network without delay.

        A server that writes head and body of a response apart waits for the first to be acknowledged (Nagle), which
        the kernel puts off for 40 ms in the hope of something to send along. source: the link's address.
        """
        link = socket.if_nametoindex(name)
        kind = (_RT_TABLE_MAIN, _RTPROT_KERNEL, _RT_SCOPE_LINK, _RTN_UNICAST)
        message = _ROUTE.pack(socket.AF_INET, prefix, 0, 0, *kind, 0)
        message += _attribute(_RTA_DST, socket.inet_aton(network)) + _attribute(_RTA_OIF, struct.pack("=I", link))
        message += _attribute(_RTA_PREFSRC, socket.inet_aton(source))
        message += _attribute(_RTA_METRICS, _attribute(_RTAX_QUICKACK, struct.pack("=I", 1)))
        self._request(_RTM_NEWROUTE, _NLM_F_CREATE | _NLM_F_REPLACE, message)

    def _request(self, kind: int, flags: int, message: bytes) -> None:
        self._sequence += 1
        flags |= _NLM_F_REQUEST | _NLM_F_ACK
        self._socket.send(_HEADER.pack(_HEADER.size + len(message), kind, flags, self._sequence, 0) + message)
        while True:
            answer = self._socket.recv(65536)
            _, answer_kind, _, sequence, _ = _HEADER.unpack_from(answer)
            if sequence != self._sequence or answer_kind != _NLMSG_ERROR:
                continue
            (code,) = struct.unpack_from("=i", answer, _HEADER.size)
            if code:
                raise OSError(-code, os.strerror(-code))
            return
