"""The plane's own host parser, for tests and for telling what a host would lead to.

The grammar in plain Python is `previews.hosts`; this is the code that decides in production.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from native._core import HostError
from native._core import parse_host as _parse_host

__all__ = ["HostError", "ParsedHost", "parse_host"]


class ParsedHost(NamedTuple):
    """What a host stands for. A preview has a port and either a slug or an id prefix."""

    kind: Literal["api", "preview", "reserved"]
    port: int | None
    slug: str | None
    id_prefix: str | None


def parse_host(header: str, domains: Sequence[str]) -> ParsedHost:
    """Say what the value of a `Host` header stands for; `domains` are lower-case names without a leading dot.

    Raises HostError if it is no host name at all.
    """
    return ParsedHost(*_parse_host(header, list(domains)))
