"""The grammar of host names: which of them name a port of a sandbox.

    <port>-<slug>.sandbox.<domain>      a port of the sandbox with that slug (or full UUID)
    sbx-<id>-<port>.preview.<domain>    the same by the first 8 or more hex digits of the sandbox's UUID
    <slug>.<zone>.<domain>              reserved; zone is sandbox, preview, computer or deploy
    <slug>.<domain>                     reserved, but for the names in `API_NAMES`
    anything else                       the API

Letter case, a port after the name and one trailing dot do not matter. The plane's parser is the Rust crate `hosts`;
both are tested against tests/vectors/hosts.json.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from previews.errors import HostError

#: First labels directly under a domain that belong to the API and never to a slug.
API_NAMES = frozenset({"api", "sandboxes", "stream", "www"})
#: Labels directly under a domain below which no API host can lie.
ZONES = frozenset({"sandbox", "preview", "computer", "deploy"})
#: The agent's port: never a preview.
AGENT_PORT = 10_700
#: Longest slug: the label `65535-<slug>` must fit into 63 characters.
SLUG_CHARS_MAX = 57

_NAME_CHARS_MAX = 253
_LABEL_CHARS_MAX = 63
_LABEL = re.compile(r"[A-Za-z0-9_-]+\Z", re.ASCII)
_SLUG_FORM = re.compile(r"([1-9][0-9]{0,4})-([a-z0-9](?:[a-z0-9-]*[a-z0-9])?)\Z", re.ASCII)
_ID_FORM = re.compile(r"sbx-([0-9a-f]{8,32})-([1-9][0-9]{0,4})\Z", re.ASCII)
_SLUG = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Target:
    """What a host stands for. A preview has a port and either a slug or an id prefix."""

    kind: Literal["api", "preview", "reserved"]
    port: int | None = None
    slug: str | None = None
    id_prefix: str | None = None


_API = Target("api")
_RESERVED = Target("reserved")


def parse_host(header: str, domains: Sequence[str]) -> Target:
    """Say what the value of a `Host` header stands for.

    domains: lower-case names below which previews live, without a leading dot.
    Raises HostError if it is no host name at all.
    """
    name = _normalise(header)
    if name in domains:
        return _API
    rests = [name.removesuffix(f".{domain}") for domain in domains if name.endswith(f".{domain}")]
    if not rests:
        return _API
    return _classify(min(rests, key=len))


def _classify(rest: str) -> Target:
    label, dot, zone = rest.rpartition(".")
    if not dot:
        return _API if rest in API_NAMES else _RESERVED
    if zone == "sandbox" and (found := _SLUG_FORM.match(label)) and int(found[1]) <= 65535:
        return Target("preview", port=int(found[1]), slug=found[2])
    if zone == "preview" and (found := _ID_FORM.match(label)) and int(found[2]) <= 65535:
        return Target("preview", port=int(found[2]), id_prefix=found[1])
    return _RESERVED if zone in ZONES else _API


def _normalise(header: str) -> str:
    if header.startswith("["):
        return _normalise_literal(header)
    name, colon, port = header.partition(":")
    _check_port(port if colon else "")
    name = name.removesuffix(".")
    if not name:
        raise HostError("empty", "the host name is empty")
    if len(name.encode()) > _NAME_CHARS_MAX:
        raise HostError("too_long", "the host name is too long")
    for label in name.split("."):
        if len(label.encode()) > _LABEL_CHARS_MAX:
            raise HostError("too_long", "the host name is too long")
        if not _LABEL.match(label):
            raise HostError("bad_name", "the host name has a character that does not belong there")
    return name.lower()


def _normalise_literal(header: str) -> str:
    inner, bracket, rest = header[1:].partition("]")
    try:
        # A zone index (`%eth0`) means nothing to anybody but the client.
        if not bracket or "%" in inner or (rest and not rest.startswith(":")):
            raise ValueError(header)
        ipaddress.IPv6Address(inner)
    except ValueError as error:
        raise HostError("bad_name", "the host name has a character that does not belong there") from error
    _check_port(rest[1:])
    return f"[{inner}]".lower()


def _check_port(port: str) -> None:
    is_number = len(port) <= 5 and (not port or (port.isascii() and port.isdigit()))
    if not is_number or int(port or 0) > 65535:
        raise HostError("bad_port", "the host's port is not a number from 0 to 65535")


def preview_host(port: int, slug: str, domain: str) -> str:
    """Make the host of a sandbox's port by its slug. Raises HostError for a port or slug that no host can carry."""
    if not _SLUG.match(slug) or len(slug) > SLUG_CHARS_MAX:
        raise HostError("bad_name", f"not a slug: {slug!r}")
    return f"{_checked_port(port)}-{slug}.sandbox.{domain}"


def preview_id_host(port: int, sandbox_id: str, domain: str) -> str:
    """Make the host of a sandbox's port by the first 12 hex digits of its UUID. Raises HostError as `preview_host`."""
    digits = sandbox_id.replace("-", "").lower()
    if not re.fullmatch(r"[0-9a-f]{32}", digits):
        raise HostError("bad_name", f"not a UUID: {sandbox_id!r}")
    return f"sbx-{digits[:12]}-{_checked_port(port)}.preview.{domain}"


def _checked_port(port: int) -> int:
    if not 1 <= port <= 65535 or port == AGENT_PORT:
        raise HostError("bad_port", f"not a port for a preview: {port}")
    return port
