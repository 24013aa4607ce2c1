"""What no client package does but a plain HTTP or WebSocket client may: odd paths, large bodies, terminals."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator

import httpx
import pytest
import websockets
from websockets.asyncio.client import ClientConnection, connect

from tests.support.server import ServerProcess


def test_prefix_may_be_missing_or_repeated(api: httpx.Client, server: ServerProcess, sandbox: str) -> None:
    origin = server.base_url.removesuffix("/api/v1")
    for prefix in ("", "/api/v1", "/api/v1/api/v1"):
        assert api.get(f"{origin}{prefix}{sandbox}").json()["id"] in sandbox
    assert api.get(f"{origin}/nothing").json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("path", ["/files/%ff", "/fs/download?path=%ff"])
def test_what_is_not_utf8_is_refused(api: httpx.Client, sandbox: str, path: str) -> None:
    assert api.get(sandbox + path).status_code == 400


@pytest.mark.parametrize("says_length", [True, False])
def test_too_large_json_is_refused_while_it_is_sent(api: httpx.Client, sandbox: str, says_length: bool) -> None:
    pieces = (b"x" * 65536 for _ in range(272))
    content = b"".join(pieces) if says_length else pieces
    answer = api.post(f"{sandbox}/files", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")
    assert api.get(sandbox).status_code == 200


def test_large_file_comes_back_whole_and_in_parts(api: httpx.Client, sandbox: str) -> None:
    blocks = [hashlib.sha256(str(number).encode()).digest() * 2048 for number in range(512)]
    size = sum(map(len, blocks))
    answer = api.put(f"{sandbox}/fs/upload", params={"path": "/workspace/large"}, content=iter(blocks))
    assert (answer.status_code, answer.json()["size"]) == (200, size)

    digest = hashlib.sha256()
    with api.stream("GET", f"{sandbox}/fs/download", params={"path": "/workspace/large"}) as answer:
        assert answer.headers["content-length"] == str(size)
        for chunk in answer.iter_bytes():
            digest.update(chunk)
    assert digest.digest() == hashlib.sha256(b"".join(blocks)).digest()

    part = api.get(f"{sandbox}/files/workspace/large", headers={"range": f"bytes={size - 3}-"})
    assert (part.status_code, part.content) == (206, blocks[-1][-3:])


def test_form_upload(api: httpx.Client, sandbox: str) -> None:
    files = {"file": ("x", b"\x00" * 1_000_000)}
    answer = api.post(f"{sandbox}/files/upload", data={"path": "/workspace/ü"}, files=files)
    assert answer.json()["path"] == "/workspace/ü"
    assert len(api.get(f"{sandbox}/fs/read", params={"path": "/workspace/ü"}).content) == 1_000_000


def test_upload_that_breaks_off_leaves_nothing(api: httpx.Client, sandbox: str) -> None:
    def breaking_off() -> Iterator[bytes]:
        yield b"x" * 100_000
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.put(f"{sandbox}/fs/upload", params={"path": "/workspace/half"}, content=breaking_off())
    listed = api.get(f"{sandbox}/files", params={"path": "/workspace"}).json()["entries"]
    assert [entry["name"] for entry in listed if "half" in entry["name"]] == []


def test_output_that_is_no_text(api: httpx.Client, sandbox: str) -> None:
    body = api.post(f"{sandbox}/exec", json={"cmd": ["printf", r"a\xffb"]}).json()
    assert (body["stdout"], body["stdout_base64"]) == ("a\ufffdb", "Yf9i")


def test_process_that_ignores_sigterm_is_stopped(api: httpx.Client, sandbox: str) -> None:
    made = api.post(f"{sandbox}/processes", json={"command": "trap '' TERM; echo ready; while :; do sleep 1; done"})
    process = f"{sandbox}/processes/{made.json()['pid']}"
    with api.stream("GET", f"{process}/stream") as output:
        assert any("ready" in line for line in output.iter_lines())
    assert api.delete(process).status_code == 204
    assert api.get(process).json()["signal"] in (None, 9)  # None: it has not been reaped yet
    with api.stream("GET", f"{process}/stream") as output:
        assert any(line == "event: exit" for line in output.iter_lines())


def test_process_may_tidy_up_when_it_is_stopped(api: httpx.Client, sandbox: str) -> None:
    command = "trap 'echo tidied > /workspace/tidied; exit 0' TERM; echo ready; while :; do sleep 0.1; done"
    process = f"{sandbox}/processes/{api.post(f'{sandbox}/processes', json={'command': command}).json()['pid']}"
    with api.stream("GET", f"{process}/stream") as output:
        assert any("ready" in line for line in output.iter_lines())
    assert api.delete(process).status_code == 204
    assert api.get(f"{sandbox}/fs/read", params={"path": "/workspace/tidied"}).content == b"tidied\n"


def test_documents_are_served_to_anybody(server: ServerProcess) -> None:
    assert "docs.js" in httpx.get(f"{server.base_url}/docs").text
    assert httpx.get(f"{server.base_url}/openapi.json").json()["openapi"] == "3.1.0"


def list_processes(api: httpx.Client, sandbox: str) -> list[dict[str, str]]:
    listed: list[dict[str, str]] = api.get(f"{sandbox}/processes").json()["data"]
    return listed


async def read_until(socket: ClientConnection, wanted: bytes) -> bytes:
    seen = b""
    async with asyncio.timeout(60):
        while wanted not in seen:
            frame = await socket.recv()
            seen += frame if isinstance(frame, bytes) else frame.encode()
    return seen


@pytest.fixture
def terminal(api: httpx.Client, sandbox: str) -> dict[str, str]:
    made = api.post(f"{sandbox}/terminal", json={"rows": 30, "cols": 100})
    assert made.status_code == 201
    answer: dict[str, str] = made.json()
    return answer


async def test_terminal_opens_by_ticket_once(terminal: dict[str, str]) -> None:
    async with connect(terminal["ws_url"]) as socket:
        await socket.send("stty size; echo $((6*7))\n")
        await read_until(socket, b"30 100\r\n42\r\n")
        await socket.send(json.dumps({"type": "resize", "rows": 40, "cols": 120}))
        await socket.send(json.dumps({"type": "stdin", "data": "stty size\n"}))
        await read_until(socket, b"40 120\r\n")
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with connect(terminal["ws_url"]):
            pass
    assert refused.value.response.status_code == 401


async def test_terminal_outlives_its_connection(
    api: httpx.Client, server: ServerProcess, sandbox: str, terminal: dict[str, str]
) -> None:
    async with connect(terminal["ws_url"]) as socket:
        await socket.send(b"echo first-$((1+1))\n")
        await read_until(socket, b"first-2")
    url = terminal["ws_url"].partition("?")[0]
    protocols = [websockets.Subprotocol("terminal"), websockets.Subprotocol(f"bearer.{server.api_key}")]
    async with connect(f"{url}?format=json", subprotocols=protocols) as socket:
        assert socket.subprotocol == "terminal"
        await read_until(socket, b"first-2")
        await socket.send("exit 5\n")
        frames = [json.loads(frame) async for frame in socket]
    assert frames[-1] == {"type": "exit", "code": 5, "exit": 5}
    assert socket.close_code == 1000
    closing = await asyncio.to_thread(api.delete, f"{sandbox}/terminal/{terminal['session_id']}")
    assert closing.status_code == 204


async def test_terminal_of_a_connection_ends_with_it(api: httpx.Client, server: ServerProcess, sandbox: str) -> None:
    url = f"{server.base_url}{sandbox}/terminal/stream".replace("http", "ws", 1)
    async with connect(url, additional_headers={"authorization": f"Bearer {server.api_key}"}) as socket:
        await read_until(socket, b"$")
    async with asyncio.timeout(60):
        while "running" in [item["state"] for item in (await asyncio.to_thread(list_processes, api, sandbox))]:
            await asyncio.sleep(0.05)


async def test_terminal_needs_a_key(server: ServerProcess, sandbox: str) -> None:
    url = f"{server.base_url}{sandbox}/terminal/stream".replace("http", "ws", 1)
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with connect(url):
            pass
    assert refused.value.response.status_code == 401
    assert json.loads(refused.value.response.body)["error"]["code"] == "unauthorized"
