"""Prints docs/api.md from the route table: `python -m gateway.dialects.miosa.reference`."""

from __future__ import annotations

import inspect

from gateway.dialects.miosa.dialect import PREFIX
from gateway.dialects.miosa.route import Route
from gateway.dialects.miosa.routes import FAMILIES, SOCKETS

_INTRODUCTION = f"""\
# The MIOSA API

What this server offers of it, below `{PREFIX}`. Every field is described in the OpenAPI document at \
`{PREFIX}/openapi.json`, with a page to browse it at `{PREFIX}/docs`. This page is printed from the same route table \
by `make docs`.

- **Keys** go into `Authorization: Bearer msk_live_…`. A key has scopes; the table names the one that a route asks \
for, `*` stands for any valid key, `–` for none at all.
- **Objects** come as `{{…object, "data": object}}`, **lists** as `{{"data": […], "page": {{…}}}}`, **errors** as \
[errors.md](errors.md) says.
- **Idempotency**: a change with an `Idempotency-Key` (any text) happens once. Repeated within 24 hours it gets the \
first answer again, byte for byte; the same key with another request is refused.
- **Rate**: `X-RateLimit-Limit`, `-Remaining` and `-Reset` are on every answer, `Retry-After` on a 429. All keys of a \
workspace share one budget.
- **Long commands** get their status line early and white space while they run, so that no timer in between expires; \
the JSON body follows when they end.
- The prefix may be missing or doubled, as some clients send it. An unknown route answers 404 in JSON.
"""


def as_markdown() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for family, routes in FAMILIES.items():
        parts.append(f"## {family}\n\n| route | scope | answers | what |\n|---|---|---|---|")
        parts.extend(_row(route) for route in routes)
        parts.append("")
    parts.append("## WebSockets\n\n| route | scope | what |\n|---|---|---|")
    parts.extend(f"| `{socket.path}` | {_scope(socket.scope)} | {_summary(socket.handler)} |" for socket in SOCKETS)
    return "\n".join(parts) + "\n"


def _row(route: Route) -> str:
    scope = "–" if route.terms.get("public") else _scope(route.scope)
    return f"| `{route.method} {route.path}` | {scope} | {_answer(route)} | {_summary(route.handler)} |"


def _scope(scope: str | None) -> str:
    return f"`{scope}`" if scope else "`*`"


def _answer(route: Route) -> str:
    kind = {"one": "object", "many": "list", "nothing": "", "raw": f"`{route.answer.media_type}`"}[route.answer.shape]
    return f"{route.answer.status} {kind}".rstrip()


def _summary(handler: object) -> str:
    return inspect.cleandoc(getattr(handler, "__doc__", None) or "").partition("\n")[0].replace("|", "\\|")


if __name__ == "__main__":
    print(as_markdown(), end="")
