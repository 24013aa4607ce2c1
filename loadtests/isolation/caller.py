"""A caller of the API that does not mind parts of the server dying, and sandboxes that say who they are."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from loadtests.http import Answer, Connection, UnexpectedAnswer
from loadtests.server import Target

PORT = 8000
_PATIENCE_S = 120.0
_PAUSE_S = 0.2
#: What a part that is down makes of a request; it is sent again with the same idempotency key.
_PASSING = frozenset({409, 425, 429, 500, 502, 503, 504})

#: Answers everything with the argument, which is the sandbox's id.
_PROGRAM = f"""
import asyncio, sys
body = sys.argv[1].encode()
answer = b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%b" % (len(body), body)
class Server(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.pending = transport, b""
    def data_received(self, data):
        self.pending += data
        while b"\\r\\n\\r\\n" in self.pending:
            self.pending = self.pending.partition(b"\\r\\n\\r\\n")[2]
            self.transport.write(answer)
async def main():
    server = await asyncio.get_running_loop().create_server(Server, "0.0.0.0", {PORT})
    await server.serve_forever()
asyncio.run(main())
"""


@dataclass(frozen=True, slots=True)
class Speaker:
    """A sandbox whose preview answers with its id."""

    id: str
    preview_id: str
    host: str


async def call(target: Target, method: str, path: str, body: Any = None, *, expect: int = 200) -> Answer:
    """One call of the API, repeated until it has an answer that asking again would not change."""
    headers = {} if method == "GET" else {"Idempotency-Key": str(uuid.uuid4())}
    last: Exception | None = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                try:
                    async with Connection(target.base_url, target.key, timeout_s=30) as api:
                        return await api.call(method, path, body, expect=expect, headers=headers)
                except UnexpectedAnswer as error:
                    if not any(f": {status} instead" in str(error) for status in _PASSING):
                        raise
                    last = error
                except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                    last = error
                await asyncio.sleep(_PAUSE_S)
    raise RuntimeError(f"{method} {path} did not work out") from last


async def make_speaker(target: Target) -> Speaker:
    """A new sandbox that already answers."""
    made = (await call(target, "POST", "/sandboxes", {"memory_mb": 256, "timeout_sec": 3600}, expect=201)).json()
    base = f"/sandboxes/{made['id']}"
    await call(target, "POST", f"{base}/fs/write", {"path": "/workspace/speaker.py", "content": _PROGRAM})
    await call(
        target, "POST", f"{base}/processes", {"command": f"python3 /workspace/speaker.py {made['id']}"}, expect=201
    )
    answer = await call(target, "POST", f"{base}/previews", {"port": PORT, "visibility": "public"}, expect=201)
    preview = answer.json()
    speaker = Speaker(made["id"], preview["id"], urlsplit(preview["url"]).netloc)
    async with asyncio.timeout(_PATIENCE_S):
        while await ask(target, speaker) != (200, speaker.id):
            await asyncio.sleep(_PAUSE_S)
    return speaker


async def ask(target: Target, speaker: Speaker) -> tuple[int, str]:
    """Status and body of a speaker's preview; status 0 when nobody answers."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(target.base_url).port)
        try:
            async with asyncio.timeout(30):
                writer.write(f"GET / HTTP/1.1\r\nHost: {speaker.host}\r\nConnection: close\r\n\r\n".encode())
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
    except (OSError, TimeoutError):
        return 0, ""
    return int(head.split(b" ", 2)[1] or 0) if head else 0, body.decode(errors="replace")
