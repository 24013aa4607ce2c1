"""Files of real sandboxes on their way in and out: large, in parts, broken off, slow, and in the way of each other."""

from __future__ import annotations

import hashlib
import itertools
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.server import ServerProcess

MIB = 1024 * 1024
PATH = {"path": "/workspace/file"}


def blocks(count: int) -> Iterator[bytes]:
    """So many MiB, no two of them alike."""
    return (hashlib.sha256(str(number).encode()).digest() * (MIB // 32) for number in range(count))


def put(api: httpx.Client, sandbox: str, content: bytes | Iterator[bytes], **headers: str) -> httpx.Response:
    return api.put(f"{sandbox}/fs/upload", params=PATH, content=content, headers=headers)


def run(api: httpx.Client, sandbox: str, command: str) -> str:
    answer = api.post(f"{sandbox}/exec", json={"command": command, "timeout": 60})
    return str(answer.json()["stdout"])


@pytest.mark.parametrize("says_length", [True, False])
def test_a_large_file_comes_back_byte_for_byte(api: httpx.Client, sandbox: str, says_length: bool) -> None:
    count = 256
    length = {"content-length": str(count * MIB)} if says_length else {}
    answer = put(api, sandbox, blocks(count), **length)
    assert (answer.status_code, answer.json()["size"]) == (200, count * MIB)
    with api.stream("GET", f"{sandbox}/files/workspace/file") as answer:
        assert answer.headers["content-length"] == str(count * MIB)
        received = answer.iter_bytes(MIB)
        for number, (expected, found) in enumerate(itertools.zip_longest(blocks(count), received)):
            assert expected == found, f"block {number}"
    assert run(api, sandbox, "ls -A /workspace").split() == ["file"]


def test_parts_of_a_large_file(api: httpx.Client, sandbox: str) -> None:
    content = b"".join(blocks(8))
    assert put(api, sandbox, content).status_code == 200
    for header, start, end in (
        ("bytes=1048575-3145728", MIB - 1, 3 * MIB + 1),
        ("bytes=8388600-", 8 * MIB - 8, 8 * MIB),
        ("bytes=-5000000", 8 * MIB - 5_000_000, 8 * MIB),
    ):
        part = api.get(f"{sandbox}/fs/download", params=PATH, headers={"range": header})
        assert (part.status_code, part.content) == (206, content[start:end])
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{8 * MIB}"
    beyond = api.get(f"{sandbox}/fs/download", params=PATH, headers={"range": "bytes=8388608-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, "bytes */8388608")


@pytest.mark.parametrize("says_length", [True, False])
def test_an_upload_that_breaks_off_leaves_the_old_file(
    api: httpx.Client, server: ServerProcess, sandbox: str, says_length: bool
) -> None:
    assert put(api, sandbox, b"old").status_code == 200
    framing = f"Content-Length: {20 * MIB}" if says_length else "Transfer-Encoding: chunked"
    with raw_request(server, f"PUT {sandbox}/fs/upload?path=/workspace/file", framing) as client:
        client.sendall(bytes(5 * MIB) if says_length else b"500000\r\n" + bytes(5 * MIB) + b"\r\n")
    until = time.monotonic() + 60
    while len(run(api, sandbox, "ls -A /workspace").split()) > 1 and time.monotonic() < until:
        time.sleep(0.05)  # until the agent has heard of it
    assert run(api, sandbox, "ls -A /workspace").split() == ["file"]
    assert run(api, sandbox, "cat /workspace/file") == "old"


def raw_request(server: ServerProcess, line: str, *fields: str) -> socket.socket:
    """A connection on which a request's head has been sent."""
    client = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    method, target = line.split(" ")
    prefix = urlsplit(server.base_url).path
    head = [
        f"{method} {prefix}{target} HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {server.api_key}",
        *fields,
    ]
    client.sendall(("\r\n".join(head) + "\r\n\r\n").encode())
    return client


def test_a_refused_upload_is_not_sent(api: httpx.Client, server: ServerProcess, sandbox: str) -> None:
    run(api, sandbox, "ln -s /etc /workspace/link; mkdir /workspace/dir")
    for path, status in (("/workspace/dir", 409), ("/workspace/link/x", 403), ("/etc/x", 403), ("/workspace/new", 100)):
        line = f"PUT {sandbox}/fs/upload?path={path}"
        with raw_request(server, line, f"Content-Length: {20 * MIB}", "Expect: 100-continue") as client:
            answer = client.makefile("rb")
            first = int(answer.readline().split(b" ")[1])
            if first == 100 and status != 100:  # the agent looks while the client is told to go on
                assert answer.readline() == b"\r\n"
                first = int(answer.readline().split(b" ")[1])
            assert first == status


def test_a_full_disk_is_told_and_leaves_the_old_file(api: httpx.Client) -> None:
    made = api.post("/sandboxes", json={"timeout_sec": 300, "disk_mb": 64})
    sandbox = f"/sandboxes/{made.json()['id']}"
    try:
        assert put(api, sandbox, b"old").status_code == 200
        answer = put(api, sandbox, blocks(200))
        assert (answer.status_code, answer.json()["code"]) == (507, "disk_full")
        assert api.get(f"{sandbox}/fs/download", params=PATH).content == b"old"
    finally:
        api.delete(sandbox)


def test_a_file_that_shrinks_is_never_complete(api: httpx.Client, sandbox: str) -> None:
    assert put(api, sandbox, blocks(64)).status_code == 200
    with api.stream("GET", f"{sandbox}/fs/download", params=PATH) as answer:
        received = answer.iter_raw()
        size = len(next(received))
        run(api, sandbox, "truncate -s 0 /workspace/file")
        with pytest.raises(httpx.RemoteProtocolError):
            size += sum(map(len, received))
    assert size < 64 * MIB


def test_a_slow_reader_holds_up_nobody_else(api: httpx.Client, server: ServerProcess, sandbox: str) -> None:
    assert put(api, sandbox, blocks(64)).status_code == 200
    with raw_request(server, f"GET {sandbox}/fs/download?path=/workspace/file") as client:
        assert client.recv(1) == b"H"
        assert run(api, sandbox, "echo here") == "here\n"
        assert len(api.get(f"{sandbox}/fs/download", params=PATH).content) == 64 * MIB
        answer = client.makefile("rb")
        while answer.readline() != b"\r\n":
            pass
        digest = hashlib.sha256()
        for _ in range(64):
            digest.update(answer.read(MIB))
    assert digest.hexdigest() == hashlib.sha256(b"".join(blocks(64))).hexdigest()


def test_an_upload_is_done_once_for_its_key(api: httpx.Client, sandbox: str) -> None:
    key = {"idempotency-key": "one"}
    first = put(api, sandbox, bytes(2 * MIB), **key)
    assert (first.status_code, first.json()["size"]) == (200, 2 * MIB)
    run(api, sandbox, "rm /workspace/file")
    again = put(api, sandbox, bytes(2 * MIB), **key)
    assert (again.json(), again.headers["idempotency-replayed"]) == (first.json(), "true")
    assert run(api, sandbox, "ls -A /workspace") == ""
