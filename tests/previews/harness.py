"""A real plane with scripted peers: what the tests of this package share."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import ssl
import uuid
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from native import plane_path
from previews.plane import PlaneClient
from previews.routes import PortRoute, SandboxRoute
from previews.streams import BODY, HELD

#: Bounds every wait; nothing here takes that long unless it fails.
PATIENCE_S = 60.0

Handler = Callable[["Exchange"], Awaitable[None]]


async def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)
    assert condition(), what


@dataclass
class Head:
    """A message head: its first line and its fields in order."""

    line: str
    fields: list[tuple[str, str]]

    def get(self, name: str) -> str | None:
        """The value of the only field with that name."""
        values = self.all(name)
        assert len(values) <= 1, f"{name} is there {len(values)} times"
        return values[0] if values else None

    def all(self, name: str) -> list[str]:
        """The values of all fields with that name."""
        return [value for known, value in self.fields if known.lower() == name.lower()]

    @property
    def status(self) -> int:
        return int(self.line.split(" ")[1])

    @property
    def method(self) -> str:
        return self.line.split(" ")[0]

    @property
    def target(self) -> str:
        return self.line.split(" ")[1]


async def read_head(reader: StreamReader) -> Head:
    """Read one head. Raises IncompleteReadError at the end of input."""
    text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    line, *rest = text[:-4].split("\r\n")
    return Head(line, [(name, value.strip()) for name, _, value in (row.partition(":") for row in rest)])


async def read_chunks(reader: StreamReader) -> tuple[bytes, list[str]]:
    """Read a chunked body; returns its content and its trailer lines."""
    content = b""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        content += await reader.readexactly(size)
        assert await reader.readexactly(2) == b"\r\n"
    trailers = []
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        trailers.append(line.decode().strip())
    return content, trailers


async def read_body(reader: StreamReader, head: Head, *, is_response: bool) -> bytes:
    """Read the body that a head announces."""
    if head.get("transfer-encoding"):
        return (await read_chunks(reader))[0]
    if (length := head.get("content-length")) is not None:
        return await reader.readexactly(int(length))
    return await reader.read() if is_response else b""


@dataclass
class Exchange:
    """One request as an upstream sees it."""

    head: Head
    reader: StreamReader
    writer: StreamWriter
    connection: int

    async def body(self) -> bytes:
        return await read_body(self.reader, self.head, is_response=False)

    async def answer(self, body: bytes = b"", status: str = "200 OK", *fields: str) -> None:
        """A plain response with a length."""
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields]
        await self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()


async def describe(exchange: Exchange) -> None:
    """Answer with the request as JSON."""
    body = await exchange.body()
    seen = {"line": exchange.head.line, "fields": exchange.head.fields, "body": body.decode("latin-1")}
    await exchange.answer(json.dumps(seen).encode(), "200 OK", "Content-Type: application/json")


@dataclass
class Upstream:
    """An HTTP server that does what `handler` says for each request; keeps connections until told otherwise.

    asks_for_bodies: asks at once for one that the plane holds back; else that is up to the handler.
    """

    handler: Handler
    asks_for_bodies: bool = True
    requests: list[Head] = field(default_factory=list)
    connections: int = 0
    open_connections: set[StreamWriter] = field(default_factory=set)
    failures: list[BaseException] = field(default_factory=list)
    port: int = 0

    async def serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        connection = self.connections
        self.connections += 1
        self.open_connections.add(writer)
        try:
            while True:
                head = await read_head(reader)
                self.requests.append(head)
                if self.asks_for_bodies and head.get(BODY) == HELD:
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                await self.handler(Exchange(head, reader, writer, connection))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self.failures.append(error)
            raise
        finally:
            self.open_connections.discard(writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def tcp_upstream(handler: Handler) -> AsyncIterator[Upstream]:
    """A sandbox's server on a free loopback port."""
    upstream = Upstream(handler)
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0, limit=2**20)
    upstream.port = server.sockets[0].getsockname()[1]
    async with _stopped(server, upstream):
        yield upstream


@contextlib.asynccontextmanager
async def unix_upstream(handler: Handler, path: Path, *, asks_for_bodies: bool = True) -> AsyncIterator[Upstream]:
    """The API on a Unix socket."""
    upstream = Upstream(handler, asks_for_bodies)
    server = await asyncio.start_unix_server(upstream.serve, path, limit=2**20)
    async with _stopped(server, upstream):
        yield upstream


@contextlib.asynccontextmanager
async def _stopped(server: asyncio.Server, upstream: Upstream) -> AsyncIterator[None]:
    try:
        yield
    finally:
        server.close()
        for writer in list(upstream.open_connections):
            writer.transport.abort()
        await asyncio.sleep(0)
        assert upstream.failures == []


