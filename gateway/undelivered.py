"""Answers whose caller left before they were ready, kept for the repeat of the same request.

Some clients repeat a POST after a timeout, without an idempotency key. The first run goes on when its caller has left;
its repeat should get that run's answer, not start a second run. Only requests that were left are noted here, so two
callers who both wait for their own run of the same command never share one.

    left ──▶ running ──▶ done ──▶ taken by one repeat, or gone after KEEP_S
                │ failed, or its process died
                └──▶ gone
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import orjson

from gateway.idempotency import Answer
from gateway.owners import Owner, current_owner
from gateway.shared import Volatile

#: Clients repeat within seconds; a caller who comes later means a new run.
KEEP_S = 30.0

_POLL_FIRST_S, _POLL_LAST_S = 0.02, 0.25


class Undelivered:
    """The requests that were left, for all workers. clock: Unix seconds."""

    def __init__(self, path: Path, *, answer_bytes_max: int, clock: Callable[[], float] = time.time) -> None:
        self._env = Volatile(path, ("runs",))
        self._runs = self._env.database("runs")
        self._answer_bytes_max = answer_bytes_max
        self._clock = clock

    def close(self) -> None:
        """Close the files."""
        self._env.close()

    def leave(self, fingerprint: str) -> None:
        """The caller has left; the run goes on in this process."""
        self._put(fingerprint, {"owner": current_owner().encode()})

    def finish(self, fingerprint: str, answer: Answer | None) -> None:
        """The run that was left has ended; None if it failed."""
        if answer is None or len(answer.body) > self._answer_bytes_max:
            self._env.write(lambda transaction: transaction.delete(fingerprint.encode(), db=self._runs))
            return
        head = {"status": answer.status, "headers": answer.headers, "expires_at": self._clock() + KEEP_S}
        self._put(fingerprint, head, answer.body)

    async def join(self, fingerprint: str) -> Answer | None:
        """The answer of an abandoned identical run, waiting for it if need be; None if there is none to be had."""
        pause_s = _POLL_FIRST_S
        while True:
            head, _ = self._env.read(lambda transaction: self._get(transaction, fingerprint))
            if head is None:
                return None
            if "owner" not in head:
                return self._env.write(lambda transaction: self._take(transaction, fingerprint))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _POLL_LAST_S)

    def sweep(self) -> None:
        """Remove what nobody came for."""
        self._env.write(self._sweep)

    def _put(self, fingerprint: str, head: dict[str, Any], body: bytes = b"") -> None:
        value = orjson.dumps(head) + b"\n" + body
        self._env.write(lambda transaction: transaction.put(fingerprint.encode(), value, db=self._runs))

    def _get(self, transaction: lmdb.Transaction, fingerprint: str) -> tuple[dict[str, Any] | None, bytes]:
        raw = transaction.get(fingerprint.encode(), db=self._runs)
        if raw is None:
            return None, b""
        line, _, body = bytes(raw).partition(b"\n")
        head = orjson.loads(line)
        return (None, b"") if self._is_over(head) else (head, body)

    def _take(self, transaction: lmdb.Transaction, fingerprint: str) -> Answer | None:
        head, body = self._get(transaction, fingerprint)
        if head is None or "owner" in head:
            return None
        transaction.delete(fingerprint.encode(), db=self._runs)
        return Answer(head["status"], tuple((name, value) for name, value in head["headers"]), body)

    def _sweep(self, transaction: lmdb.Transaction) -> None:
        with transaction.cursor(db=self._runs) as cursor:
            is_at_key = cursor.first()
            while is_at_key:
                head = orjson.loads(bytes(cursor.value()).partition(b"\n")[0])
                is_at_key = cursor.delete() if self._is_over(head) else cursor.next()

    def _is_over(self, head: dict[str, Any]) -> bool:
        if "owner" in head:
            return not Owner.decode(head["owner"]).is_alive()
        return bool(head["expires_at"] < self._clock())
