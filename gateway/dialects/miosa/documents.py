"""The OpenAPI document of what is served, and a page to browse it. Both need no key."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Callable, Mapping
from typing import Any

import orjson
from starlette.responses import Response

from gateway.dialects.miosa import openapi
from gateway.dialects.miosa.route import Answer, Route
from gateway.pipeline import Call

#: The page runs its own script and asks its own server for the document, nothing else.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PUBLIC: dict[str, Any] = {"public": True, "limited": False}


def routes(families: Callable[[], Mapping[str, tuple[Route, ...]]]) -> tuple[Route, ...]:
    """The routes of the document and the page. families: the whole table, these rows too, asked for when served."""

    @functools.cache
    def document() -> bytes:
        return orjson.dumps(openapi.document(families()))

    async def openapi_json(call: Call) -> Response:  # noqa: ARG001
        """The OpenAPI 3.1 document."""
        return Response(document(), media_type="application/json", headers={"cache-control": "public, max-age=300"})

    return (
        Route("GET", "/openapi.json", openapi_json, Answer("raw"), terms=_PUBLIC),
        Route("GET", "/docs", _page, Answer("raw", media_type="text/html"), terms=_PUBLIC),
        Route("GET", "/docs/docs.css", _style, Answer("raw", media_type="text/css"), terms=_PUBLIC),
        Route("GET", "/docs/docs.js", _script, Answer("raw", media_type="text/javascript"), terms=_PUBLIC),
    )


@functools.cache
def _asset(name: str) -> bytes:
    return (importlib.resources.files(__package__) / "page" / name).read_bytes()


async def _page(call: Call) -> Response:  # noqa: ARG001
    """A page to browse the OpenAPI document."""
    headers = {"content-security-policy": _PAGE_POLICY}
    return Response(_asset("docs.html"), media_type="text/html", headers=headers)


async def _style(call: Call) -> Response:  # noqa: ARG001
    """The page's style."""
    return Response(_asset("docs.css"), media_type="text/css")


async def _script(call: Call) -> Response:  # noqa: ARG001
    """The page's script."""
    return Response(_asset("docs.js"), media_type="text/javascript")
