"""Makes an ASGI application of a dialect's operation.

    request ─▶ admit ─▶ reads?   ─▶ handler, cancelled when the caller leaves ─▶ answer
                  │ └─▶ changes? ─▶ a task that outlives the caller:
                  │                   claim its idempotency key ─▶ handler ─▶ record ─▶ answer
                  └─▶ refused: the dialect's error answer

A change that has begun is finished whether or not its caller still waits: half a sandbox is of no use, and its answer
may be asked for again. What only reads is stopped instead.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from starlette.requests import ClientDisconnect, Request
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import Receive, Scope, Send

from gateway.delivery import Delivery, Watch, answer_of, caller_left, replay_of
from gateway.errors import GatewayError
from gateway.idempotency import Answer, Claim, check_key, fingerprint_of
from gateway.ids import uuid7
from gateway.observability import logs, metrics
from gateway.phases import Outcome, Phases, RefusedError, unexpected
from gateway.pipeline import REQUEST_ID, Call, Dialect, Operation
from gateway.resources import Principal
from gateway.sockets import SocketEndpoint
from gateway.undelivered import Undelivered

_log = logging.getLogger(__name__)
_access = logging.getLogger("gateway.access")

#: Errors that say "nothing was done": their idempotency key may be used afresh.
_NOTHING_DONE = frozenset({"rate_limited", "quota_exceeded", "no_capacity", "boot_failed"})

#: White space follows an early status this often; clients' read timeouts start at 30 s, some users set 10.
_HEARTBEAT_S = 5.0

#: Status in log and metrics of a request nobody waited for.
_CALLER_LEFT = 499


def routes(phases: Phases, dialect: Dialect) -> list[BaseRoute]:
    """Starlette routes for all rows of a dialect, in their order."""
    return [
        *(Route(row.path, Endpoint(phases, dialect, row), methods=[row.method]) for row in dialect.operations),
        *(WebSocketRoute(row.path, SocketEndpoint(phases, dialect, row)) for row in dialect.sockets),
    ]


class _CallerLeftError(Exception):
    """There is nobody to answer any more."""


class Endpoint:
    """One operation as an ASGI application."""

    def __init__(self, phases: Phases, dialect: Dialect, operation: Operation) -> None:
        self._phases = phases
        self._dialect = dialect
        self._operation = operation
        self._name = f"{operation.method} {operation.path}"
        self._seconds = metrics.REQUEST_SECONDS.labels(operation=self._name)

    @property
    def undelivered(self) -> Undelivered:
        return self._phases.undelivered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        request = Request(scope, receive)
        request_id = scope.get(REQUEST_ID) or str(uuid7())
        logs.request_id.set(request_id)
        delivery = Delivery(scope, receive, send)
        metrics.IN_FLIGHT.inc()
        try:
            outcome = await self._outcome(request, request_id, delivery)
            self._seconds.observe(time.perf_counter() - started)
            if delivery.is_begun and outcome.error is not None:
                late = self._dialect.error_response(outcome.error, request_id, status_sent=True)
                outcome = Outcome(late, outcome.error)
            await delivery.finish(outcome.response)
        except (_CallerLeftError, ClientDisconnect):
            delivery.status = _CALLER_LEFT
        finally:
            metrics.IN_FLIGHT.dec()
            self._note(delivery, started, scope)

    async def _outcome(self, request: Request, request_id: str, delivery: Delivery) -> Outcome:
        try:
            principal, delivery.headers = await self._phases.admit(request, self._dialect, self._operation)
            delivery.workspace_id = principal.workspace_id
            call = self._call(request, principal, request_id)
            return await (self._change(call, delivery) if self._operation.mutates else self._read(call))
        except RefusedError as refusal:
            delivery.headers = refusal.headers
            return self._failed(refusal.error, request_id)
        except GatewayError as error:
            return self._failed(error, request_id)
        except (_CallerLeftError, ClientDisconnect):
            raise
        except Exception as error:  # noqa: BLE001 - the outermost place that can still answer
            return self._failed(unexpected(error), request_id)

    def _call(self, request: Request, principal: Principal, request_id: str) -> Call:
        timeout_s = self._operation.timeout_s or self._phases.terms.request_timeout_s
        deadline = asyncio.get_running_loop().time() + timeout_s
        return Call(request, self._operation, principal, self._phases.engine, str(uuid7()), deadline, request_id)

    def _failed(self, error: GatewayError, request_id: str) -> Outcome:
        response = self._dialect.error_response(error, request_id)
        if error.retry_after_s is not None:
            response.headers.setdefault("retry-after", str(max(1, math.ceil(error.retry_after_s))))
        return Outcome(response, error)

    async def _read(self, call: Call) -> Outcome:
        """The handler in the request's own task; it is cancelled when the caller leaves."""
        watch = Watch(call.request.receive) if not self._operation.streams_body else None
        try:
            return await self._attempt(call)
        except asyncio.CancelledError:
            if watch is None or not watch.has_fired:
                raise
            metrics.ABANDONED.labels(outcome="cancelled").inc()
            raise _CallerLeftError from None
        finally:
            if watch is not None:
                watch.stop()

    async def _change(self, call: Call, delivery: Delivery) -> Outcome:
        """The handler in a task that ends when it ends; the caller gets what it answers, if still there."""
        if not self._operation.streams_body:
            await _receive_body(call)
        run = _Run(self, call)
        task = self._phases.start_change(run.work())
        # A handler that reads the body itself notices by itself that its caller has left.
        gone = None if self._operation.streams_body else asyncio.ensure_future(caller_left(call.request.receive))
        waiting = {task} if gone is None else {task, gone}
        early = self._operation.early_status
        try:
            while True:
                await asyncio.wait(
                    waiting,
                    timeout=None if early is None else _HEARTBEAT_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if task.done():
                    return task.result()
                if gone is not None and gone.done():
                    run.leave(task)
                    raise _CallerLeftError
                if early is not None and run.has_begun:
                    await delivery.heartbeat(early)
        finally:
            if gone is not None:
                gone.cancel()

    async def _attempt(self, call: Call, repeats: str | None = None) -> Outcome:
        """Call the handler within the deadline; any failure becomes an outcome."""
        try:
            async with asyncio.timeout_at(_loop_time(call.deadline)) as limit:
                if repeats is not None and (answer := await self._phases.undelivered.join(repeats)) is not None:
                    metrics.JOINED.inc()
                    return Outcome(replay_of(answer, is_replay=False))
                return Outcome(await self._operation.handler(call))
        except GatewayError as error:
            return self._failed(error, call.request_id)
        except ClientDisconnect:
            raise
        except TimeoutError as error:
            if not limit.expired():
                return self._failed(unexpected(error), call.request_id)
            return self._failed(GatewayError("timeout", "The request took too long."), call.request_id)
        except Exception as error:  # noqa: BLE001 - a handler's bug is one request's failure
            return self._failed(unexpected(error), call.request_id)

    async def work(self, call: Call, begin: Callable[[], None], repeats: str | None) -> Outcome:
        """A change from its idempotency key to its recorded answer. begin: called when its status can be foretold."""
        key = None if self._operation.streams_answer else call.request.headers.get("idempotency-key")
        if key is None:
            begin()
            return await self._attempt(call, repeats)
        try:
            found = await self._claim(call, check_key(key))
        except GatewayError as error:
            metrics.IDEMPOTENCY.labels(outcome="refused").inc()
            return self._failed(error, call.request_id)
        if isinstance(found, Answer):
            metrics.IDEMPOTENCY.labels(outcome="replayed").inc()
            return Outcome(replay_of(found, is_replay=True))
        metrics.IDEMPOTENCY.labels(outcome="resumed" if found.is_retry else "first").inc()
        call.effect_id = found.effect_id
        begin()
        return await self._claimed(call, found)

    async def _claim(self, call: Call, key: str) -> Claim | Answer:
        remaining_s = call.deadline - asyncio.get_running_loop().time()
        return await self._phases.idempotency.claim(
            call.principal.workspace_id,
            key,
            await self._fingerprint(call.request),
            wait_s=min(self._phases.terms.idempotency_wait_s, remaining_s),
        )

    async def _claimed(self, call: Call, claim: Claim) -> Outcome:
        try:
            outcome = await self._attempt(call)
        except ClientDisconnect:
            await claim.reopen()
            raise
        except BaseException:
            claim.abandon()
            raise
        try:
            await _record(claim, outcome)
        except Exception:  # noqa: BLE001 - a full disk, say
            # The effect is made and the caller shall hear of it; a repeat finds the claim abandoned and asks for the
            # same effect again.
            _log.exception("an answer could not be recorded for its idempotency key")
        return outcome

    async def repeat_fingerprint(self, call: Call) -> str | None:
        """What a repeat of this request would have in common with it; None where that does not matter."""
        is_possible = self._operation.is_repeat_possible
        if is_possible is None or "idempotency-key" in call.request.headers or not is_possible(call.request):
            return None
        principal = call.principal
        caller = f"{principal.workspace_id}/{principal.key_id}".encode()
        return fingerprint_of(caller, (await self._fingerprint(call.request)).encode())

    async def _fingerprint(self, request: Request) -> str:
        operation = self._operation
        parts = [self._dialect.name, operation.method, operation.path, *request.path_params.values()]
        if operation.streams_body:
            body = request.headers.get("content-length", "").encode()
        else:
            body = await request.body()
        return fingerprint_of(*(str(part).encode() for part in parts), request.scope["query_string"], body)

    def _note(self, delivery: Delivery, started: float, scope: Scope) -> None:
        metrics.REQUESTS.labels(dialect=self._dialect.name, operation=self._name, status=str(delivery.status)).inc()
        if self._phases.terms.is_access_logged:
            _access.info(
                "%s %s %d",
                scope["method"],
                scope["path"],
                delivery.status,
                extra={
                    "status": delivery.status,
                    "operation": self._name,
                    "workspace_id": delivery.workspace_id,
                    "duration_ms": round((time.perf_counter() - started) * 1000, 2),
                },
            )


class _Run:
    """One change under way."""

    def __init__(self, endpoint: Endpoint, call: Call) -> None:
        self._endpoint = endpoint
        self._call = call
        self._repeats: str | None = None
        self.has_begun = False

    async def work(self) -> Outcome:
        self._repeats = await self._endpoint.repeat_fingerprint(self._call)
        return await self._endpoint.work(self._call, self._begin, self._repeats)

    def leave(self, task: asyncio.Task[Outcome]) -> None:
        """The caller has gone; the change goes on and its answer waits for a repeat, if one may come."""
        metrics.ABANDONED.labels(outcome="finished").inc()
        repeats = self._repeats
        if repeats is None:
            return
        undelivered = self._endpoint.undelivered
        undelivered.leave(repeats)
        task.add_done_callback(lambda done: undelivered.finish(repeats, _undelivered_answer(done)))

    def _begin(self) -> None:
        self.has_begun = True


async def _receive_body(call: Call) -> None:
    """Read the body; `call.request.body()` has it from now on. Raises timeout, or what the entry's limit raises."""
    try:
        async with asyncio.timeout_at(_loop_time(call.deadline)):
            await call.request.body()
    except TimeoutError as error:
        raise GatewayError("timeout", "The body of the request did not arrive in time.") from error


def _loop_time(deadline: float) -> float | None:
    return None if math.isinf(deadline) else deadline


async def _record(claim: Claim, outcome: Outcome) -> None:
    error = outcome.error
    answer = answer_of(outcome.response)
    if error is not None and error.code in _NOTHING_DONE:
        await claim.release()
    elif answer is None or (error is not None and (error.retryable or error.source != "caller")):
        # What became of the effect is not known, or its answer was a stream: ask for the same effect again.
        await claim.reopen()
    else:
        await claim.settle(answer)


def _undelivered_answer(done: asyncio.Task[Outcome]) -> Answer | None:
    if done.cancelled() or done.exception() is not None or done.result().error is not None:
        return None
    return answer_of(done.result().response)
