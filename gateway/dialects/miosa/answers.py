"""The shapes MIOSA answers come in.

One object is `{…object, "data": object}`: the specification and the TypeScript client read `data`, older Python clients
the object itself. A list has exactly the keys `data` and `page`; some clients unwrap it only then.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol, TypedDict, TypeVar

import orjson
from starlette.responses import Response

from gateway.resources import Page

T_co = TypeVar("T_co", covariant=True)


class Source(Protocol[T_co]):
    """What a stream is made of; closing it frees whatever it holds in the sandbox."""

    def __aiter__(self) -> AsyncIterator[T_co]: ...

    async def __anext__(self) -> T_co: ...

    async def aclose(self) -> None: ...


class Pagination(TypedDict):
    """Where a list stands."""

    page: int
    page_size: int
    total: int


def json_response(content: Any, status: int = 200) -> Response:
    """Any JSON value."""
    return Response(orjson.dumps(content), status, media_type="application/json")


def one(item: Mapping[str, Any], status: int = 200) -> Response:
    """One object, flat and under `data`."""
    return json_response({**item, "data": item}, status)


def many(page: Page[Any]) -> Response:
    """A page of objects."""
    pagination = Pagination(page=page.page, page_size=page.page_size, total=page.total)
    return json_response({"data": page.items, "page": pagination})


def whole(items: list[Any]) -> Page[Any]:
    """A short list that is never cut, as its only page."""
    return Page(tuple(items), page=1, page_size=max(len(items), 1), total=len(items))


def iso(moment: float | None) -> str | None:
    """Unix seconds as 2026-05-17T10:00:00.000Z."""
    return None if moment is None else iso_time(moment)


def iso_time(moment: float) -> str:
    """The same for a time that is always known."""
    text = dt.datetime.fromtimestamp(moment, dt.UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
