"""Idempotency records: who may make an effect, what is replayed, and what survives a kill."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.errors import GatewayError
from gateway.idempotency import Answer, Claim, IdempotencyStore, check_key, fingerprint_of

ANSWER = Answer(201, (("content-type", "application/json"), ("location", "/x")), b'{"id": "1"}\n\x00tail')


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[IdempotencyStore]:
    store = IdempotencyStore(tmp_path / "lmdb", ttl_s=3600, answer_bytes_max=1000, clock=clock)
    yield store
    store.close()


async def claimed(store: IdempotencyStore, key: str = "k", fingerprint: str = "f") -> Claim:
    found = await store.claim("w", key, fingerprint, wait_s=0)
    assert isinstance(found, Claim)
    return found


async def code_of(store: IdempotencyStore, key: str = "k", fingerprint: str = "f", wait_s: float = 0) -> str:
    with pytest.raises(GatewayError) as caught:
        await store.claim("w", key, fingerprint, wait_s=wait_s)
    return caught.value.code


async def test_answer_is_replayed_byte_for_byte(store: IdempotencyStore) -> None:
    await (await claimed(store)).settle(ANSWER)

    assert await store.claim("w", "k", "f", wait_s=0) == ANSWER


async def test_same_key_of_another_workspace_is_another_key(store: IdempotencyStore) -> None:
    first = await claimed(store)
    other = await store.claim("w2", "k", "f", wait_s=0)

    assert isinstance(other, Claim)
    assert other.effect_id != first.effect_id


async def test_other_request_with_the_key_is_a_mismatch_even_while_it_runs(store: IdempotencyStore) -> None:
    claim = await claimed(store)
    assert await code_of(store, fingerprint="g") == "idempotency_mismatch"
    await claim.settle(ANSWER)

    assert await code_of(store, fingerprint="g") == "idempotency_mismatch"


async def test_duplicate_waits_for_the_first(store: IdempotencyStore) -> None:
    claim = await claimed(store)
    waiting = asyncio.create_task(store.claim("w", "k", "f", wait_s=10))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    await claim.settle(ANSWER)

    assert await waiting == ANSWER


async def test_duplicate_that_waits_in_vain_is_told_to_come_back(store: IdempotencyStore) -> None:
    await claimed(store)
    with pytest.raises(GatewayError) as caught:
        await store.claim("w", "k", "f", wait_s=0.05)

    assert caught.value.code == "idempotency_in_progress"
    assert caught.value.retry_after_s == 1.0


async def test_only_one_of_many_becomes_the_first(store: IdempotencyStore) -> None:
    async def attempt() -> Answer:
        found = await store.claim("w", "k", "f", wait_s=10)
        if isinstance(found, Answer):
            return found
        answer = Answer(200, (), found.effect_id.encode())
        await found.settle(answer)
        return answer

    answers = await asyncio.gather(*(attempt() for _ in range(50)))
    assert len(set(answers)) == 1


async def test_released_key_starts_afresh(store: IdempotencyStore) -> None:
    first = await claimed(store)
    await first.release()
    second = await claimed(store, fingerprint="other body")

    assert not second.is_retry
    assert second.effect_id != first.effect_id


async def test_reopened_key_goes_on_with_the_same_effect(store: IdempotencyStore) -> None:
    first = await claimed(store)
    await first.reopen()
    second = await claimed(store)

    assert second.is_retry
    assert second.effect_id == first.effect_id


async def test_abandoned_claim_is_taken_over_by_one(store: IdempotencyStore) -> None:
    first = await claimed(store)
    first.abandon()
    second = await claimed(store)

    assert second.effect_id == first.effect_id
    assert await code_of(store) == "idempotency_in_progress"
    await first.settle(Answer(500, (), b"late"))  # whose claim it is not any more
    await second.settle(ANSWER)
    assert await store.claim("w", "k", "f", wait_s=0) == ANSWER


async def test_cancelled_waiter_leaves_no_claim_behind(store: IdempotencyStore) -> None:
    task = asyncio.create_task(store.claim("w", "k", "f", wait_s=0))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert isinstance(await store.claim("w", "k", "f", wait_s=5), Claim)


async def test_too_large_answer_is_refused_later_and_never_made_again(store: IdempotencyStore) -> None:
    await (await claimed(store)).settle(Answer(200, (), b"x" * 1001))
    assert await code_of(store) == "conflict"

    await (await claimed(store, "k2")).settle(Answer(200, (), b"x" * 1000))
    assert isinstance(await store.claim("w", "k2", "f", wait_s=0), Answer)


async def test_record_expires_and_is_pruned(store: IdempotencyStore, clock: Clock) -> None:
    for number in range(10):
        await (await claimed(store, f"old {number}")).settle(ANSWER)
    clock.now += 3599
    assert await store.claim("w", "old 0", "f", wait_s=0) == ANSWER
    clock.now += 2

    assert not (await claimed(store, "old 0", "another body")).is_retry
    for number in range(3):
        await claimed(store, f"new {number}")
    entries = store._env.read(lambda txn: [txn.stat(store._records)["entries"], txn.stat(store._index)["entries"]])
    assert entries == [4, 4]


async def test_records_survive_reopening(tmp_path: Path) -> None:
    first = IdempotencyStore(tmp_path / "lmdb", ttl_s=3600, answer_bytes_max=1000)
    await (await claimed(first)).settle(ANSWER)
    first.close()
    second = IdempotencyStore(tmp_path / "lmdb", ttl_s=3600, answer_bytes_max=1000)

    assert await second.claim("w", "k", "f", wait_s=0) == ANSWER
    second.close()


@pytest.mark.parametrize("key", ["x", "a" * 255, "32 hex or not: ü/\\ \"'", "0"])
def test_any_key_up_to_255_characters_will_do(key: str) -> None:
    assert check_key(key) == key


@pytest.mark.parametrize("key", ["", "a" * 256])
def test_empty_or_longer_key_is_malformed(key: str) -> None:
    with pytest.raises(GatewayError) as caught:
        check_key(key)
    assert caught.value.code == "malformed"


def test_fingerprint_tells_parts_apart() -> None:
    assert fingerprint_of(b"ab", b"c") != fingerprint_of(b"a", b"bc")
    assert fingerprint_of(b"a", b"") != fingerprint_of(b"a")


KEYS = 500

#: A worker: goes through all keys in an order of its own. Making an effect is idempotent by effect id, as the engine's
#: is: the file is made once. It lies down in the middle so that kills hit every step.
WORKER = """
import asyncio, os, random, sys
from pathlib import Path
from gateway.idempotency import Answer, Claim, IdempotencyStore

