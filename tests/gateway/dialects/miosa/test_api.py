"""The API end to end over fake machines. The `api` fixture checks every JSON answer against the OpenAPI document."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid

import httpx
import pytest

from tests.gateway.dialects.miosa.conftest import make_key

LIBRARY = {"user-agent": "miosa-python/0.1.0"}


def assert_hybrid(body: dict) -> None:
    assert body == {**body["data"], "data": body["data"]}


async def frames(response: httpx.Response):
    """Events of a stream: (kind, data, id)."""
    kind, data, event_id = None, None, None
    async for line in response.aiter_lines():
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            data = json.loads(value)
        elif name == "id":
            event_id = value
        elif not line and kind is not None:
            yield kind, data, event_id
            kind, data, event_id = None, None, None


async def collect(api: httpx.AsyncClient, method: str, path: str, **options) -> list[tuple]:
    async with asyncio.timeout(60), api.stream(method, path, **options) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        return [frame async for frame in frames(response)]


# Life cycle


async def test_create_answers_a_running_sandbox_flat_and_under_data(api):
    answer = await api.post("/sandboxes", json={"template_id": "miosa-sandbox", "name": "n", "tags": ["a"]})
    assert answer.status_code == 201
    body = answer.json()
    assert_hybrid(body)
    assert (body["state"], body["ready"], body["name"], body["tags"]) == ("running", True, "n", ["a"])
    assert body["timeout_sec"] == 300


async def test_get_by_id_name_and_slug(api):
    made = (await api.post("/sandboxes", json={"name": "box"})).json()
    for path in (made["id"], made["id"].upper(), "by-name/box", f"by-name/{made['slug']}"):
        answer = (await api.get(f"/sandboxes/{path}")).json()
        assert_hybrid(answer)
        assert answer["id"] == made["id"]


@pytest.mark.parametrize("path", ["nonsense", str(uuid.uuid4()), "by-name/nobody"])
async def test_unknown_sandbox(api, path):
    answer = await api.get(f"/sandboxes/{path}")
    assert (answer.status_code, answer.json()["code"]) == (404, "sandbox_not_found")


async def test_update_tags_and_extend(api, sandbox):
    assert (await api.patch(sandbox, json={"name": "new", "metadata": {"a": 1}})).json()["metadata"] == {"a": 1}
    assert (await api.patch(f"{sandbox}/tags", json={"tags": ["x"]})).json()["tags"] == ["x"]
    body = (await api.post(f"{sandbox}/extend", json={"timeout_sec": 3000})).json()
    assert_hybrid(body)
    assert 2_900_000 < body["timeout_remaining_ms"] <= 3_000_000


async def test_destroyed_sandbox_refuses_work_and_may_be_destroyed_again(api, sandbox):
    for _ in range(2):
        answer = await api.delete(sandbox)
        assert (answer.status_code, answer.content) == (204, b"")
    answer = await api.post(f"{sandbox}/exec", json={"command": "true"})
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert (await api.get(sandbox)).json()["state"] == "destroyed"


async def test_list_has_two_keys_and_pages(api):
    for _ in range(3):
        await api.post("/sandboxes", json={"tags": ["t"]})
    body = (await api.get("/sandboxes")).json()
    assert set(body) == {"data", "page"}
    assert body["page"] == {"page": 1, "page_size": 20, "total": 3}
    body = (await api.get("/sandboxes", params={"page": 2, "per_page": 2, "tags": "t"})).json()
    assert (len(body["data"]), body["page"]) == (1, {"page": 2, "page_size": 2, "total": 3})
    assert (await api.get("/sandboxes", params={"tags": "other"})).json()["data"] == []
    assert (await api.get("/sandboxes", headers=LIBRARY)).json()["page"]["page_size"] == 100


async def test_list_filters_by_attribution_and_state(api):
    made = (await api.post("/sandboxes", json={"external_user_id": "u"})).json()
    await api.post("/sandboxes", json={})
    found = (await api.get("/sandboxes", params={"external_user_id": "u"})).json()["data"]
    assert [item["id"] for item in found] == [made["id"]]
    await api.delete(f"/sandboxes/{made['id']}")
    assert len((await api.get("/sandboxes")).json()["data"]) == 1
    assert len((await api.get("/sandboxes", params={"state": "destroyed"})).json()["data"]) == 1


async def test_readiness(api, sandbox):
    body = (await api.get(f"{sandbox}/readiness")).json()
    assert_hybrid(body)
    assert (body["ready"], body["status"]) == (True, "ready")
    assert [kind for kind, _, _ in await collect(api, "GET", f"{sandbox}/readiness/stream")] == ["ready"]
    await api.delete(sandbox)
    assert [kind for kind, _, _ in await collect(api, "GET", f"{sandbox}/readiness/stream")] == ["timeout"]
    assert (await api.get(f"/sandboxes/{uuid.uuid4()}/readiness/stream")).status_code == 404


async def test_metrics_and_usage(api, sandbox):
    metrics = (await api.get(f"{sandbox}/metrics?window=1h")).json()
    assert metrics["memory_limit_bytes"] > 0
    assert metrics["window"] == "1h"
    assert all(load["cpu_percent"] >= 0 for load in metrics["series"])
    assert "series" not in (await api.get(f"{sandbox}/metrics")).json()
    assert (await api.get(f"{sandbox}/metrics?window=soon")).json()["code"] == "validation_error"
    assert (await api.get(f"{sandbox}/usage")).json()["sandbox_count"] == 1
    for path in ("/usage", "/usage/summary", "/usage?period=30d", "/usage?period=last_month"):
        assert (await api.get(path)).status_code == 200
    assert (await api.get("/usage?period=ever")).status_code == 422


async def test_same_idempotency_key_makes_one_sandbox(api):
    headers = {"idempotency-key": "0" * 32}
    first, second = [await api.post("/sandboxes", json={"name": "once"}, headers=headers) for _ in range(2)]
    assert first.content == second.content
    assert (await api.get("/sandboxes")).json()["page"]["total"] == 1
    other = await api.post("/sandboxes", json={"name": "twice"}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")


# Bad input


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"timeout_ms": 1}, {"timeout_ms"}),
        ({"cpu_count": 0, "memory_mb": "x"}, {"cpu_count", "memory_mb"}),
        ({"env": {"A": 1}}, {"env[...]"}),
        ({"template": ""}, {"template"}),
        ({"name": "a\nb"}, {"name"}),
        ({"slug": "A_B"}, {"slug"}),
    ],
)
async def test_bad_fields_are_named(api, body, fields):
    answer = await api.post("/sandboxes", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_error")
    assert {detail["field"] for detail in answer.json()["details"]} == fields


async def test_unknown_template(api):
    answer = await api.post("/sandboxes", json={"template": "nothing"})
    assert (answer.status_code, answer.json()["code"]) == (404, "TEMPLATE_NOT_FOUND")


async def test_routes_of_other_capabilities_are_absent(api):
    for method in ("POST", "PUT", "PATCH", "DELETE", "GET"):
        for path in ("/computers", "/deployments", "/databases", "/actions/catalog"):
            answer = await api.request(method, path)
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def test_key_is_needed_and_its_scope_too(app, api, database, principal):
    answer = await api.get("/sandboxes", headers={"authorization": "Bearer msk_live_wrong"})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    reader = await make_key(database, principal, scopes=("sandboxes:read",))
    headers = {"authorization": f"Bearer {reader}"}
    assert (await api.get("/sandboxes", headers=headers)).status_code == 200
    answer = await api.post("/sandboxes", json={}, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


async def test_rate_headers(api):
    answer = await api.get("/sandboxes")
    assert answer.headers["x-ratelimit-limit"] == "500"
    assert int(answer.headers["x-ratelimit-remaining"]) < 500
    assert "x-ratelimit-reset" in answer.headers


# Commands and processes


@pytest.mark.parametrize("path", ["exec", "commands"])
async def test_exec_reports_output_and_exit_code(api, sandbox, path):
    body = (await api.post(f"{sandbox}/{path}", json={"command": "echo hi && exit 7"})).json()
    assert_hybrid(body)
    assert (body["stdout"], body["stderr"], body["exit_code"], body["success"]) == ("hi\n", "", 7, False)


async def test_exec_with_argv(api, sandbox):
    answer = await api.post(f"{sandbox}/exec", json={"cmd": ["echo", "a b"], "timeout_ms": 1000})
    assert answer.json()["stdout"] == "a b\n"


async def test_exec_of_what_is_not_there(api, sandbox):
    answer = await api.post(f"{sandbox}/exec", json={"cmd": ["nothing"]})
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_error")


async def test_exec_that_runs_out_of_time(api, sandbox):
    body = (await api.post(f"{sandbox}/exec", json={"command": "sleep 30", "timeout": 0.2})).json()
    assert (body["exit_code"], body["timed_out"]) == (124, True)


async def test_detached_exec_is_a_process(api, sandbox):
    answer = await api.post(f"{sandbox}/exec", json={"cmd": "sleep", "args": ["30"], "detached": True})
    assert answer.status_code == 202
    assert answer.json()["state"] == "running"


@pytest.mark.parametrize("command", ["a\x00b", "x" * (128 * 1024 + 1), ["a\x00b"], [], "", " ", [1], {}])
async def test_impossible_commands_are_refused(api, sandbox, command):
    answer = await api.post(f"{sandbox}/exec", json={"command": command})
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_error")
    assert answer.json()["details"][0]["field"].startswith("command")


@pytest.mark.parametrize("path", ["exec/stream", "processes"])
async def test_input_that_would_get_lost_is_refused(api, sandbox, path):
    answer = await api.post(f"{sandbox}/{path}", json={"command": "cat", "stdin": "hello"})
    assert (answer.status_code, answer.json()["details"][0]["field"]) == (422, "stdin")


async def test_exec_stream(front, sandbox):
    found = await collect(front, "POST", f"{sandbox}/exec/stream", json={"command": "echo one; echo two; exit 3"})
    assert [(kind, data.get("line")) for kind, data, _ in found] == [
        ("stdout", "one\n"),
        ("stdout", "two\n"),
        ("exit", None),
    ]
    assert found[-1][1]["exit_code"] == 3
    assert all(data["type"] == kind for kind, data, _ in found)


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("exec/stream", {"command": ["no-such-program"]}, 422, "validation_error"),
        ("processes/99999/stream", None, 404, "not_found"),
    ],
)
async def test_output_that_cannot_begin_is_an_error_as_ever(front, sandbox, path, body, status, code):
    answer = await front.request("GET" if body is None else "POST", f"{sandbox}/{path}", json=body)
    assert (answer.status_code, answer.json()["code"], answer.json()["error"]["code"]) == (status, code, code)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert answer.json()["message"].endswith(".")


async def test_leaving_an_exec_stream_kills_the_command(api, front, sandbox):
    async with front.stream("POST", f"{sandbox}/exec/stream", json={"command": "yes"}) as response:
        assert await anext(frames(response))
    async with asyncio.timeout(60):
        while any(item["running"] for item in (await api.get(f"{sandbox}/processes")).json()["data"]):
            await asyncio.sleep(0.02)


async def test_life_of_a_process(api, front, sandbox):
    answer = await api.post(f"{sandbox}/processes", json={"command": "cat", "name": "reader"})
    assert answer.status_code == 201
    body = answer.json()
    assert_hybrid(body)
    process = f"{sandbox}/processes/{body['pid']}"
    assert [item["name"] for item in (await api.get(f"{sandbox}/processes")).json()["data"]] == ["reader"]

    assert (await api.post(f"{process}/stdin", json={"data": "hello\n"})).json()["written"] == 6
    assert (await api.post(f"{process}/stdin", json={"eof": True})).status_code == 200
    found = await collect(front, "GET", f"{process}/stream")
    assert [(kind, data.get("line")) for kind, data, _ in found] == [("stdout", "hello\n"), ("exit", None)]
    logs = (await api.get(f"{process}/logs", params={"tail": 10})).json()
    assert logs["logs"] == logs["data"] == "hello\n"
    assert (await api.get(process)).json()["exit_code"] == 0


async def test_process_is_signalled_and_stopped(api, sandbox):
    for end, code in ((("POST", "/signal", {"signal": "TERM"}), 143), (("DELETE", "", None), None)):
        pid = (await api.post(f"{sandbox}/processes", json={"command": "sleep 30"})).json()["pid"]
        method, suffix, body = end
        answer = await api.request(method, f"{sandbox}/processes/{pid}{suffix}", json=body)
        assert answer.status_code in (200, 204)
        async with asyncio.timeout(60):
            while (state := (await api.get(f"{sandbox}/processes/{pid}")).json())["running"]:
                await asyncio.sleep(0.02)
        assert code in (None, state["exit_code"])


async def test_unknown_process(api, sandbox):
    assert (await api.get(f"{sandbox}/processes/99999")).status_code == 404
    assert (await api.get(f"{sandbox}/processes/x")).status_code == 404
    assert (await api.post(f"{sandbox}/processes/99999/signal", json={"signal": "KILL"})).status_code == 404
    answer = await api.post(f"{sandbox}/processes/1/signal", json={"signal": "rm -rf"})
    assert answer.status_code == 422


# Files


@pytest.mark.parametrize("family", ["files", "fs"])
async def test_files_in_both_families(api, front, sandbox, family):
    base = f"{sandbox}/{family}"
    path = "/workspace/d/a b#.txt"
    body = (await api.post(f"{base}/write", json={"path": path, "content_base64": "AP8="})).json()
    assert_hybrid(body)
    assert (body["path"], body["size_bytes"]) == (path, 2)
    answer = await front.get(f"{base}/download", params={"path": path})
    assert (answer.content, answer.headers["content-type"]) == (b"\x00\xff", "application/octet-stream")
    part = await front.get(f"{base}/download", params={"path": path}, headers={"range": "bytes=1-"})
    assert (part.status_code, part.content) == (206, b"\xff")
    for stat in (
        await api.post(f"{base}/stat", json={"path": path}),
        await api.get(f"{base}/stat", params={"path": path}),
    ):
        assert (stat.json()["size"], stat.json()["is_dir"]) == (2, False)
    assert (await api.post(f"{base}/mkdir", json={"path": "/workspace/e/f"})).json()["is_dir"] is True
    moved = await api.post(f"{base}/rename", json={"from": path, "to": "/workspace/e/g"})
    assert moved.json()["path"] == "/workspace/e/g"
    await api.post(f"{base}/copy", json={"source": "/workspace/e/g", "destination": "/workspace/h"})
    assert (await api.post(f"{base}/chmod", json={"path": "/workspace/h", "mode": "600"})).json()["mode"] == 0o600
    listing = (await api.get(f"{base}/list", params={"path": "/workspace", "depth": 2})).json()
    assert_hybrid(listing)
    assert {entry["path"] for entry in listing["entries"]} >= {"/workspace/h", "/workspace/e/g"}
    tree = (await api.get(f"{base}/tree", params={"path": "/workspace/e"})).json()
    assert [child["name"] for child in tree["children"]] == ["f", "g"]
    assert (await api.delete(base, params={"path": "/workspace/h"})).json()["success"] is True
    await api.request("DELETE", base, json={"path": "/workspace/e", "recursive": True})
    assert (await api.post(f"{base}/stat", json={"path": "/workspace/e"})).status_code == 404


async def test_specified_write_and_read(api, sandbox):
    await api.post(f"{sandbox}/files", json={"path": "/workspace/a.txt", "content": "häh"})
    body = (await api.get(f"{sandbox}/files", params={"path": "/workspace/a.txt"})).json()
    assert body["data"] == {"path": "/workspace/a.txt", "content": "häh", "encoding": "utf8", "size_bytes": 4}
    await api.post(f"{sandbox}/files", json={"path": "/workspace/b", "content": "/w==", "encoding": "base64"})
    body = (await api.get(f"{sandbox}/files", params={"path": "/workspace/b"})).json()
    assert (body["content"], body["encoding"]) == ("/w==", "base64")


async def test_same_path_lists_a_directory(api, sandbox):
    await api.post(f"{sandbox}/files", json={"path": "/workspace/a.txt", "content": "x"})
    body = (await api.get(f"{sandbox}/files", params={"path": "/workspace"})).json()
    assert_hybrid(body)
    assert [entry["name"] for entry in body["entries"]] == ["a.txt"]
    assert body["files"] == body["entries"]
    assert (await api.get(f"{sandbox}/files", params={"path": "/workspace/none"})).status_code == 404


async def test_old_library_writes_base64_and_reads_by_path(api, front, sandbox):
    content = base64.b64encode(b'{"a": 1}').decode()
    await api.post(f"{sandbox}/files", json={"path": "/workspace/package.json", "content": content}, headers=LIBRARY)
    answer = await front.get(f"{sandbox}/files/workspace/package.json", headers=LIBRARY)
    assert (answer.content, answer.headers["content-type"]) == (b'{"a": 1}', "application/octet-stream")


@pytest.mark.parametrize("path", ["files/batch", "files/write-many", "fs/write-many"])
async def test_many_files_succeed_or_fail_by_themselves(api, sandbox, path):
    files = [{"path": "/workspace/a", "content_base64": "YQ=="}, {"path": "/proc/b", "content_base64": "YQ=="}]
    body = (await api.post(f"{sandbox}/{path}", json={"files": files})).json()
    assert_hybrid(body)
    assert body["written"] == ["/workspace/a"]
    assert [(failure["path"], failure["code"]) for failure in body["failed"]] == [("/proc/b", "FORBIDDEN_PATH")]
    assert body["success"] is False


@pytest.mark.parametrize("method", ["PUT", "POST"])
async def test_upload_streams_raw_bytes_and_forms(api, front, sandbox, method):
    async def pieces():
        for _ in range(64):
            yield bytes(64 * 1024)

    for client in (api, front):  # a small body, one that the API reads and one that the plane does
        for size, content in ((3, b"abc"), (4 * 1024 * 1024, pieces())):
            to = {"path": f"/workspace/{size}"}
            answer = await client.request(method, f"{sandbox}/fs/upload", params=to, content=content)
            assert (answer.status_code, answer.json()["size"]) == (200, size)
            assert (await api.get(f"{sandbox}/fs/stat", params=to)).json()["size"] == size
        form = {"data": {"path": "/workspace/form"}, "files": {"file": ("x", b"\x00form" * 100_000)}}
        answer = await client.request(method, f"{sandbox}/files/upload", **form)
        assert answer.json()["path"] == "/workspace/form"
        answer = await front.get(f"{sandbox}/fs/read", params={"path": "/workspace/form"})
        assert answer.content == b"\x00form" * 100_000


@pytest.mark.parametrize(
    ("header", "status", "content", "content_range"),
    [
        (None, 200, b"0123456789", None),
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=8-", 206, b"89", "bytes 8-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=10-", 416, b"", "bytes */10"),
        ("bytes=-0", 416, b"", "bytes */10"),
        ("bytes=4-2", 200, b"0123456789", None),
    ],
)
async def test_parts_of_a_file(api, front, sandbox, header, status, content, content_range):
    written = {"path": "/workspace/ten", "content": "0123456789", "mode": "600"}
    await api.post(f"{sandbox}/files", json=written)
    info = (await api.get(f"{sandbox}/fs/stat", params={"path": "/workspace/ten"})).json()
    headers = {} if header is None else {"range": header}
    answer = await front.get(f"{sandbox}/fs/download", params={"path": "/workspace/ten"}, headers=headers)
    assert (answer.status_code, answer.content) == (status, content)
    assert answer.headers.get("content-range") == content_range
    assert int(answer.headers["content-length"]) == len(content)
    if status != 416:
        head = await front.head(f"{sandbox}/fs/download", params={"path": "/workspace/ten"})
        assert head.headers["content-length"] == "10"
        for name in ("x-file-mode", "x-file-modified-at", "content-disposition", "accept-ranges", "content-type"):
            assert answer.headers[name] == head.headers[name]
        assert (answer.headers["x-file-mode"], answer.headers["x-file-modified-at"]) == ("0600", info["modified_at"])


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/workspace", 409, "conflict"),
        ("/workspace/file/below", 409, "conflict"),
        ("/etc/passwd", 403, "FORBIDDEN_PATH"),
    ],
)
async def test_what_is_wrong_with_an_upload_is_told_by_the_api(api, front, sandbox, path, status, code):
    await api.post(f"{sandbox}/files", json={"path": "/workspace/file", "content": ""})
    answer = await front.put(f"{sandbox}/fs/upload", params={"path": path}, content=bytes(1_000_000))
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]


async def test_an_upload_with_a_key_is_answered_again(api, front, sandbox):
    to, key = {"path": "/workspace/once"}, {"idempotency-key": "upload-1"}
    first = await front.put(f"{sandbox}/fs/upload", params=to, content=bytes(1_000_000), headers=key)
    assert (first.status_code, first.json()["size"]) == (200, 1_000_000)
    await api.request("DELETE", f"{sandbox}/fs", params=to)
    again = await front.put(f"{sandbox}/fs/upload", params=to, content=bytes(1_000_000), headers=key)
    assert (again.json(), again.headers["idempotency-replayed"]) == (first.json(), "true")
    assert (await api.get(f"{sandbox}/fs/stat", params=to)).status_code == 404
    other = await front.put(f"{sandbox}/fs/upload", params=to, content=bytes(1_000_001), headers=key)
    assert other.json()["code"] == "idempotency_mismatch"


async def test_a_report_is_no_request_of_its_own(api, sandbox):
    before = int((await api.get(sandbox)).headers["x-ratelimit-remaining"])
    report = {"x-sandgate-report": '{"error":{"code":"no_space","message":"full"}}'}
    for _ in range(50):
        answer = await api.put(f"{sandbox}/fs/upload", params={"path": "/workspace/a"}, headers=report)
        assert (answer.status_code, answer.json()["code"]) == (507, "disk_full")
    assert int(answer.headers["x-ratelimit-remaining"]) >= before


async def test_too_large_json_is_sent_to_the_upload_route(api, sandbox):
    content = base64.b64encode(bytes(10 * 1024 * 1024 + 1)).decode()
    answer = await api.post(f"{sandbox}/fs/write", json={"path": "/workspace/a", "content_base64": content})
    assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")
    answer = await api.post(f"{sandbox}/exec", content=bytes(17 * 1024 * 1024))
    assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/etc/passwd", 403, "FORBIDDEN_PATH"),
        ("/workspace/../etc/passwd", 403, "FORBIDDEN_PATH"),
        ("/proc/self/mem", 403, "FORBIDDEN_PATH"),
        ("/workspace/" + "x" * 300, 400, "INVALID_PATH"),
        ("", 422, "validation_error"),
        ("/workspace/a\0b", 422, "validation_error"),
    ],
)
async def test_bad_paths(api, sandbox, path, status, code):
    answer = await api.post(f"{sandbox}/files", json={"path": path, "content": ""})
    assert (answer.status_code, answer.json()["code"]) == (status, code)


async def test_reading_a_directory_or_nothing(front, sandbox):
    answer = await front.get(f"{sandbox}/fs/download", params={"path": "/workspace"})
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert (await front.get(f"{sandbox}/fs/download", params={"path": "/workspace/none"})).status_code == 404
    assert (await front.get(f"{sandbox}/files/workspace/none")).status_code == 404
    assert (await front.get(f"{sandbox}/fs/download")).status_code == 422


async def test_watch(api, sandbox):
    async with asyncio.timeout(60), api.stream("GET", f"{sandbox}/files/watch?path=/workspace") as response:
        assert response.status_code == 200
        await api.post(f"{sandbox}/files", json={"path": "/workspace/new", "content": "x"})
        async for kind, data, _ in frames(response):
            assert kind == "change"
            assert data["event"] == data["type"]
            if data["path"] == "/workspace/new":
                break


# Previews


async def test_previews_and_shares(api, sandbox):
    made = await api.post(f"{sandbox}/previews", json={"port": 3000, "visibility": "private"})
    assert made.status_code == 201
    preview = made.json()
    assert_hybrid(preview)
    one = f"{sandbox}/previews/{preview['id']}"
    assert (await api.get(one)).json()["port"] == 3000
    assert [item["id"] for item in (await api.get(f"{sandbox}/previews")).json()["data"]] == [preview["id"]]

    share = await api.post(f"{one}/share", json={"ttl_seconds": 60})
    assert share.status_code == 201
    body = share.json()
    assert_hybrid(body)
    assert body["preview_token"].startswith(body["share_token_prefix"])
    assert body["preview"]["id"] == preview["id"]
    listed = (await api.get(f"{sandbox}/shares")).json()["data"]
    assert [item["share_id"] for item in listed] == [body["share_id"]]
    assert "preview_token" not in listed[0]
    assert (await api.delete(f"{one}/share")).status_code == 204
    assert (await api.get(f"{sandbox}/shares")).json()["data"] == []
    assert (await api.delete(one)).status_code == 204
    assert (await api.get(one)).status_code == 404


async def test_the_policy_of_a_preview(api, sandbox):
    nothing = {"allowed_origins": None, "allow_credentials": False, "frame_ancestors": None}
    made = (await api.post(f"{sandbox}/previews", json={"port": 3000})).json()
    assert made["policy"] == nothing
    one = f"{sandbox}/previews/{made['id']}"
    policy = {
        "allowed_origins": ["https://app.example:8443", "http://[::1]:5173"],
        "allow_credentials": True,
        "frame_ancestors": ["'self'", "https://*.example"],
    }
    changed = (await api.patch(one, json={"policy": policy})).json()
    assert (changed["policy"], changed["visibility"]) == (policy, "private")
    changed = (await api.patch(one, json={"visibility": "public"})).json()
    assert (changed["policy"], changed["visibility"]) == (policy, "public")
    again = (await api.post(f"{sandbox}/previews", json={"port": 3000, "policy": {"frame_ancestors": []}})).json()
    assert again["policy"] == {**nothing, "frame_ancestors": []}
    assert (await api.get(one)).json()["policy"] == again["policy"]
    assert (await api.patch(f"{sandbox}/previews/nothing", json={})).status_code == 404


@pytest.mark.parametrize(
    "policy",
    [
        {"allowed_origins": ["app.example"]},
        {"allowed_origins": ["https://app.example/path"]},
        {"allowed_origins": ["https://a; script-src *"]},
        {"allowed_origins": ["*"], "allow_credentials": True},
        {"frame_ancestors": ["'none'"]},
        {"frame_ancestors": ["https://a\r\nX: y"]},
    ],
)
async def test_a_policy_that_says_too_much_is_refused(api, sandbox, policy):
    answer = await api.post(f"{sandbox}/previews", json={"port": 3000, "policy": policy})
    assert answer.status_code == 422


async def test_expose_gives_an_address(api, sandbox):
    body = (await api.post(f"{sandbox}/expose", json={"port": 8000})).json()
    assert body["data"]["url"].startswith("http")
    assert body["port"] == 8000
    assert (await api.post(f"{sandbox}/expose", json={"port": 0})).status_code == 422


async def test_expose_opens_to_everybody_but_never_what_was_private(api, sandbox):
    assert (await api.post(f"{sandbox}/expose", json={"port": 8000})).json()["visibility"] == "public"
    await api.post(f"{sandbox}/previews", json={"port": 3000})
    assert (await api.post(f"{sandbox}/expose", json={})).json()["visibility"] == "private"
    assert (await api.post(f"{sandbox}/expose", json={"visibility": "public"})).json()["visibility"] == "public"


async def test_share_of_a_sandbox(api, sandbox):
    for path in ("shares", "preview-token"):
        body = (await api.post(f"{sandbox}/{path}", json={"scope": "read", "expires_in": 60})).json()
        assert_hybrid(body)
        assert body["token"]
        assert (await api.delete(f"{sandbox}/shares/{body['share_id']}")).status_code == 204


# Environment, logs, templates


async def test_environment(api, sandbox):
    body = (
        await api.put(f"{sandbox}/env", json={"vars": [{"key": "A", "value": "1"}, {"name": "B", "value": "2"}]})
    ).json()
    assert_hybrid(body)
    assert body["env"] == {"A": "1", "B": "2"}
    assert (await api.post(f"{sandbox}/exec", json={"command": "env"})).json()["stdout"].count("A=1") == 1
    assert (await api.delete(f"{sandbox}/env/A")).status_code == 204
    assert (await api.get(f"{sandbox}/env")).json()["vars"] == [{"key": "B", "value": "2"}]
    assert (await api.put(f"{sandbox}/env", json={})).status_code == 422
    assert (await api.put(f"{sandbox}/env", json={"vars": [{"value": "1"}]})).status_code == 422


async def test_logs(api, sandbox):
    await api.post(f"{sandbox}/processes", json={"command": "echo one; echo two"})
    async with asyncio.timeout(60):
        while (body := (await api.get(f"{sandbox}/logs", params={"lines": 1})).json())["lines"] != ["two"]:
            await asyncio.sleep(0.02)
    assert_hybrid(body)
    assert body["logs"] == "two\n"
    async with asyncio.timeout(60), api.stream("GET", f"{sandbox}/logs/stream") as response:
        async for kind, data, _ in frames(response):
            assert kind == "stdout"
            if data["line"] == "two\n":
                break


async def test_templates(api):
    body = (await api.get("/sandbox-templates")).json()
    assert [item["name"] for item in body["data"]] == ["default"]
    assert body["default_template_id"] == body["data"][0]["id"]
    aliased = (await api.get("/sandbox-templates", params={"include_aliases": "true"})).json()["data"]
    assert [item["name"] for item in aliased] == ["default", "miosa-sandbox"]
    for name in ("default", "miosa-sandbox", body["default_template_id"]):
        assert (await api.get(f"/sandbox-templates/{name}")).json()["name"] == "default"
    assert (await api.get("/sandbox-templates/none")).status_code == 404
    assert [item["name"] for item in (await api.get("/templates")).json()["data"]["templates"]] == ["default"]


# Keys


async def test_life_of_a_key(api):
    made = await api.post("/api-keys", json={"name": "ci", "scopes": ["sandboxes:read"]})
    assert made.status_code == 201
    body = made.json()
    assert_hybrid(body)
    assert body["key"] == body["token"]
    assert body["key"].startswith(body["prefix"])
    headers = {"authorization": f"Bearer {body['key']}"}
    assert (await api.get("/sandboxes", headers=headers)).status_code == 200
    assert (await api.post("/sandboxes", json={}, headers=headers)).status_code == 403
    listed = (await api.get("/api-keys")).json()["data"]
    assert any(item["id"] == body["id"] for item in listed)
    assert not any("key" in item for item in listed)
    assert (await api.delete(f"/api-keys/{body['id']}")).status_code == 204
    assert (await api.get("/sandboxes", headers=headers)).status_code == 401
    assert (await api.delete(f"/api-keys/{body['id']}")).status_code == 404


async def test_scoped_keys(api):
    body = (await api.post("/api-keys/scoped", json={"external_user_id": "u", "scopes": ["sandboxes:read"]})).json()
    assert (body["external_user_id"], body["scopes"]) == ("u", ["sandboxes:read"])
    body = (await api.post("/tokens/scoped", json={"user_id": "u", "expires_in_seconds": 60})).json()
    assert body["token"]
    assert body["expires_at"]
    assert (await api.post("/tokens/scoped", json={"user_id": "u", "expires_in_seconds": 90_000})).status_code == 422


@pytest.mark.parametrize("body", [{}, {"name": ""}, {"name": "x" * 81}, {"name": "a", "scopes": ["all"]}])
async def test_bad_keys(api, body):
    assert (await api.post("/api-keys", json=body)).status_code == 422


# Events


async def next_event(api, path, **options) -> tuple:
    async with asyncio.timeout(60), api.stream("GET", path, **options) as response:
        assert response.status_code == 200, await response.aread()
        return await anext(frames(response))


@pytest.mark.parametrize("path", ["/events", "/events/stream", "sandbox"])
async def test_events_resume_after_an_id(api, sandbox, path):
    path = f"{sandbox}/events" if path == "sandbox" else path
    kind, data, event_id = await next_event(api, path, headers={"last-event-id": "0"})
    assert kind == data["type"] == "sandbox.created"
    assert data["id"] == sandbox.rpartition("/")[2]
    assert event_id == data["event_id"]
    following = await next_event(api, path, headers={"last-event-id": event_id})
    assert following[0] == "sandbox.running"
    assert following[2] > event_id


async def test_events_can_be_filtered(api, sandbox):
    options = {"headers": {"last-event-id": "0"}}
    assert (await next_event(api, "/events?types=sandbox.run*", **options))[0] == "sandbox.running"
    assert (await next_event(api, f"/events?resource_id={sandbox[11:]}", **options))[0] == "sandbox.created"
    assert (await api.get("/events", headers={"last-event-id": "x"})).status_code == 400
    assert (await api.get("/events?resource_type=planet")).status_code == 422
    assert (await api.get(f"/sandboxes/{uuid.uuid4()}/events")).status_code == 404


@pytest.mark.parametrize("path", ["/auth/sse-ticket", "/sse/ticket"])
async def test_ticket_opens_events_once(api, sandbox, path):
    body = (await api.post(path, json={})).json()
    assert_hybrid(body)
    assert body["expires_in"] == 60
    options = {"headers": {"authorization": "", "last-event-id": "0"}, "params": {"ticket": body["ticket"]}}
    assert (await next_event(api, "/events", **options))[0] == "sandbox.created"
    assert (await api.get("/events", **options)).status_code == 401


# Documents


async def test_documents_need_no_key(api):
    anybody = {"authorization": ""}
    document = (await api.get("/openapi.json", headers=anybody)).json()
    assert document["openapi"].startswith("3.1")
    page = await api.get("/docs", headers=anybody)
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    for name in ("docs/docs.js", "docs/docs.css", "openapi.json"):
        assert f'"/api/v1/{name}"' in page.text
        assert (await api.get(f"/{name}", headers=anybody)).status_code == 200
