"""Requests for tests of codecs: a `Call` without a server around it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.types import Message, Receive

from gateway.pipeline import Call, Operation
from gateway.resources import Principal

EFFECT_ID = "0193f2a0-0000-7000-8000-000000000001"
SANDBOX_ID = "0193f2a0-0000-7000-8000-000000000002"
WORKSPACE_ID = "0193f2a0-0000-7000-8000-000000000003"


def make_request(
    body: bytes | Iterable[bytes] = b"",
    *,
    method: str = "POST",
    path: str = "/",
    headers: dict[str, str] | None = None,
    query: dict[str, Any] | None = None,
    path_params: dict[str, Any] | None = None,
) -> Request:
    """A request whose body arrives in the given pieces."""
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": urlencode(query or {}, doseq=True).encode(),
        "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
        "path_params": {"sandbox_id": SANDBOX_ID, **(path_params or {})},
    }
    return Request(scope, _pieces([body] if isinstance(body, bytes) else list(body)))


def make_call(body: bytes = b"", **request: Any) -> Call:
    """A call whose engine must not be used."""
    return Call(
        request=make_request(body, **request),
        operation=cast(Operation, None),
        principal=Principal(WORKSPACE_ID, "key", frozenset()),
        engine=cast(Any, None),
        effect_id=EFFECT_ID,
        deadline=math.inf,
        request_id="req_test",
    )


def _pieces(pieces: list[bytes]) -> Receive:
    waiting = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    waiting.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> Message:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    return receive
