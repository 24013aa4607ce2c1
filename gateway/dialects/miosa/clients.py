"""Who is calling: the official client libraries have habits the specification does not know."""

from __future__ import annotations

import re

from starlette.requests import HTTPConnection

_LIBRARIES = ("miosa-python/", "miosa-sandbox-py/", "miosa-node/", "miosa-js/", "miosa-sdk/", "@miosa/sdk", "miosa-go/")


_PYTHON = re.compile(r"^miosa-python/(\d+)\.(\d+)")


def is_library(connection: HTTPConnection) -> bool:
    """Whether a request comes from one of MIOSA's client libraries."""
    agent = connection.headers.get("user-agent", "").lower()
    return agent.startswith(_LIBRARIES) or "x-miosa-client-id" in connection.headers


def repeats_changes(connection: HTTPConnection) -> bool:
    """Whether this client repeats a POST after a timeout without an idempotency key; Python stopped that in 2.6."""
    version = _PYTHON.match(connection.headers.get("user-agent", ""))
    if version is None:
        return is_library(connection)
    return (int(version[1]), int(version[2])) < (2, 6)
