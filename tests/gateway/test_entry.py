import re

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from gateway.dialects.miosa.errors import error_response
from gateway.entry import BodyLimits, Entry, Mounted, canonical_path, new_request_id
from gateway.errors import GatewayError
from gateway.pipeline import REQUEST_ID, Credentials, Operation, SocketOperation


async def unused(*_args):
    raise AssertionError


class Echo:
    """A dialect with one route of each sort; errors look like MIOSA's."""

    name = "echo"
    operations = (
        Operation("POST", "/echo/{rest:path}", unused),
        Operation("POST", "/upload", unused, streams_body=True),
        Operation("GET", "/page", unused),
    )
    sockets = (SocketOperation("/socket", unused),)

    def credentials(self, connection):
        return Credentials()

    def error_response(self, error, request_id, *, status_sent=False):
        return error_response(error, request_id)


async def echo(request: Request) -> JSONResponse:
    try:
        body = await request.body()
    except GatewayError as error:
        return error_response(error, request.scope[REQUEST_ID])
    return JSONResponse({"path": request.url.path, "rest": request.path_params.get("rest"), "size": len(body)})


async def page(request: Request) -> PlainTextResponse:
    return PlainTextResponse("x", headers={"content-security-policy": "default-src 'self'"})


async def socket(connection: WebSocket) -> None:
    await connection.accept()
    await connection.close()


async def healthz(scope, receive, send) -> None:
    await PlainTextResponse("ok")(scope, receive, send)


def make_entry() -> Entry:
    routes = [
        Route("/echo/{rest:path}", echo, methods=["POST"]),
        Route("/upload", echo, methods=["POST"]),
        Route("/page", page, methods=["GET"]),
        WebSocketRoute("/socket", socket),
    ]
    mounted = [Mounted(Echo(), "/api/v1", routes)]
    return Entry(mounted, own={"/healthz": healthz}, limits=BodyLimits(10, 20))


@pytest.fixture
async def client():
    transport = httpx.ASGITransport(make_entry())
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.mark.parametrize("prefix", ["/api/v1", "", "/api/v1/api/v1", "/api/v1/api/v1/api/v1"])
async def test_prefix_may_be_missing_or_repeated(client, prefix):
    answer = await client.post(f"{prefix}/echo/a/b%20c", content=b"x")
    assert answer.json() == {"path": "/api/v1/echo/a/b c", "rest": "a/b c", "size": 1}


@pytest.mark.parametrize("path", ["/api/v1/page/", "/page/", "/api/v1/page"])
async def test_trailing_slash_does_not_matter(client, path):
    assert (await client.get(path)).text == "x"


@given(st.text("/apiv1x", max_size=20))
def test_canonical_path_has_the_prefix_exactly_once(path):
    found = canonical_path("/" + path, "/api/v1")
    assert re.match(r"/api/v1(?!/api/v1(/|$))", found)
    assert canonical_path(found, "/api/v1") == found


@pytest.mark.parametrize("path", ["/api/v1/nothing", "/nothing", "/api/v1", "/", "/api/v1x", "/echo"])
async def test_unknown_route_is_a_404_of_the_api(client, path):
    answer = await client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


async def test_wrong_method_is_a_405_of_the_api(client):
    answer = await client.delete("/api/v1/echo/x")
    assert answer.status_code == 405
    assert answer.json()["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"


async def test_every_answer_has_an_id_and_is_not_cached_or_framed(client):
    answer = await client.get("/nothing")
    assert re.fullmatch(r"req_[0-9a-z]{26}", answer.headers["x-request-id"])
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


async def test_a_route_may_have_a_policy_of_its_own(client):
    assert (await client.get("/page")).headers["content-security-policy"] == "default-src 'self'"


def test_request_ids_sort_by_time():
    ids = [new_request_id() for _ in range(3)]
    assert len(set(ids)) == 3
    assert ids[0][:10] <= ids[2][:10]


@pytest.mark.parametrize(("path", "limit"), [("/echo/x", 10), ("/upload", 20)])
async def test_body_limit_is_exact(client, path, limit):
    assert (await client.post(path, content=bytes(limit))).json()["size"] == limit
    answer = await client.post(path, content=bytes(limit + 1))
    assert answer.status_code == 413
    assert answer.json()["code"] == "payload_too_large"


@pytest.mark.parametrize(("path", "limit"), [("/echo/x", 10), ("/upload", 20)])
async def test_body_of_unknown_length_is_counted(client, path, limit):
    async def pieces(size):
        for _ in range(size):
            yield b"x"

    assert (await client.post(path, content=pieces(limit))).json()["size"] == limit
    assert (await client.post(path, content=pieces(limit + 1))).status_code == 413


async def test_body_that_says_it_is_too_large_is_not_read():
    async def receive():
        raise AssertionError("the body was read")

    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/upload",
        "raw_path": b"/upload",
        "query_string": b"",
        "headers": [(b"content-length", b"21")],
    }
    await make_entry()(scope, receive, send)
    assert sent[0]["status"] == 413


@pytest.mark.parametrize("path", ["/echo/%ff", "/echo/x?path=%ff", "/echo/%c3"])
async def test_what_is_not_utf8_is_refused(client, path):
    answer = await client.post(path)
    assert answer.status_code == 400
    assert answer.json()["code"] == "bad_request"


async def test_replacement_character_is_a_name_like_any_other(client):
    assert (await client.post("/echo/%ef%bf%bd")).json()["rest"] == "\ufffd"


async def test_own_paths_stand_beside_the_dialects(client):
    assert (await client.get("/healthz")).text == "ok"
    assert "x-request-id" in (await client.get("/healthz")).headers


async def test_unknown_socket_is_closed():
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/nothing", "raw_path": b"/nothing", "query_string": b"", "headers": []}
    await make_entry()(scope, unused, send)
    assert [message["type"] for message in sent] == ["websocket.close"]