@dataclass
class Response:
    """A whole response as a client saw it."""

    head: Head
    body: bytes

    @property
    def status(self) -> int:
        return self.head.status

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The error code of an answer of the plane."""
        return str(self.json()["error"]["code"])


class Client:
    """A client connection that sends exactly what it is told."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes | str) -> None:
        self.writer.write(data.encode("latin-1") if isinstance(data, str) else data)
        await self.writer.drain()

    async def head(self) -> Head:
        async with asyncio.timeout(PATIENCE_S):
            return await read_head(self.reader)

    async def response(self, *, is_head_request: bool = False) -> Response:
        async with asyncio.timeout(PATIENCE_S):
            head = await read_head(self.reader)
            has_body = not is_head_request and head.status not in (204, 304) and head.status >= 200
            body = await read_body(self.reader, head, is_response=True) if has_body else b""
            return Response(head, body)

    async def request(self, method: str, host: str, target: str = "/", *fields: str, body: bytes = b"") -> Response:
        """One request on this connection."""
        lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *fields]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        await self.send("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
        return await self.response(is_head_request=method == "HEAD")

    async def rest(self) -> bytes:
        """Everything until the plane closes; a reset counts as closing."""
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionResetError):
                return await self.reader.read()
            return b""

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await self.writer.wait_closed()


class Plane:
    """A running sandgate-plane with a control connection."""

    def __init__(self, directory: Path, workers: int = 2) -> None:
        self.directory = directory
        self.workers = workers
        self.api_socket = directory / "api.sock"
        self.control_socket = directory / "plane.sock"
        self.process: asyncio.subprocess.Process
        self.address: tuple[str, int]
        self.admin: tuple[str, int]
        self.tls_addresses: list[tuple[str, int]]
        self.control: PlaneClient
        self._versions = itertools.count(1)

    async def start(self, *flags: str) -> None:
        """Start the process and wait until it listens."""
        self.process = await asyncio.create_subprocess_exec(
            plane_path(),
            *("--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"),
            *("--api-socket", self.api_socket, "--control-socket", self.control_socket),
            *("--workers", str(self.workers), "--die-with-parent", *flags),
            stdout=asyncio.subprocess.PIPE,
        )
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            said = json.loads(await self.process.stdout.readline())
        self.address, self.admin = _address(said["listen"][0]), _address(said["admin"])
        self.tls_addresses = [_address(text) for text in said["tls_listen"] if not text.startswith("unix:")]

    async def stop(self) -> int:
        """Stop it as a supervisor does; returns its exit status."""
        if self.process.returncode is None:
            self.process.terminate()
        async with asyncio.timeout(PATIENCE_S):
            return await self.process.wait()

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A fresh client connection."""
        reader, writer = await asyncio.open_connection(*self.address, limit=2**20)
        client = Client(reader, writer)
        try:
            yield client
        finally:
            await client.close()

    @contextlib.asynccontextmanager
    async def tls_client(self, name: str, context: ssl.SSLContext) -> AsyncIterator[Client]:
        """A fresh client connection by TLS that asks for the certificate of `name`."""
        address = self.tls_addresses[0]
        async with asyncio.timeout(PATIENCE_S):
            opened = await asyncio.open_connection(*address, limit=2**20, ssl=context, server_hostname=name)
        client = Client(*opened)
        try:
            yield client
        finally:
            await client.close()

    async def request(self, method: str, host: str, target: str = "/", *fields: str, body: bytes = b"") -> Response:
        """One request on a connection of its own."""
        async with self.client() as client:
            return await client.request(method, host, target, *fields, body=body)

    async def ask_admin(self, path: str) -> Response:
        reader, writer = await asyncio.open_connection(*self.admin)
        client = Client(reader, writer)
        try:
            return await client.request("GET", "admin", path)
        finally:
            await client.close()

    async def metric(self, series: str) -> float:
        """One figure of /metrics."""
        text = (await self.ask_admin("/metrics")).body.decode()
        found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
        assert found is not None, f"no {series} in\n{text}"
        return float(found[1])

    def version(self) -> int:
        return next(self._versions)

    def route(self, slug: str = "demo", **changes: Any) -> SandboxRoute:
        """A sandbox on this machine with its own id and the next version."""
        given = {"id": sandbox_id(slug), "slug": slug, "owner": "w1", "address": "127.0.0.1", "v": self.version()}
        return SandboxRoute(**{**given, **changes})

    async def put(self, slug: str = "demo", **changes: Any) -> SandboxRoute:
        """Push a sandbox."""
        route = self.route(slug, **changes)
        await self.control.put_sandbox(route)
        return route

    async def open(self, port: int, slug: str = "demo") -> str:
        """Push a sandbox with one public port; returns its host."""
        await self.put(slug, ports={port: PUBLIC})
        return host(port, slug)


PUBLIC = PortRoute("p1", "public")


def host(port: int, slug: str = "demo") -> str:
    return f"{port}-{slug}.sandbox.localhost"


def sandbox_id(slug: str) -> str:
    """A UUID that stays the same for a slug."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, slug))


def _address(text: str) -> tuple[str, int]:
    name, _, port = text.rpartition(":")
    return name, int(port)
