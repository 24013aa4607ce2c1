import os
import subprocess
import sys

import pytest
from msgspec import Struct, ValidationError, convert

from gateway.dialects.miosa import decode
from gateway.errors import GatewayError
from tests.support.calls import make_call, make_request


class Thing(Struct, kw_only=True):
    name: decode.Name
    port: decode.Port = 80
    env: decode.Env | None = None
    tags: decode.Tags | None = None


def problems(error: GatewayError) -> dict[str, str]:
    return {problem.field: problem.reason for problem in error.details}


async def refused(raw: bytes, headers: dict[str, str] | None = None) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        await decode.body(make_call(raw, headers=headers), Thing)
    return caught.value


async def test_body_is_typed_and_unknown_fields_are_ignored():
    thing = await decode.body(make_call(b'{"name": "a", "port": 8080, "colour": "red"}'), Thing)
    assert (thing.name, thing.port) == ("a", 8080)


async def test_all_bad_fields_are_named_at_once():
    error = await refused(b'{"port": 0, "env": {"A": 1}, "tags": ["ok", ""]}')
    assert error.code == "validation_failed"
    assert problems(error) == {
        "name": "is required",
        "port": "expected int >= 1",
        "env[...]": "expected str, got int",
        "tags[1]": "expected str of length >= 1",
    }


@pytest.mark.parametrize(
    ("raw", "field", "reason"),
    [
        (b'{"name": "a\\u0000b"}', "name", "must not contain control characters"),
        (b'{"name": "a", "env": {"1A": "x"}}', "env", "a name in it must be a variable name"),
        (b'{"name": "a", "env": {"A": "x\\u0000"}}', "env[...]", "must not contain NUL"),
        (b'{"name": true}', "name", "expected str, got bool"),
        (b'{"name": "a", "port": 65536}', "port", "expected int <= 65535"),
        (b'{"name": "a", "port": "80"}', "port", "expected int, got str"),
        (b'{"name": "' + b"x" * 121 + b'"}', "name", "expected str of length <= 120"),
    ],
)
async def test_reasons_are_words(raw, field, reason):
    error = await refused(raw)
    assert reason in problems(error)[field]


@pytest.mark.parametrize("path", ["/", "/docs", "/docs/", "/a.b/..c/d..", "/a%20b/...", "/.well-known/x"])
def test_url_paths(path):
    assert convert(path, decode.UrlPath) == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        "docs",
        "//x",
        "/a//b",
        "/..",
        "/.",
        "/../x",
        "/a/../b",
        "/a/.",
        "/%2e%2E/x",
        "/a%2fb",
        "/a\\b",
        "/a b",
        "/?x",
    ],
)
def test_paths_that_servers_read_differently_are_refused(path):
    with pytest.raises(ValidationError):
        convert(path, decode.UrlPath)


@pytest.mark.parametrize(
    "raw", [b"{", b"[1]", b'"x"', b"null", b"\xff", b'{"name": "\xff"}', b'{"name": "\\ud800"}', b"[" * 100_000]
)
async def test_what_is_no_json_object_is_malformed(raw):
    assert (await refused(raw)).code == "malformed"


async def test_absent_body_is_an_empty_object():
    assert problems(await refused(b"")) == {"name": "is required"}


async def test_other_media_types_are_refused_by_name():
    error = await refused(b"name=a", {"content-type": "application/x-www-form-urlencoded"})
    assert error.code == "malformed"
    assert "application/json" in error.message


@pytest.mark.parametrize(
    "media_type", ["application/json", "application/json; charset=utf-8", "application/x+json", ""]
)
async def test_json_media_types_are_accepted(media_type):
    call = make_call(b'{"name": "a"}', headers={"content-type": media_type})
    assert (await decode.body(call, Thing)).name == "a"


async def test_size_is_limited_to_the_byte():
    raw = b'{"name": "a"}'
    assert (await decode.body(make_call(raw), Thing, bytes_max=len(raw))).name == "a"
    with pytest.raises(GatewayError, match="too_large"):
        await decode.body(make_call(raw), Thing, bytes_max=len(raw) - 1)


def test_query_values_are_converted_and_repeats_joined():
    class Query(Struct):
        page: int = 1
        tags: str | None = None
        deep: bool = False

    query = decode.query(make_request(query={"page": "3", "tags": ["a", "b"], "deep": "true"}), Query)
    assert (query.page, query.tags, query.deep) == (3, "a,b", True)
    with pytest.raises(GatewayError) as caught:
        decode.query(make_request(query={"page": "three"}), Query)
    assert problems(caught.value) == {"page": "expected int, got str"}


@pytest.mark.parametrize("raw", ["", "x", "../etc", "0193f2a0", "0193f2a0-0000-7000-8000-00000000000g"])
def test_what_is_no_uuid_names_no_sandbox(raw):
    with pytest.raises(GatewayError) as caught:
        decode.sandbox_id(make_call(path_params={"sandbox_id": raw}))
    assert caught.value.code == "sandbox_not_found"


@pytest.mark.parametrize("raw", ["", "-1", "1.5", "x", "99999999999", "１"])
def test_what_is_no_pid_names_no_process(raw):
    with pytest.raises(GatewayError) as caught:
        decode.pid(make_call(path_params={"pid": raw}))
    assert caught.value.code == "process_not_found"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2027-01-01T00:00:00Z", 1798761600.0),
        ("2027-01-01T01:00:00+01:00", 1798761600.0),
        ("2027-01-01", 1798761600.0),
        (None, None),
    ],
)
def test_times(text, expected):
    assert decode.timestamp("expires_at", text) == expected


@pytest.mark.parametrize("text", ["tomorrow", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00"])
def test_bad_time_names_the_field(text):
    with pytest.raises(GatewayError) as caught:
        decode.timestamp("expires_at", text)
    assert "expires_at" in problems(caught.value)


@pytest.mark.parametrize(("text", "expected"), [("YWJj", b"abc"), ("YW\nJj ", b"abc"), ("", b"")])
def test_base64(text, expected):
    assert decode.base64_bytes("content", text) == expected


@pytest.mark.parametrize("text", ["YWJ", "YWJj!", "häh?", "YQ=x"])
def test_bad_base64_names_the_field(text):
    with pytest.raises(GatewayError) as caught:
        decode.base64_bytes("content", text)
    assert problems(caught.value) == {"content": "must be base64"}


def test_metadata_is_bounded():
    assert decode.metadata({"a": "x" * 16_000}) is not None
    with pytest.raises(GatewayError, match="metadata"):
        decode.metadata({"a": "x" * 17_000})


def test_refusing_a_command_leaves_the_decoder_whole():
    # In a process of its own: msgspec corrupts memory when it frees certain unions, at the latest when Python ends.
    script = """
from gateway.dialects.miosa.decode import json_object
from gateway.dialects.miosa.execution import ExecRequest
from gateway.errors import GatewayError

for command in ('[""]', "[1]", '"a\\\\u0000"', '["a\\\\u0000"]', "[]", '"ls"') * 200:
    try:
        json_object(('{"timeout": -1, "command": ' + command + "}").encode(), ExecRequest)
    except GatewayError as error:
        assert error.code == "validation_failed", error
print(json_object(b'{"command": ["ls"]}', ExecRequest).command)
"""
    checked = {**os.environ, "PYTHONMALLOC": "debug"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=checked, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "['ls']\n"), done.stderr
