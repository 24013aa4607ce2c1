"""Pauses, snapshots, forks and templates over HTTP; every answer is checked against the OpenAPI document."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import httpx
import orjson
import pytest

SNAPSHOT_FIELDS = {"id", "snapshot_id", "sandbox_id", "label", "comment", "state", "status", "created_at"}


def assert_hybrid(body: dict[str, Any]) -> None:
    assert body["data"] == {name: value for name, value in body.items() if name != "data"}


async def frames(api: httpx.AsyncClient, path: str) -> list[dict[str, Any]]:
    """The data of every event of a stream that ends by itself."""
    async with asyncio.timeout(60), api.stream("GET", path) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return [orjson.loads(line[6:]) async for line in answer.aiter_lines() if line.startswith("data: ")]


async def write(api: httpx.AsyncClient, sandbox: str, content: str) -> None:
    body = {"path": "/workspace/note", "content": content, "encoding": "utf8"}
    assert (await api.post(f"{sandbox}/files", json=body)).is_success


async def read(api: httpx.AsyncClient, sandbox: str) -> str:
    answer = await api.get(f"{sandbox}/files", params={"path": "/workspace/note"})
    return str(answer.json()["content"])


async def test_pause_stop_and_resume(api, sandbox):
    body = (await api.post(f"{sandbox}/pause", json={})).json()
    assert_hybrid(body)
    assert (body["state"], body["status"], body["ready"], body["pause_kind"]) == ("paused", "paused", False, "frozen")
    assert body["checkpoint_pending"] is False
    assert (await api.get(f"{sandbox}/metrics")).json()["code"] == "sandbox_paused"
    assert (await api.post(f"{sandbox}/stop", json={})).json()["pause_kind"] == "hibernated"
    body = (await api.post(f"{sandbox}/resume", json={})).json()
    assert (body["state"], body["paused_at"], body["pause_kind"]) == ("running", None, None)
    assert (await api.post(f"{sandbox}/pause", json={"hibernate": True})).json()["pause_kind"] == "hibernated"
    answer = await api.post(f"{sandbox}/exec", json={"command": "echo awake"})
    assert answer.json()["stdout"] == "awake\n"


async def test_idle_policy_in_all_spellings(api):
    cases = [
        ({}, ("destroy", True, False, None)),
        ({"idle_action": "pause", "idle_timeout_sec": 60}, ("pause", True, True, 60)),
        ({"on_idle": "keep", "auto_resume": False}, ("keep", False, False, None)),
        ({"persistent": True, "timeout_sec": 120}, ("pause", True, True, 120)),
        ({"persistent": True, "idle_timeout_ms": 90_000, "timeout_sec": 120}, ("pause", True, True, 90)),
        ({"always_on": True}, ("keep", True, False, None)),
    ]
    for given, expected in cases:
        body = (await api.post("/sandboxes", json=given)).json()
        found = (body["idle_action"], body["auto_resume"], body["persistent"], body["idle_timeout_sec"])
        assert found == expected, given
    changed = await api.patch(f"/sandboxes/{body['id']}", json={"on_idle": "pause", "hibernate_after_sec": 30})
    assert (changed.json()["idle_action"], changed.json()["hibernate_after_sec"]) == ("pause", 30)
    refused = await api.post("/sandboxes", json={"idle_action": "explode"})
    assert refused.json()["error"]["details"][0]["field"] == "idle_action"


async def test_snapshot_restore_and_delete(api, sandbox):
    await write(api, sandbox, "before")
    answer = await api.post(f"{sandbox}/snapshots", json={"label": "first"})
    assert answer.status_code == 202
    taken = answer.json()
    assert_hybrid(taken)
    assert set(taken) >= SNAPSHOT_FIELDS
    assert (taken["label"], taken["comment"], taken["sandbox_id"]) == ("first", "first", sandbox.split("/")[-1])
    path = f"{sandbox}/snapshots/{taken['id']}"
    progress = await frames(api, f"{path}/events")
    assert (progress[-1]["type"], progress[-1]["status"], progress[-1]["progress"]) == (
        "snapshot_progress",
        "ready",
        1.0,
    )
    assert progress[-1]["snapshot_id"] == taken["id"]

    await write(api, sandbox, "after")
    restored = (await api.post(f"{sandbox}/restore/{taken['id']}", json={})).json()
    assert_hybrid(restored)
    assert (restored["state"], restored["snapshot_id"]) == ("running", taken["id"])
    assert await read(api, sandbox) == "before"

    body = (await api.get(f"{sandbox}/snapshots")).json()
    assert set(body) == {"data", "page"}
    assert [item["state"] for item in body["data"]] == ["ready"]
    assert (await api.get("/snapshots")).json()["page"]["total"] == 1
    assert (await api.get(f"/snapshots/{taken['id']}")).json()["id"] == taken["id"]
    assert (await api.delete(path)).status_code == 204
    assert (await api.delete(path)).json()["code"] == "not_found"


async def test_quick_snapshot_is_ready_when_answered(api, sandbox):
    answer = await api.post(f"{sandbox}/snapshot", json={})
    assert (answer.status_code, answer.json()["state"]) == (200, "ready")
    assert answer.json()["snapshot_id"] == answer.json()["id"]


async def test_a_repeated_key_takes_one_snapshot_and_makes_one_set_of_forks(api, sandbox):
    for path, body in ((f"{sandbox}/snapshots", {"label": "x"}), (f"{sandbox}/fork", {"count": 2})):
        headers = {"idempotency-key": str(uuid.uuid4())}
        first = await api.post(path, json=body, headers=headers)
        second = await api.post(path, json=body, headers=headers)
        assert first.content == second.content
        assert second.headers["idempotency-replayed"] == "true"
    assert (await api.get("/snapshots")).json()["page"]["total"] == 1
    assert (await api.get("/sandboxes")).json()["page"]["total"] == 3


async def test_forks_show_their_lineage(api, sandbox):
    await write(api, sandbox, "shared")
    answer = await api.post(f"{sandbox}/fork", json={"name": "copy", "metadata": {"a": 1}})
    assert answer.status_code == 201
    body = answer.json()
    assert_hybrid(body)
    assert (body["name"], body["parent_id"], body["boot_path"]) == ("copy", sandbox.split("/")[-1], "fork")
    assert [item["id"] for item in body["forks"]] == [body["id"]]
    assert await read(api, f"/sandboxes/{body['id']}") == "shared"

    taken = (await api.post(f"{sandbox}/snapshot", json={})).json()
    many = (await api.post(f"{sandbox}/fork", json={"count": 3, "snapshot_id": taken["id"]})).json()
    assert {item["snapshot_id"] for item in many["forks"]} == {taken["id"]}
    assert len({item["id"] for item in many["forks"]}) == 3
    from_history = (await api.post(f"/snapshots/{taken['id']}/fork", json={})).json()
    assert from_history["boot_path"] == "snapshot"
    created = (await api.post("/sandboxes", json={"snapshot_id": taken["id"]})).json()
    assert (created["snapshot_id"], created["parent_id"]) == (taken["id"], sandbox.split("/")[-1])


async def test_checkpoints_are_in_the_event_stream(api, sandbox):
    taken = (await api.post(f"{sandbox}/snapshot", json={})).json()
    kinds = []
    async with asyncio.timeout(60), api.stream("GET", "/events?types=checkpoint.*&last_event_id=0") as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                event = orjson.loads(line[6:])
                assert (event["snapshot_id"], event["resource_type"]) == (taken["id"], "snapshot")
                kinds.append(event["type"])
                if kinds[-1] == "checkpoint.ready":
                    break
    assert kinds[0] == "checkpoint.created"


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("POST", "/restore/" + str(uuid.uuid4()), "not_found"),
        ("GET", "/snapshots/nonsense", "not_found"),
        ("GET", "/snapshots/" + str(uuid.uuid4()) + "/events", "not_found"),
    ],
)
async def test_unknown_snapshots(api, sandbox, method, path, code):
    answer = await api.request(method, sandbox + path, json={})
    assert (answer.status_code, answer.json()["code"]) == (404, code)


async def test_a_template_is_built_followed_and_used(api):
    spec = {"from": "miosa-sandbox", "commands": ["echo made"], "env": {"A": "1"}, "readyCmd": "true", "memoryMib": 256}
    validation = (await api.post("/sandbox-templates/validate", json={"build_spec": spec})).json()
    assert (validation["valid"], validation["build_spec"]["steps"]) == (True, [{"run": "echo made"}])
    answer = await api.post("/sandbox-templates", json={"name": "My Site", "build_spec": spec, "description": "d"})
    assert answer.status_code == 201
    made = answer.json()
    assert_hybrid(made)
    assert (made["slug"], made["status"], made["built_in"], made["description"]) == ("my-site", "building", False, "d")

    (build,) = (await api.get(f"/sandbox-templates/{made['id']}/builds")).json()["data"]
    path = f"/sandbox-template-builds/{build['id']}"
    *lines, end = await frames(api, f"{path}/logs/stream")
    assert "made" in [line["line"] for line in lines]
    assert (end["type"], end["state"], end["error_code"]) == ("build", "ready", None)
    assert (await api.get(path)).json()["duration_ms"] >= 0
    log = (await api.get(f"{path}/logs", params={"lines": 1})).json()
    assert (log["lines"], log["state"]) == (["ready"], "ready")

    listed = (await api.get("/sandbox-templates", params={"include_aliases": "true"})).json()["data"]
    assert [item["slug"] for item in listed if not item["built_in"]] == ["my-site"]
    assert (await api.get("/sandbox-templates/my-site")).json()["current_build_id"] == build["id"]
    sandbox = (await api.post("/sandboxes", json={"template_id": "my-site"})).json()
    assert (sandbox["template"], sandbox["memory_mb"], sandbox["boot_path"]) == ("my-site", 256, "template")

    answer = await api.post("/sandbox-templates/my-site/builds", json={"build_spec": {"commands": ["exit 3"]}})
    assert answer.status_code == 201
    end = (await frames(api, f"/sandbox-template-builds/{answer.json()['id']}/events"))[-1]
    assert (end["state"], end["error_code"], end["failed_step"]) == ("failed", "step_failed", "run exit 3")
    cancelled = await api.post(f"/sandbox-template-builds/{answer.json()['id']}/cancel")
    assert cancelled.json()["state"] == "failed"
    assert (await api.delete("/sandbox-templates/my-site")).status_code == 204
    assert (await api.get("/sandbox-templates/my-site")).json()["code"] == "TEMPLATE_NOT_FOUND"
    assert (await api.delete("/sandbox-templates/default")).json()["code"] == "TEMPLATE_NOT_FOUND"


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"from": "node:22-bookworm"}, "build_spec.from"),
        ({"apt": ["--option"]}, "build_spec.apt[0]"),
        ({"apt": "curl"}, "build_spec.apt"),
        ({"steps": [{"pip": "--index-url=http://x y"}]}, "build_spec.steps[0].pip"),
        ({"steps": [{"run": "a", "apt": ["b"]}]}, "build_spec.steps[0]"),
        ({"steps": [{"type": "run"}]}, "build_spec.steps[0].run"),
        ({"steps": [{"type": "file", "path": "relative"}]}, "build_spec.steps[0]"),
        ({"files": {"relative": "x"}}, "build_spec.files.relative"),
        ({"workdir": "relative"}, "build_spec.workdir"),
        ({"user": "a b"}, "build_spec.user"),
        ({"readiness_probe": {"type": "http"}}, "build_spec.readiness_probe"),
        ({"readiness_probe": {"url": "http://[::1"}}, "build_spec.readiness_probe.url"),
        ({"memoryMib": 16_385}, "build_spec.memoryMib"),
    ],
)
async def test_a_wrong_specification_is_refused_by_field(api, spec, field):
    answer = await api.post("/sandbox-templates", json={"name": "x", "build_spec": spec})
    assert (answer.status_code, answer.json()["code"]) == (422, "INVALID_BUILDSPEC")
    assert [detail["field"] for detail in answer.json()["error"]["details"]] == [field]
    if field != "build_spec.from":  # what exists is found out when it is built
        validation = (await api.post("/sandbox-templates/validate", json={"build_spec": spec})).json()
        assert (validation["valid"], validation["errors"][0]["field"]) == (False, field)


async def test_the_form_of_specifications_is_told(api):
    body = (await api.get("/sandbox-templates/build-spec")).json()
    assert {"from", "steps", "startCmd", "readyCmd", "memoryMib"} <= set(body["fields"])
