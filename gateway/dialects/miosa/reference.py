"""Prints docs/api.md from the route table: `python -m gateway.dialects.miosa.reference`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from gateway.dialects.miosa.dialect import PREFIX
from gateway.dialects.miosa.errors import TABLE
from gateway.dialects.miosa.route import Route
from gateway.dialects.miosa.routes import FAMILIES, SOCKETS
from gateway.errors import CODES
from gateway.pipeline import SocketOperation

_HEAD = f"""\
# The MIOSA API

Printed by `python -m gateway.dialects.miosa.reference` from the tables in the code.

All paths stand below `{PREFIX}`. Fields of bodies and answers are in the OpenAPI document that the server gives at
`{PREFIX}/openapi.json`, and can be read at `{PREFIX}/docs`. Send `Authorization: Bearer <key>`.

- One object comes as `{{…object, "data": object}}`, a list as `{{"data": […], "page": {{page, page_size, total}}}}`.
- Lists take `page` with `page_size`, `per_page` or `limit`, or `offset` with `limit`; 20 items unless said otherwise,
  100 for client libraries that do not page.
- Every change takes an `Idempotency-Key` of any form; the same request with it gets the same answer for 24 hours.
- Every answer has an `X-Request-Id`, and `X-RateLimit-Limit`, `-Remaining` and `-Reset`.
- Commands that take long answer 200 at once and send a space every five seconds ahead of the JSON.
- Streams are server-sent events with the kind in `event:` and as `type` in the data; `: heartbeat` fills pauses.
"""

_TABLE_HEAD = "| request | scope | what it does |\n|---|---|---|\n"

_ERRORS = """\
## Errors

`{"error": {"code", "message", "request_id", "details"?, "retry_after"?}}`, with the inner fields repeated beside it.

| status | code | meaning |
|---|---|---|
"""


def as_markdown() -> str:
    """The whole document."""
    families = [f"## {family}\n\n{_TABLE_HEAD}{''.join(map(_row, routes))}" for family, routes in FAMILIES.items()]
    families.append(f"## WebSockets\n\n{_TABLE_HEAD}{''.join(map(_socket_row, SOCKETS))}")
    rows = sorted((status, code, CODES[ours].meaning) for ours, (status, code) in TABLE.items())
    errors = _ERRORS + "".join(f"| {status} | `{code}` | {meaning} |\n" for status, code, meaning in rows)
    return "\n".join([_HEAD, *families, errors])


def _row(route: Route) -> str:
    scope = "–" if route.scope is None else f"`{route.scope}`"
    return f"| `{route.method} {route.path}` | {scope} | {_summary(route.handler)} |\n"


def _socket_row(socket: SocketOperation) -> str:
    return f"| `{socket.path}` | `{socket.scope}` | {_summary(socket.handler)} |\n"


def _summary(handler: Callable[..., Any]) -> str:
    return inspect.cleandoc(handler.__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
