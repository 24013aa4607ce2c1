"""LMDB environments: batches, failures inside a batch, growth."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.shared import Durable, Volatile


async def test_failure_of_one_write_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    env = Durable(tmp_path / "e", ("d",))
    db = env.database("d")

    def fail(_transaction: object) -> None:
        raise KeyError("no")

    results = await asyncio.gather(
        env.write(lambda txn: txn.put(b"a", b"1", db=db)),
        env.write(fail),
        env.write(lambda txn: txn.put(b"b", b"2", db=db)),
        return_exceptions=True,
    )

    assert [type(result) for result in results] == [bool, KeyError, bool]
    assert env.read(lambda txn: (bytes(txn.get(b"a", db=db)), bytes(txn.get(b"b", db=db)))) == (b"1", b"2")
    env.close()


@pytest.mark.parametrize("kind", [Durable, Volatile])
async def test_map_grows_when_it_is_full_and_others_follow(tmp_path: Path, kind: type) -> None:
    first = kind(tmp_path / "e", ("d",), map_bytes=128 * 1024)
    follower = (
        "import sys, time\n"
        "from pathlib import Path\n"
        f"from gateway.shared import {kind.__name__} as Kind\n"
        "env = Kind(Path(sys.argv[1]), ('d',), map_bytes=128 * 1024)\n"
        "print('open', flush=True)\n"
        "sys.stdin.readline()\n"
        "count = env.read(lambda txn: txn.stat(env.database('d'))['entries'])\n"
        "print(count, flush=True)\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", follower, str(tmp_path / "e")),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"open\n"
    for number in range(200):
        written = first.write(lambda txn, number=number: txn.put(b"%d" % number, b"x" * 10_000, db=first.database("d")))
        if asyncio.iscoroutine(written):
            await written
    out, _ = await process.communicate(b"\n")

    assert out == b"200\n"
    assert process.returncode == 0
    first.close()
