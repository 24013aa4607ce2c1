"""The phases every request goes through before its handler: authenticate, check the scope, limit.

Also the home of changes under way, which outlive the request that asked for them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import HTTPConnection
from starlette.responses import Response

from gateway.auth import Authenticator, require_scope
from gateway.errors import GatewayError
from gateway.idempotency import IdempotencyStore
from gateway.limits import Budget, Limits, rate_headers
from gateway.observability import metrics
from gateway.pipeline import ANONYMOUS, Dialect, Operation, SocketOperation
from gateway.resources import Principal
from gateway.undelivered import Undelivered
from previews.streams import REPORT

if TYPE_CHECKING:
    from gateway.engine import Engine

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Terms:
    """What the operator has set for all operations. budget: None for no rate limit."""

    request_timeout_s: float
    idempotency_wait_s: float
    budget: Budget | None
    is_access_logged: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to a request and, if it failed, why."""

    response: Response
    error: GatewayError | None = None


class RefusedError(Exception):
    """A caller whose key is good is refused; the answer carries these headers."""

    def __init__(self, error: GatewayError, headers: list[tuple[str, str]]) -> None:
        super().__init__(error)
        self.error = error
        self.headers = headers


class Phases:
    """What all endpoints share."""

    def __init__(
        self,
        *,
        engine: Engine,
        authenticator: Authenticator,
        limits: Limits,
        idempotency: IdempotencyStore,
        undelivered: Undelivered,
        terms: Terms,
    ) -> None:
        self.engine = engine
        self.authenticator = authenticator
        self.limits = limits
        self.idempotency = idempotency
        self.undelivered = undelivered
        self.terms = terms
        self._changes: set[asyncio.Task[Outcome]] = set()

    def start_change(self, work: Coroutine[None, None, Outcome]) -> asyncio.Task[Outcome]:
        """Run a change in a task of its own."""
        task = asyncio.get_running_loop().create_task(work)
        self._changes.add(task)
        task.add_done_callback(self._change_done)
        return task

    async def drain(self, timeout_s: float) -> None:
        """Let changes under way end, then cancel the rest: their keys can be taken over by another process."""
        if self._changes:
            _, late = await asyncio.wait(self._changes, timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def admit(
        self, connection: HTTPConnection, dialect: Dialect, operation: Operation | SocketOperation
    ) -> tuple[Principal, list[tuple[str, str]]]:
        """The caller, and the rate headers of the answer.

        Raises GatewayError for a caller without a valid key, RefusedError for one over the limit or without the scope.
        """
        if isinstance(operation, Operation) and operation.public:
            return ANONYMOUS, []
        resource = operation.ticket_resource
        principal = await self.authenticator.authenticate(
            dialect.credentials(connection),
            address=client_address(connection),
            ticket_purpose=operation.ticket_purpose,
            ticket_resource=None if resource is None else connection.path_params[resource],
        )
        headers: list[tuple[str, str]] = []
        try:
            if isinstance(operation, SocketOperation) or operation.limited:
                # What the plane reports belongs to a request that was counted.
                self._limit(principal, headers, is_new=REPORT not in connection.headers)
            require_scope(principal, operation.scope)
        except GatewayError as error:
            raise RefusedError(error, headers) from error
        return principal, headers

    def _limit(self, principal: Principal, headers: list[tuple[str, str]], *, is_new: bool) -> None:
        budget = self.terms.budget
        if budget is None:
            return
        decision = self.limits.take("workspace", principal.workspace_id, budget, is_new=is_new)
        headers += rate_headers(decision, now=time.time())
        if not decision.is_granted:
            metrics.RATE_LIMITED.inc()
            raise GatewayError(
                "rate_limited", "Too many requests in this workspace.", retry_after_s=decision.retry_after_s
            )

    def _change_done(self, task: asyncio.Task[Outcome]) -> None:
        self._changes.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Whoever waits for the task hears of it too; one whose caller has left would else fail in silence.
            _log.info("a change ended without an answer: %r", error)


def client_address(connection: HTTPConnection) -> str:
    """Whose connection it is, as the plane says it: the last address of X-Forwarded-For, which only the plane adds."""
    forwarded = connection.headers.get("x-forwarded-for", "")
    last = forwarded.rpartition(",")[2].strip()
    if last:
        return last
    return connection.client.host if connection.client is not None else ""


def unexpected(error: BaseException) -> GatewayError:
    """What the caller hears of a fault of ours; the log gets the fault itself."""
    metrics.UNEXPECTED.inc()
    _log.error("a request failed by a fault of ours", exc_info=error)
    return GatewayError("internal", "An internal error occurred; the request id finds it in the log.")
