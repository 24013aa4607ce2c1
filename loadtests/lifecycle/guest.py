"""Runs inside a sandbox: `python3 guest.py hold MIB` or `python3 guest.py write`.

hold: keep that many MiB of memory that no page is equal to another of, and answer HTTP on port 8000.
write: change memory and disk all the time, each change with its checksum, look again at earlier ones, and keep a
status file: `ticks` (changes so far) and `torn` (what was not as it had been written). Answers HTTP as well.

It is read as a text and sent to the sandbox, so it imports nothing of ours.
"""

from __future__ import annotations

import http.server
import json
import os
import pathlib
import sys
import threading
import time
import zlib

RECORDS = pathlib.Path("/workspace/records")
STATUS = pathlib.Path("/workspace/status.json")
BLOCK = 4096
BLOCKS = 256
RECORD = BLOCK + 12
RECORDS_KEPT = 64


class Answer(http.server.BaseHTTPRequestHandler):
    """Says `ok`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer any path."""
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


def serve() -> None:
    """Answer HTTP until the end."""
    http.server.ThreadingHTTPServer(("0.0.0.0", 8000), Answer).serve_forever()


def hold(mib: int) -> None:
    """Hold memory and serve."""
    kept = bytearray(mib << 20)
    for page in range(0, len(kept), BLOCK):
        kept[page : page + 16] = os.urandom(16)
    serve()


def sealed(number: int) -> bytes:
    """A block that says its number and carries its checksum."""
    content = number.to_bytes(8, "big") + bytes([number % 251]) * BLOCK
    return content + zlib.crc32(content).to_bytes(4, "big")


def opened(record: bytes) -> int | None:
    """The number of a sealed block, or None if it is torn."""
    content, checksum = record[:-4], int.from_bytes(record[-4:], "big")
    return int.from_bytes(content[:8], "big") if zlib.crc32(content) == checksum else None


def write() -> None:
    """Write and check until the end."""
    memory = [sealed(0)] * BLOCKS
    torn = 0
    with RECORDS.open("w+b", buffering=0) as disk:
        for number in range(1, 1 << 60):
            memory[number % BLOCKS] = sealed(number)
            disk.seek(number % RECORDS_KEPT * RECORD)
            disk.write(sealed(number))
            at = number * 7 % BLOCKS
            seen = opened(memory[at])
            torn += seen is None or (seen != 0 and seen % BLOCKS != at)
            # One of the slots written so far; slot 0 is written when the first round is over.
            at = 1 + number * 5 % min(number, RECORDS_KEPT - 1)
            disk.seek(at * RECORD)
            seen = opened(disk.read(RECORD))
            torn += seen is None or seen % RECORDS_KEPT != at
            draft = STATUS.with_suffix(".new")
            draft.write_text(json.dumps({"ticks": number, "torn": torn}))
            draft.rename(STATUS)
            time.sleep(0.002)


if __name__ == "__main__":
    if sys.argv[1] == "hold":
        hold(int(sys.argv[2]))
    else:
        threading.Thread(target=serve, daemon=True).start()
        write()
