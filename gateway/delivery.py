"""How an answer reaches its caller, what of it can be kept, and how a caller's leaving is noticed."""

from __future__ import annotations

import asyncio

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway.idempotency import Answer
from previews.streams import HEADER

#: A read that takes longer is watched for its caller's leaving; looking earlier would cost every request a task.
_WATCH_AFTER_S = 1.0

#: Headers of an answer that belong to one delivery of it and are not part of a replay.
_PER_DELIVERY = frozenset({b"content-length", b"date", b"server", b"x-request-id", b"retry-after"})


class Delivery:
    """How an answer reaches its caller: at once, or after an early status and heartbeats.

    headers: added to whatever is answered. status: what was sent, 0 before. workspace_id: of the caller, once known.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self.headers: list[tuple[str, str]] = []
        self.workspace_id = ""
        self.status = 0
        self.is_begun = False

    async def heartbeat(self, status: int) -> None:
        """Send the status, if it has not gone out yet, and a space, which JSON ignores."""
        if not self.is_begun:
            self.is_begun = True
            self.status = status
            headers = [*self._raw_headers(), (b"content-type", b"application/json"), (b"cache-control", b"no-store")]
            await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": b" ", "more_body": True})

    async def finish(self, response: Response) -> None:
        """Send the answer, or what is left of it after an early status."""
        if self.is_begun:
            await self._send({"type": "http.response.body", "body": bytes(response.body), "more_body": False})
            return
        self.status = response.status_code
        response.raw_headers.extend(self._raw_headers())
        await response(self._scope, self._receive, self._send)

    def _raw_headers(self) -> list[tuple[bytes, bytes]]:
        return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self.headers]


class Watch:
    """Cancels the current task when its caller leaves."""

    def __init__(self, receive: Receive) -> None:
        self.has_fired = False
        self._receive = receive
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(_WATCH_AFTER_S, self._start)

    def stop(self) -> None:
        """Stop looking; whoever sends the answer may want to look by itself."""
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()

    def _start(self) -> None:
        self._watcher = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        await caller_left(self._receive)
        self.has_fired = True
        if self._task is not None:
            self._task.cancel()


async def caller_left(receive: Receive) -> None:
    """Return once the caller has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def answer_of(response: Response) -> Answer | None:
    """What can be replayed of a response; None for a stream and for what the plane is ordered to do."""
    if isinstance(response, StreamingResponse) or not hasattr(response, "body") or HEADER in response.headers:
        return None
    headers = tuple(
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in response.raw_headers
        if name not in _PER_DELIVERY
    )
    return Answer(response.status_code, headers, bytes(response.body))


def replay_of(answer: Answer, *, is_replay: bool) -> Response:
    """The same response again. is_replay: say so in a header."""
    response = Response(answer.body, answer.status)
    response.raw_headers = [
        (b"content-length", str(len(answer.body)).encode()),
        *((name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers),
    ]
    if answer.status == 204:  # which must not have a length
        del response.raw_headers[0]
    if is_replay:
        response.raw_headers.append((b"idempotency-replayed", b"true"))
    return response
