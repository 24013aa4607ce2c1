"""The phases of a request, driven as a server would: refusals, repeats, callers that leave."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Router

from gateway import endpoint
from gateway.auth import Authenticator
from gateway.engine import Engine
from gateway.engine.secrets import digest, make_secret
from gateway.errors import GatewayError
from gateway.idempotency import IdempotencyStore
from gateway.limits import Budget, Limits
from gateway.phases import Phases, Terms
from gateway.pipeline import Call, Credentials, Operation, SocketOperation
from gateway.resources import ApiKey, Principal
from gateway.store import Database, keys, migrate, open_database, tickets, workspaces
from gateway.undelivered import Undelivered


class Dialect:
    """Errors as `{"code"}` with a status of 400 and more; the key is in `x-key`, the ticket in `x-ticket`."""

    name = "test"
    operations: Sequence[Operation] = ()
    sockets: Sequence[SocketOperation] = ()

    def credentials(self, connection: HTTPConnection) -> Credentials:
        return Credentials(connection.headers.get("x-key"), connection.headers.get("x-ticket"))

    def error_response(self, error: GatewayError, request_id: str, *, status_sent: bool = False) -> Response:
        status = {"unauthenticated": 401, "rate_limited": 429, "internal": 500, "timeout": 504}.get(error.code, 400)
        return JSONResponse({"code": error.code, "message": error.message, "late": status_sent}, status)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    """An application over real stores, and a caller that can leave."""

    phases: Phases
    database: Database
    key: str
    workspace_id: str
    calls: list[Call] = field(default_factory=list)

    def app(self, handler: Callable[[Call], Any], **terms: Any) -> Router:
        dialect = Dialect()
        operation = Operation("POST", "/do/{thing}", handler, **{"mutates": True, **terms})
        dialect.operations = [operation]
        return Router(endpoint.routes(self.phases, dialect))

    async def post(
        self,
        app: Router,
        path: str = "/do/it",
        body: bytes = b"{}",
        leave: asyncio.Event | None = None,
        **headers: str,
    ) -> Answer:
        given = {"x-key": self.key, **{name.replace("_", "-"): value for name, value in headers.items()}}
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in given.items() if value],
            "app": None,
        }
        sent: list[dict[str, Any]] = []
        requests = iter([{"type": "http.request", "body": body}])

        async def receive() -> dict[str, Any]:
            for message in requests:
                return message
            await (leave or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)
        if not sent:
            return Answer(0, {}, b"")
        headers_sent = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], headers_sent, b"".join(message.get("body", b"") for message in sent[1:]))


def make_key(workspace_id: str, **fields: Any) -> tuple[ApiKey, str]:
    secret = make_secret("msk_test_")
    base = ApiKey(str(uuid.uuid4()), workspace_id, "k", secret[:12], (), time.time(), None, None)
    return replace(base, **fields), secret


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("database") / "db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
async def server(tmp_path: Path, empty_database: Path) -> AsyncIterator[Server]:
    url = f"sqlite:///{shutil.copy(empty_database, tmp_path / 'db')}"
    database = open_database(url)
    workspace_id = await database.write(lambda connection: workspaces.ensure(connection, "w"))
    key, secret = make_key(workspace_id)
    await database.write(lambda connection: keys.insert(connection, key, secret_hash=digest(secret), is_test=True))
    limits = Limits(tmp_path / "limits")
    idempotency = IdempotencyStore(tmp_path / "idempotency", ttl_s=3600, answer_bytes_max=10_000)
    undelivered = Undelivered(tmp_path / "undelivered", answer_bytes_max=10_000)
    phases = Phases(
        engine=cast(Engine, None),  # these handlers ask nothing of it
        authenticator=Authenticator(database, limits, failures=Budget(6)),
        limits=limits,
        idempotency=idempotency,
        undelivered=undelivered,
        terms=Terms(request_timeout_s=5, idempotency_wait_s=5, budget=Budget(50), is_access_logged=False),
    )
    yield Server(phases, database, secret, workspace_id)
    await phases.drain(1)
    for part in (limits, idempotency, undelivered):
        part.close()
    await database.close()


def counting(answer: Callable[[Call, int], Any]) -> tuple[Callable[[Call], Any], list[Call]]:
    calls: list[Call] = []

    async def handler(call: Call) -> Response:
        calls.append(call)
        result = answer(call, len(calls))
        return await result if asyncio.iscoroutine(result) else result

    return handler, calls


async def test_key_opens_and_answer_has_rate_headers(server: Server) -> None:
    handler, calls = counting(lambda _call, _n: JSONResponse({"ok": True}, 201))
    answer = await server.post(server.app(handler))

    assert (answer.status, answer.json) == (201, {"ok": True})
    assert answer.headers["x-ratelimit-limit"] == "50"
    assert answer.headers["x-ratelimit-remaining"] == "49"
    assert calls[0].principal.workspace_id == server.workspace_id
    assert uuid.UUID(calls[0].effect_id).version == 7


@pytest.mark.parametrize("key", ["", "msk_live_wrong", "ü" * 600])
async def test_wrong_key_is_unauthenticated(server: Server, key: str) -> None:
    handler, calls = counting(lambda _call, _n: Response())
    answer = await server.post(server.app(handler), x_key=key)

    assert (answer.status, answer.json["code"]) == (401, "unauthenticated")
    assert calls == []


async def test_revoked_or_expired_key_is_refused_at_once(server: Server) -> None:
    app = server.app(counting(lambda _call, _n: Response())[0])
    expired, secret = make_key(server.workspace_id, expires_at=time.time() - 1)
    await server.database.write(
        lambda connection: keys.insert(connection, expired, secret_hash=digest(secret), is_test=True)
    )
    assert (await server.post(app, x_key=secret)).status == 401

    other, secret = make_key(server.workspace_id)
    await server.database.write(
        lambda connection: keys.insert(connection, other, secret_hash=digest(secret), is_test=True)
    )
    assert (await server.post(app, x_key=secret)).status == 200
    await server.database.write(
        lambda connection: keys.revoke(connection, server.workspace_id, other.id, at=time.time())
    )
    assert (await server.post(app, x_key=secret)).status == 401


@pytest.mark.parametrize(
    ("scopes", "wanted", "status"),
    [
        ((), "sandboxes:write", 200),
        (("sandboxes:write",), "sandboxes:write", 200),
        (("sandboxes:write",), "sandboxes:read", 200),
        (("sandboxes:read",), "sandboxes:write", 400),
        (("*",), "api-keys:write", 200),
        (("sandboxes:*",), "api-keys:read", 400),
        (("api-keys:read",), None, 200),
    ],
)
async def test_scope_decides(server: Server, scopes: tuple[str, ...], wanted: str | None, status: int) -> None:
    key, secret = make_key(server.workspace_id, scopes=scopes)
    await server.database.write(
        lambda connection: keys.insert(connection, key, secret_hash=digest(secret), is_test=True)
    )
    handler, _ = counting(lambda _call, _n: Response())
    answer = await server.post(server.app(handler, scope=wanted), x_key=secret)

    assert answer.status == status
    assert "x-ratelimit-remaining" in answer.headers
    if status == 400:
        assert answer.json["code"] == "forbidden"


async def test_rate_limit_counts_a_workspace_and_says_when_to_come_back(server: Server) -> None:
    app = server.app(counting(lambda _call, _n: Response())[0])
    for _ in range(50):
        assert (await server.post(app)).status == 200
    refused = await server.post(app)

    assert (refused.status, refused.json["code"]) == (429, "rate_limited")
    assert refused.headers["x-ratelimit-remaining"] == "0"
    assert 1 <= int(refused.headers["retry-after"]) <= 2
    assert (await server.post(server.app(counting(lambda _c, _n: Response())[0], limited=False))).status == 200


async def test_address_with_many_wrong_keys_has_to_wait_but_a_good_key_passes(server: Server) -> None:
    app = server.app(counting(lambda _call, _n: Response())[0])
    statuses = [(await server.post(app, x_key="no", x_forwarded_for="x, 192.0.2.1")).status for _ in range(7)]

    assert statuses == [401] * 6 + [429]
    assert (await server.post(app, x_key="no", x_forwarded_for="192.0.2.2")).status == 401
    assert (await server.post(app, x_forwarded_for="192.0.2.1")).status == 200


async def test_ticket_opens_once_for_its_purpose_only_while_its_key_lives(server: Server) -> None:
    key, secret = make_key(server.workspace_id)
    await server.database.write(
        lambda connection: keys.insert(connection, key, secret_hash=digest(secret), is_test=True)
    )
    principal = Principal(server.workspace_id, key.id, frozenset())

    async def issue(purpose: str, resource_id: str | None = None) -> str:
        ticket = make_secret("t_")
        await server.database.write(
            lambda connection: tickets.insert(
                connection,
                principal,
                ticket_hash=digest(ticket),
                purpose=purpose,
                resource_id=resource_id,
                expires_at=time.time() + 60,
            )
        )
        return ticket

    handler, calls = counting(lambda _call, _n: Response())
    events = server.app(handler, ticket_purpose="events")
    ticket = await issue("events")
    assert (await server.post(events, x_key="", x_ticket=ticket)).status == 200
    assert calls[0].principal.key_id == key.id
    assert (await server.post(events, x_key="", x_ticket=ticket)).status == 401
    assert (await server.post(events, x_key="", x_ticket=await issue("terminal"))).status == 401
    assert (await server.post(server.app(handler), x_key="", x_ticket=await issue("events"))).status == 401

    terminal = server.app(handler, ticket_purpose="terminal", ticket_resource="thing")
    assert (await server.post(terminal, x_key="", x_ticket=await issue("terminal", "other"))).status == 401
    assert (await server.post(terminal, x_key="", x_ticket=await issue("terminal", "it"))).status == 200

    late = await issue("events")
    await server.database.write(lambda connection: keys.revoke(connection, server.workspace_id, key.id, at=time.time()))
    assert (await server.post(events, x_key="", x_ticket=late)).status == 401


async def test_use_of_a_key_is_written_down_when_flushed(server: Server) -> None:
    await server.post(server.app(counting(lambda _call, _n: Response())[0]))
    await server.phases.authenticator.flush()
    found, _ = await server.database.read(lambda c: keys.find(c, server.workspace_id, offset=0, limit=1))

    assert found[0].last_used_at == pytest.approx(time.time(), abs=60)


async def test_repeat_with_the_key_gets_the_same_bytes_and_one_effect(server: Server) -> None:
    def make(_call: Call, number: int) -> Response:
        return Response(orjson.dumps({"n": number}), 201, {"location": "/x", "x-request-id": "1"}, "application/json")

    handler, calls = counting(make)
    app = server.app(handler)
    first = await server.post(app, idempotency_key="a key")
    again = await server.post(app, idempotency_key="a key")

    assert len(calls) == 1
    assert (again.status, again.body) == (first.status, first.body)
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["location"] == "/x"
    assert again.headers["content-type"] == "application/json"
    assert "idempotency-replayed" not in first.headers
    assert "x-request-id" not in again.headers  # the entry gives each request its own


@pytest.mark.parametrize("change", ["body", "path", "query"])
async def test_other_request_with_the_key_is_refused(server: Server, change: str) -> None:
    handler, calls = counting(lambda _call, n: JSONResponse(n))
    app = server.app(handler)
    await server.post(app, idempotency_key="k")
    answer = await {
        "body": lambda: server.post(app, body=b"[]", idempotency_key="k"),
        "path": lambda: server.post(app, "/do/other", idempotency_key="k"),
        "query": lambda: server.post(app, "/do/it?x=1", idempotency_key="k"),
    }[change]()

    assert answer.json["code"] == "idempotency_mismatch"
    assert len(calls) == 1


@pytest.mark.parametrize("key", ["x" * 256])
async def test_impossible_key_is_malformed(server: Server, key: str) -> None:
    handler, calls = counting(lambda _call, n: JSONResponse(n))
    assert (await server.post(server.app(handler), idempotency_key=key)).json["code"] == "malformed"
    assert calls == []


async def test_concurrent_duplicates_share_one_effect(server: Server) -> None:
    async def slowly(call: Call, _n: int) -> Response:
        await asyncio.sleep(0.05)
        return JSONResponse(call.effect_id)

    handler, calls = counting(slowly)
    app = server.app(handler)
    answers = await asyncio.gather(*(server.post(app, idempotency_key="k") for _ in range(10)))

    assert len(calls) == 1
    assert {answer.body for answer in answers} == {answers[0].body}


@pytest.mark.parametrize(
    ("code", "calls_made", "same_effect"),
    [
        ("validation_failed", 1, True),  # determined: replayed
        ("sandbox_not_found", 1, True),
        ("no_capacity", 2, False),  # nothing was done: afresh
        ("host_unavailable", 2, True),  # who knows: the same effect again
        ("internal", 2, True),
        ("disk_full", 2, True),
    ],
)
async def test_failure_is_kept_forgotten_or_tried_again(
    server: Server, code: str, calls_made: int, same_effect: bool
) -> None:
    def fail(_call: Call, _n: int) -> Response:
        raise GatewayError(code, "no")

    handler, calls = counting(fail)
    app = server.app(handler)
    first = await server.post(app, idempotency_key="k")
    second = await server.post(app, idempotency_key="k")

    assert first.json["code"] == second.json["code"] == code
    assert len(calls) == calls_made
    assert (len({call.effect_id for call in calls}) == 1) is same_effect


async def test_bug_in_a_handler_is_internal_without_a_word_about_it(server: Server) -> None:
    def fail(_call: Call, _n: int) -> Response:
        raise RuntimeError("secret detail")

    answer = await server.post(server.app(counting(fail)[0]))

    assert (answer.status, answer.json["code"]) == (500, "internal")
    assert b"secret" not in answer.body


async def test_deadline_ends_a_handler(server: Server) -> None:
    async def forever(_call: Call, _n: int) -> Response:
        await asyncio.Event().wait()
        raise AssertionError

    answer = await server.post(server.app(counting(forever)[0], timeout_s=0.05))
    assert (answer.status, answer.json["code"]) == (504, "timeout")


async def test_change_is_finished_and_recorded_when_its_caller_leaves(server: Server) -> None:
    leave, go = asyncio.Event(), asyncio.Event()

    async def wait(_call: Call, _n: int) -> Response:
        leave.set()
        await go.wait()
        return JSONResponse("done")

    handler, calls = counting(wait)
    app = server.app(handler)
    assert (await server.post(app, idempotency_key="k", leave=leave)).status == 0
    go.set()
    answer = await server.post(app, idempotency_key="k")

    assert answer.json == "done"
    assert len(calls) == 1


async def test_read_is_cancelled_when_its_caller_leaves(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.delivery._WATCH_AFTER_S", 0.01)
    leave, ended = asyncio.Event(), asyncio.Event()

    async def wait(_call: Call, _n: int) -> Response:
        leave.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    answer = await server.post(server.app(counting(wait)[0], mutates=False), leave=leave)

    assert answer.status == 0
    assert ended.is_set()


async def test_repeat_of_an_abandoned_request_joins_it(server: Server) -> None:
    leave, go = asyncio.Event(), asyncio.Event()

    async def wait(_call: Call, number: int) -> Response:
        leave.set()
        await go.wait()
        return JSONResponse(number)

    handler, calls = counting(wait)
    app = server.app(handler, is_repeat_possible=lambda _request: True)
    assert (await server.post(app, leave=leave)).status == 0
    repeat = asyncio.create_task(server.post(app))
    other = asyncio.create_task(server.post(app, body=b'{"another": 1}'))
    await asyncio.sleep(0.05)
    assert len(calls) == 2
    go.set()

    assert (await repeat).json == 1
    assert (await other).json == 2
    assert (await server.post(app)).json == 3  # it has been delivered: this one is meant


async def test_answer_that_came_too_late_for_its_caller_goes_to_the_repeat(server: Server) -> None:
    leave, go = asyncio.Event(), asyncio.Event()

    async def wait(_call: Call, number: int) -> Response:
        leave.set()
        await go.wait()
        return JSONResponse(number)

    handler, _ = counting(wait)
    app = server.app(handler, is_repeat_possible=lambda _request: True)
    await server.post(app, leave=leave)
    go.set()
    await server.phases.drain(5)

    assert (await server.post(app)).json == 1
    assert (await server.post(app)).json == 2


async def test_two_attended_requests_never_share_an_answer(server: Server) -> None:
    async def slowly(_call: Call, number: int) -> Response:
        await asyncio.sleep(0.02)
        return JSONResponse(number)

    handler, _ = counting(slowly)
    app = server.app(handler, is_repeat_possible=lambda _request: True)
    answers = await asyncio.gather(*(server.post(app) for _ in range(5)))

    assert sorted(answer.json for answer in answers) == [1, 2, 3, 4, 5]


async def test_long_call_gets_its_status_and_white_space_early(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_HEARTBEAT_S", 0.02)

    async def slowly(_call: Call, number: int) -> Response:
        await asyncio.sleep(0.1)
        if number == 2:
            raise GatewayError("agent_unavailable", "gone")
        return JSONResponse({"exit_code": 7})

    app = server.app(counting(slowly)[0], early_status=200)
    answer = await server.post(app, idempotency_key="k")
    assert answer.status == 200
    assert answer.body.startswith(b"  ")
    assert answer.json == {"exit_code": 7}
    assert answer.headers["x-ratelimit-limit"] == "50"

    replay = await server.post(app, idempotency_key="k")
    assert replay.body == b'{"exit_code":7}'
    failed = await server.post(app)
    assert (failed.status, failed.json["code"], failed.json["late"]) == (200, "agent_unavailable", True)


async def test_streamed_answer_is_not_recorded(server: Server) -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"

    handler, calls = counting(lambda _call, _n: StreamingResponse(parts(), media_type="text/event-stream"))
    app = server.app(handler, streams_answer=True)
    for _ in range(2):
        assert (await server.post(app, idempotency_key="k")).body == b"data: 1\n\n"

    assert len(calls) == 2


async def test_streamed_body_is_left_to_the_handler(server: Server) -> None:
    async def count(call: Call, _n: int) -> Response:
        return JSONResponse(sum([len(part) async for part in call.request.stream()]))

    handler, calls = counting(count)
    app = server.app(handler, streams_body=True)
    assert (await server.post(app, body=b"12345", idempotency_key="k", content_length="5")).json == 5
    assert (await server.post(app, body=b"54321", idempotency_key="k", content_length="5")).json == 5
    assert (await server.post(app, body=b"1234", idempotency_key="k", content_length="4")).json["code"] == (
        "idempotency_mismatch"
    )
    assert len(calls) == 1


async def test_public_operation_needs_no_key(server: Server) -> None:
    handler, calls = counting(lambda _call, _n: Response())

    assert (await server.post(server.app(handler, public=True), x_key="")).status == 200
    assert calls[0].principal.scopes == frozenset({"none"})


async def test_drain_lets_changes_end_and_cancels_the_rest(server: Server) -> None:
    leave = asyncio.Event()

    async def forever(_call: Call, _n: int) -> Response:
        leave.set()
        await asyncio.Event().wait()
        raise AssertionError

    handler, calls = counting(forever)
    app = server.app(handler, timeout_s=60)
    await server.post(app, idempotency_key="k", leave=leave)
    await server.phases.drain(0.01)

    handler2, calls2 = counting(lambda _call, _n: JSONResponse("resumed"))
    assert (await server.post(server.app(handler2), idempotency_key="k")).json == "resumed"
    assert calls2[0].effect_id == calls[0].effect_id
