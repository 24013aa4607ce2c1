"""Page numbers in all their spellings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta
from starlette.requests import HTTPConnection

from gateway.dialects.miosa import clients
from gateway.dialects.miosa.decode import first
from gateway.errors import invalid
from gateway.resources import Page

PAGE_SIZE = 20
PAGE_SIZE_MAX = 100

_Size = Annotated[int, Meta(ge=1, le=PAGE_SIZE_MAX)]

T = TypeVar("T")
U = TypeVar("U")


class PageQuery(msgspec.Struct, kw_only=True):
    """`page` with `page_size`, `per_page` or `limit`; or `offset` with `limit`."""

    page: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    page_size: _Size | None = None
    per_page: _Size | None = None
    limit: _Size | None = None
    offset: Annotated[int, Meta(ge=0, le=100_000_000)] | None = None


def page(connection: HTTPConnection, query: PageQuery) -> tuple[int, int]:
    """The page and its size that a request asks for.

    Client libraries list without paging parameters and would silently see 20: they get the largest page instead.
    """
    size = first(query.page_size, query.per_page, query.limit)
    if size is None:
        asks = query.page is not None or query.offset is not None
        size = PAGE_SIZE if asks or not clients.is_library(connection) else PAGE_SIZE_MAX
    if query.offset is None:
        return first(query.page, 1), size
    if query.offset % size:
        raise invalid("offset", f"must be a multiple of the page size ({size})")
    return query.offset // size + 1, size


def encode(found: Page[T], convert: Callable[[T], U]) -> Page[U]:
    """The same page with its items in MIOSA's words."""
    return Page(tuple(convert(item) for item in found.items), found.page, found.page_size, found.total)