async def main(lmdb, effects, count, seed):
    rng = random.Random(seed)
    store = IdempotencyStore(Path(lmdb), ttl_s=3600, answer_bytes_max=1000)
    async def one(number):
        found = await store.claim("w", f"key {number}", "f", wait_s=60)
        if isinstance(found, Claim):
            await asyncio.sleep(rng.random() * 0.02)
            path = Path(effects, found.effect_id)
            if not path.exists():
                draft = path.with_name(f".{os.getpid()}-{number}")
                draft.write_text(str(number))
                try:
                    os.link(draft, path)
                except FileExistsError:
                    pass
                draft.unlink()
            await asyncio.sleep(rng.random() * 0.02)
            await found.settle(Answer(201, (), found.effect_id.encode()))
    numbers = list(range(count))
    rng.shuffle(numbers)
    gate = asyncio.Semaphore(3)
    async def gated(number):
        async with gate:
            await one(number)
    await asyncio.gather(*(gated(number) for number in numbers))
    store.close()

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
"""


async def test_no_key_has_two_effects_however_often_workers_are_killed(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    effects = tmp_path / "effects"
    effects.mkdir()

    def start() -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-c", WORKER, str(tmp_path / "lmdb"), str(effects), str(KEYS), str(rng.random())]
        return subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})

    workers = [start() for _ in range(3)]
    kills = 0
    try:
        deadline = time.monotonic() + 120
        while not all(worker.poll() == 0 for worker in workers):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05 + rng.random() * 0.15)
            index = rng.randrange(len(workers))
            if kills < 12 and workers[index].poll() is None:
                workers[index].send_signal(signal.SIGKILL)
                workers[index].wait()
                kills += 1
            for place, worker in enumerate(workers):
                if worker.poll() not in {None, 0}:
                    assert worker.returncode == -signal.SIGKILL
                    workers[place] = start()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()

    made = [path for path in effects.iterdir() if not path.name.startswith(".")]
    assert sorted(int(path.read_text()) for path in made) == list(range(KEYS))
    store = IdempotencyStore(tmp_path / "lmdb", ttl_s=3600, answer_bytes_max=1000)
    by_number = {path.read_text(): path.name for path in made}
    for number in range(KEYS):
        answer = await store.claim("w", f"key {number}", "f", wait_s=0)
        assert isinstance(answer, Answer)
        assert answer.body.decode() == by_number[str(number)]
    store.close()
    assert kills >= 5
