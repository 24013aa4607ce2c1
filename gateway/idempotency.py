"""One effect per idempotency key, whatever dies in between.

    (no record) ──claim──▶ running ──settle──▶ done            replayed byte for byte until it expires
                              │ ▲                │
                  reopen or   │ │ claim with     └─ too large: refused, never run again
             owner has died   ▼ │ the same effect id
                             open
    running ──release──▶ (no record)                           nothing happened: a retry starts afresh

A record is on disk before its effect starts. It holds the effect id that the handler passes down, and engine, hostd
and agent do nothing twice for one effect id: an effect whose process died before the answer was recorded is asked for
again, not made again.

Records are stored under their effect id, a UUID version 7, so that writes append and expiry is a scan from the front;
an index leads from the caller's key there. Both live in LMDB, shared by all workers (gateway/shared.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lmdb
import orjson

from gateway.errors import GatewayError
from gateway.ids import uuid7, uuid7_unix_s
from gateway.owners import Owner, current_owner
from gateway.shared import Durable

#: Longest key a caller may choose.
KEY_CHARS_MAX = 255

#: Waiters look again after this long, doubling up to the second.
_POLL_FIRST_S, _POLL_LAST_S = 0.005, 0.1

#: Expired records removed along with one write, at most: more than one is made, so a backlog shrinks.
_PRUNE_PER_WRITE = 4

#: Claims of this process whose handlers still run; a claim of ours that is missing here was abandoned.
_live_claims: set[str] = set()


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished response: what a replay has to reproduce."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class _Record:
    state: Literal["running", "open", "done", "too_large"]
    fingerprint: str
    index_key: str
    owner: str
    claim_id: str
    answer: Answer | None = None

    def encode(self) -> bytes:
        head: dict[str, Any] = {
            "state": self.state,
            "fingerprint": self.fingerprint,
            "index_key": self.index_key,
            "owner": self.owner,
            "claim_id": self.claim_id,
        }
        if self.answer is None:
            return orjson.dumps(head) + b"\n"
        head["status"] = self.answer.status
        head["headers"] = self.answer.headers
        return orjson.dumps(head) + b"\n" + self.answer.body

    @classmethod
    def decode(cls, raw: bytes) -> _Record:
        line, _, body = raw.partition(b"\n")
        head = orjson.loads(line)
        answer = None
        if "status" in head:
            answer = Answer(head.pop("status"), tuple((name, value) for name, value in head.pop("headers")), body)
        return cls(**head, answer=answer)

    def is_abandoned(self) -> bool:
        """Whether nobody works on it any more."""
        if self.state == "open":
            return True
        owner = Owner.decode(self.owner)
        if owner == current_owner():
            return self.claim_id not in _live_claims
        return not owner.is_alive()


@dataclass(frozen=True, slots=True)
class _Busy:
    """Somebody else works on it."""


class Claim:
    """The right to make the effect of one key. Ends with exactly one of settle, release and reopen.

    effect_id: what the handler passes down; is_retry: an earlier attempt may have made the effect already.
    """

    def __init__(self, store: IdempotencyStore, effect: uuid.UUID, record: _Record, *, is_retry: bool) -> None:
        self._store = store
        self._effect = effect
        self._record = record
        self.effect_id = str(effect)
        self.is_retry = is_retry

    async def settle(self, answer: Answer) -> None:
        """Record the answer; returns when it is on disk."""
        if len(answer.body) > self._store.answer_bytes_max:
            await self._end(_with_state(self._record, "too_large"))
        else:
            await self._end(_with_state(self._record, "done", answer))

    async def reopen(self) -> None:
        """The outcome is unknown: the next request with this key goes on with the same effect id."""
        await self._end(_with_state(self._record, "open"))

    async def release(self) -> None:
        """Nothing happened: forget the key."""
        await self._end(None)

    async def _end(self, record: _Record | None) -> None:
        try:
            await self._store.replace(self._effect, self._record, record)
        finally:
            _live_claims.discard(self._record.claim_id)

    def abandon(self) -> None:
        """Leave the record as if this process had died; used when the handler was cancelled."""
        _live_claims.discard(self._record.claim_id)


class IdempotencyStore:
    """The records of all workspaces.

    clock: Unix seconds, for expiry.
    """

    def __init__(
        self, path: Path, *, ttl_s: float, answer_bytes_max: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._env = Durable(path, ("records", "index"))
        self._records = self._env.database("records")
        self._index = self._env.database("index")
        self._ttl_s = ttl_s
        self._clock = clock
        self.answer_bytes_max = answer_bytes_max

    def close(self) -> None:
        """Write what waits and close the files."""
        self._env.close()

    async def claim(self, workspace_id: str, key: str, fingerprint: str, *, wait_s: float) -> Claim | Answer:
        """Become the one who makes the effect, or get the answer of who did.

        fingerprint: hex digest of the request; the same key with another one is a mistake of the caller.
        wait_s: how long to wait for a first request that still runs.
        Raises GatewayError idempotency_mismatch, idempotency_in_progress, or conflict for an answer too large to keep.
        """
        index_key = _index_key(workspace_id, key)
        until = time.monotonic() + wait_s
        pause_s = _POLL_FIRST_S
        while True:
            seen = self._env.read(lambda transaction: self._look_up(transaction, index_key, fingerprint))
            found = await self._try_claim(index_key, fingerprint) if seen is None else seen
            if not isinstance(found, _Busy):
                return found
            if time.monotonic() + pause_s > until:
                raise GatewayError(
                    "idempotency_in_progress",
                    "The first request with this Idempotency-Key has not finished.",
                    retry_after_s=1.0,
                )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _POLL_LAST_S)

    async def replace(self, effect: uuid.UUID, held: _Record, record: _Record | None) -> None:
        """Put `record` (None: nothing) in the place of one this process holds. Does nothing if it is not held any more.

        A holder loses its claim only by the clock: when the record expired under it.
        """
        await self._env.write(lambda transaction: self._replace(transaction, effect, held, record))

    async def _try_claim(self, index_key: bytes, fingerprint: str) -> Claim | Answer | _Busy:
        claim_id = uuid.uuid4().hex
        # Before the record can be seen: another task must not take it for abandoned.
        _live_claims.add(claim_id)
        taken = False
        try:
            found = await self._env.write(
                lambda transaction: self._claim(transaction, index_key, fingerprint, claim_id)
            )
            taken = isinstance(found, Claim)
            return found
        finally:
            if not taken:
                _live_claims.discard(claim_id)

    def _load(self, transaction: lmdb.Transaction, index_key: bytes) -> tuple[uuid.UUID, _Record] | None:
        storage_key = transaction.get(index_key, db=self._index)
        if storage_key is None or self._is_expired(bytes(storage_key)):
            return None
        raw = transaction.get(bytes(storage_key), db=self._records)
        return None if raw is None else (uuid.UUID(bytes=bytes(storage_key)), _Record.decode(bytes(raw)))

    def _look_up(self, transaction: lmdb.Transaction, index_key: bytes, fingerprint: str) -> Answer | _Busy | None:
        """What there is to say about a key; None if it can be claimed."""
        found = self._load(transaction, index_key)
        if found is None:
            return None
        record = found[1]
        if record.fingerprint != fingerprint:
            raise GatewayError(
                "idempotency_mismatch", "This Idempotency-Key was used before with another method, path or body."
            )
        if record.state == "too_large":
            raise GatewayError(
                "conflict", "The request with this Idempotency-Key has been done; its answer was too large to keep."
            )
        if record.answer is not None:
            return record.answer
        return None if record.is_abandoned() else _Busy()

    def _claim(
        self, transaction: lmdb.Transaction, index_key: bytes, fingerprint: str, claim_id: str
    ) -> Claim | Answer | _Busy:
        self._prune(transaction)
        seen = self._look_up(transaction, index_key, fingerprint)
        if seen is not None:
            return seen
        found = self._load(transaction, index_key)
        effect = uuid7(now_ns=int(self._clock() * 1e9)) if found is None else found[0]
        record = _Record("running", fingerprint, index_key.hex(), current_owner().encode(), claim_id)
        transaction.put(effect.bytes, record.encode(), db=self._records)
        transaction.put(index_key, effect.bytes, db=self._index)
        return Claim(self, effect, record, is_retry=found is not None)

    def _replace(self, transaction: lmdb.Transaction, effect: uuid.UUID, held: _Record, record: _Record | None) -> None:
        raw = transaction.get(effect.bytes, db=self._records)
        if raw is None or _Record.decode(bytes(raw)).claim_id != held.claim_id:
            return
        if record is None:
            self._delete(transaction, effect.bytes, bytes.fromhex(held.index_key))
        else:
            transaction.put(effect.bytes, record.encode(), db=self._records)

    def _prune(self, transaction: lmdb.Transaction) -> None:
        with transaction.cursor(db=self._records) as cursor:
            for _ in range(_PRUNE_PER_WRITE):
                if not cursor.first() or not self._is_expired(storage_key := bytes(cursor.key())):
                    return
                index_key = bytes.fromhex(_Record.decode(bytes(cursor.value())).index_key)
                self._delete(transaction, storage_key, index_key)

    def _delete(self, transaction: lmdb.Transaction, storage_key: bytes, index_key: bytes) -> None:
        transaction.delete(storage_key, db=self._records)
        # Only if the key has not been used anew since.
        if transaction.get(index_key, db=self._index) == storage_key:
            transaction.delete(index_key, db=self._index)

    def _is_expired(self, storage_key: bytes) -> bool:
        return uuid7_unix_s(storage_key) + self._ttl_s < self._clock()


def check_key(key: str) -> str:
    """The key as given. Raises GatewayError malformed if it is empty or too long; any other string will do."""
    if not key or len(key) > KEY_CHARS_MAX:
        raise GatewayError("malformed", f"Idempotency-Key must have 1 to {KEY_CHARS_MAX} characters.")
    return key


def fingerprint_of(*parts: bytes) -> str:
    """Hex digest of a request's parts; no two different lists of parts have the same."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.hexdigest()


def _index_key(workspace_id: str, key: str) -> bytes:
    return bytes.fromhex(fingerprint_of(workspace_id.encode(), key.encode()))


def _with_state(
    record: _Record, state: Literal["running", "open", "done", "too_large"], answer: Answer | None = None
) -> _Record:
    return _Record(state, record.fingerprint, record.index_key, record.owner, record.claim_id, answer)
