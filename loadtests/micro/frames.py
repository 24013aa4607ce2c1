"""The compiled frame codec against its plain twin.

    python -m loadtests.micro.frames [--rounds 9] [--json FILE]

Both decode and encode the same traffic in turns, A B A B, so that whatever else the machine does hits both. Reported
are processor seconds, the median of the rounds of each, and the ratio with its spread. Traffic:

    commands   the frames of short commands: REPLY, a line of output, two ENDs, the exit, as they arrive in one piece
    lines      DATA frames of 100 bytes in chunks of 64 KiB, a chatty process
    bulk       DATA frames of 64 KiB in chunks of 256 KiB, a fast process
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

DATA, END, REPLY, EVENT = 5, 6, 3, 8


def twin() -> ModuleType:
    """The oracle of the tests, loaded by its path: nothing imports `tests`."""
    spec = importlib.util.spec_from_file_location("twin_frames", ROOT / "tests" / "native" / "twin_frames.py")
    if spec is None or spec.loader is None:
        raise SystemExit("tests/native/twin_frames.py is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands(codec: Any) -> list[bytes]:
    reply = b'{"id":"0b6c0a52","pid":42,"started_at":1795303452.21,"resumed":false,"stdin_bytes":0}'
    exit_ = b'{"type":"exit","exit_code":0,"signal":null,"reason":"exited","duration_ms":7}'
    one = (
        codec.encode(REPLY, 0, 7, reply)
        + codec.encode_offset(DATA, 1, 7, 0, b"hello\n")
        + codec.encode_offset(END, 1, 7, 6)
        + codec.encode_offset(END, 2, 7, 0)
        + codec.encode(EVENT, 0, 7, exit_)
    )
    return [one] * 2_000


def lines(codec: Any) -> list[bytes]:
    return pieces(b"".join(codec.encode_offset(DATA, 1, 7, n * 100, bytes(100)) for n in range(20_000)), 64 * 1024)


def bulk(codec: Any) -> list[bytes]:
    block = bytes(64 * 1024)
    return pieces(b"".join(codec.encode_offset(DATA, 1, 7, n << 16, block) for n in range(500)), 256 * 1024)


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def decode(codec: Any, chunks: Sequence[bytes]) -> int:
    decoder = codec.FrameDecoder()
    return sum(len(decoder.feed(chunk)) for chunk in chunks)


def encode(codec: Any, _: Sequence[bytes]) -> int:
    return sum(len(codec.encode_offset(DATA, 0, n, n, b"x" * 64)) for n in range(10_000))


def seconds(work: Callable[[Any, Sequence[bytes]], int], codec: Any, chunks: Sequence[bytes]) -> float:
    start = time.process_time()
    work(codec, chunks)
    return time.process_time() - start


def compare(compiled: Any, plain: Any, rounds: int) -> dict[str, Any]:
    cases: dict[str, tuple[Callable[[Any, Sequence[bytes]], int], list[bytes]]] = {
        "decode commands": (decode, commands(compiled)),
        "decode lines": (decode, lines(compiled)),
        "decode bulk": (decode, bulk(compiled)),
        "encode": (encode, []),
    }
    return {name: case(work, chunks, compiled, plain, rounds) for name, (work, chunks) in cases.items()}


def case(
    work: Callable[[Any, Sequence[bytes]], int], chunks: Sequence[bytes], compiled: Any, plain: Any, rounds: int
) -> dict[str, Any]:
    if work(compiled, chunks) != work(plain, chunks):
        raise SystemExit("the codecs disagree: run the tests first")
    pairs = [(seconds(work, compiled, chunks), seconds(work, plain, chunks)) for _ in range(rounds)]
    compiled_s, plain_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "bytes": sum(map(len, chunks)),
        "compiled_s": compiled_s,
        "plain_s": plain_s,
        "ratio": plain_s / compiled_s,
        "ratio_least": min(plain / fast for fast, plain in pairs),
        "ratio_most": max(plain / fast for fast, plain in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = compare(importlib.import_module("native.frames"), twin(), arguments.rounds)
    for name, row in results.items():
        speed = f"{row['bytes'] / row['compiled_s'] / 1e6:8.0f} MB/s" if row["bytes"] else " " * 13
        spread = f"{row['ratio_least']:.1f} to {row['ratio_most']:.1f}"
        print(
            f"{name:16} compiled {row['compiled_s'] * 1e3:7.2f} ms {speed}   {row['ratio']:5.1f}× the twin ({spread})"
        )
    if arguments.json is not None:
        machine = {"python": platform.python_version(), "machine": platform.machine(), "rounds": arguments.rounds}
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
