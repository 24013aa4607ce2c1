"""One API worker: opens its parts when the server starts it, looks after them, closes them when it stops.

lifespan startup ─▶ parts open, background tasks run ─▶ requests ─▶ lifespan shutdown ─▶ changes end ─▶ parts close
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import orjson
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.children import settle_heap
from gateway.observability import metrics
from vmm.errors import VmmError
from vmm.types import PoolStatus

_log = logging.getLogger(__name__)

#: A background task that dies is started again after this long.
_RESTART_S = 1.0


#: Whether each thing that the worker depends on answers; a check must not wait long.
Checks = Mapping[str, Callable[[], Awaitable[bool]]]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a worker consists of: what answers requests, and what has to run all the time, by name."""

    entry: ASGIApp
    background: Mapping[str, Callable[[], Awaitable[None]]]


class Worker:
    """The ASGI application of one worker process. opening: makes the parts, and unmakes them in the end."""

    def __init__(self, opening: Callable[[], AbstractAsyncContextManager[Parts]]) -> None:
        self._opening = opening
        self._parts: Parts | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._parts is None:
            raise RuntimeError("a request came before the worker had started")
        else:
            await self._parts.entry(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            async with self._opening() as parts, _running(parts.background):
                self._parts = parts
                settle_heap()
                await send({"type": "lifespan.startup.complete"})
                await receive()
        except Exception as error:
            # The process ends without having served, and the supervisor shows the log.
            _log.exception("the worker could not start or stop in order")
            kind = "startup" if self._parts is None else "shutdown"
            await send({"type": f"lifespan.{kind}.failed", "message": str(error)})
            raise
        await send({"type": "lifespan.shutdown.complete"})


@contextlib.asynccontextmanager
async def _running(background: Mapping[str, Callable[[], Awaitable[None]]]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(_keep_running(name, start), name=name) for name, start in background.items()]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _keep_running(name: str, start: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await start()
            _log.error("the background task %s ended and is started again", name)
        except Exception:  # noqa: BLE001 - whatever it was, the worker needs the task
            _log.exception("the background task %s failed and is started again", name)
        await asyncio.sleep(_RESTART_S)


async def healthz(scope: Scope, receive: Receive, send: Send) -> None:
    """200 as long as the process answers. Public."""
    await _answer_json({"status": "ok"}, 200)(scope, receive, send)


def readyz(checks: Checks) -> ASGIApp:
    """200 when everything the worker depends on answers, else 503 with what does not. For the operator only."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        names = list(checks)
        results = await asyncio.gather(*(checks[name]() for name in names))
        answer = {"status": "ready" if all(results) else "not ready", **dict(zip(names, results, strict=True))}
        await _answer_json(answer, 200 if all(results) else 503)(scope, receive, send)

    return _for_operator(app)


def metrics_page(pools: Callable[[], Awaitable[Sequence[PoolStatus]]]) -> ASGIApp:
    """/metrics: the counts of all workers and of the host's pools, which a host that does not answer leaves out."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            stock = await pools()
        except VmmError as error:
            _log.warning("metrics without those of the pool: %s", error)
            stock = ()
        body = await asyncio.to_thread(metrics.render, stock)
        await Response(body, media_type="text/plain; version=0.0.4")(scope, receive, send)

    return _for_operator(app)


def _for_operator(app: ASGIApp) -> ASGIApp:
    """Only for requests that came by the admin listener: the plane strips the header from all others."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        is_operator = (b"x-sandgate-admin", b"1") in scope.get("headers", ())
        await (app if is_operator else _answer_json({"error": "not found"}, 404))(scope, receive, send)

    return guarded


def _answer_json(content: Mapping[str, object], status: int) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


async def every(seconds: float, actions: Sequence[Callable[[], object]]) -> None:
    """Call the actions, and await what they return if it can be awaited, again and again; once more when cancelled."""
    try:
        while True:
            await asyncio.sleep(seconds)
            await _call_all(actions)
    finally:
        await _call_all(actions)


async def _call_all(actions: Sequence[Callable[[], object]]) -> None:
    for action in actions:
        result = action()
        if isinstance(result, Awaitable):
            await result
