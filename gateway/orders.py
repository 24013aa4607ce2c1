"""What an operator may tell a running supervisor: one JSON line in, one JSON line out, over a Unix socket.

    {"order": "restart plane"}  ──▶  {"pid": 123}    or    {"error": "…"}

Not for what a part can be told by itself: the plane has a control socket of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import orjson

from gateway.children import StartError

_log = logging.getLogger(__name__)

#: For an order to arrive once somebody has connected.
_ORDER_WITHIN_S = 10.0

Order = Callable[[], Awaitable[dict[str, Any]]]


class OrderError(Exception):
    """An order was not carried out; the message is fit for the operator."""


@contextlib.asynccontextmanager
async def taking_orders(path: Path, orders: Mapping[str, Order]) -> AsyncIterator[None]:
    """Take orders while the context lasts. An order that raises StartError is answered with its message."""

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        try:
            async with asyncio.timeout(_ORDER_WITHIN_S):
                asked = orjson.loads(await reader.readline())
            answer = await _carry_out(orders, asked)
            writer.write(orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE))
            await writer.drain()
        except (TimeoutError, OSError, ValueError) as error:
            _log.warning("an order was not understood: %s", error)
        finally:
            writer.close()

    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(serve, path)
    path.chmod(0o600)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


async def _carry_out(orders: Mapping[str, Order], asked: Any) -> dict[str, Any]:
    order = orders.get(asked.get("order", "")) if isinstance(asked, dict) else None
    if order is None:
        return {"error": "there is no such order"}
    try:
        return await order()
    except StartError as error:
        return {"error": str(error)}


async def give_order(path: Path, order: str) -> dict[str, Any]:
    """Tell the supervisor whose socket this is; its answer. Raises OrderError."""
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError as error:
        raise OrderError("no server runs here; use the settings that it was started with") from error
    try:
        writer.write(orjson.dumps({"order": order}, option=orjson.OPT_APPEND_NEWLINE))
        answer: dict[str, Any] = orjson.loads(await reader.readline())
    except (OSError, ValueError) as error:
        raise OrderError("the server went away") from error
    finally:
        writer.close()
    if "error" in answer:
        raise OrderError(answer["error"])
    return answer
