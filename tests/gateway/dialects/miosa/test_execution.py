import base64
import itertools
import json
import math
from pathlib import Path

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.miosa import execution, outputs
from gateway.dialects.miosa.execution import ExecRequest, command_line
from gateway.errors import GatewayError
from gateway.resources import ExecResult, OutputChunk

VECTORS = Path(__file__).resolve().parents[3] / "vectors"


def request(**fields) -> ExecRequest:
    return msgspec.convert(fields, ExecRequest)


@pytest.mark.parametrize(
    ("fields", "argv", "shell"),
    [
        ({"cmd": ["ls", "-l"]}, ["ls", "-l"], None),
        ({"command": ["ls", "-l"]}, ["ls", "-l"], None),
        ({"cmd": ["ls"], "args": ["-l"]}, ["ls", "-l"], None),
        ({"cmd": "ls", "args": ["-l"]}, ["ls", "-l"], None),
        ({"cmd": "ls", "args": []}, ["ls"], None),
        ({"cmd": "ls -l | wc"}, None, "ls -l | wc"),
        ({"command": "ls -l | wc"}, None, "ls -l | wc"),
    ],
)
def test_command_in_all_spellings(fields, argv, shell):
    assert command_line(request(**fields)) == (argv, shell)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "command"),
        ({"cmd": ""}, "cmd"),
        ({"command": "  \n"}, "command"),
        ({"args": ["-l"]}, "command"),
        ({"cmd": ["a"], "command": "b"}, "command"),
    ],
)
def test_what_is_no_command_names_the_field(fields, field):
    with pytest.raises(GatewayError) as caught:
        command_line(request(**fields))
    assert [problem.field for problem in caught.value.details] == [field]


@pytest.mark.parametrize("fields", [{"cmd": []}, {"cmd": ["a\0"]}, {"cmd": 1}, {"cmd": ["a"], "user": "a b"}])
def test_what_no_command_can_be_is_refused(fields):
    with pytest.raises(msgspec.ValidationError):
        request(**fields)


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"timeout_ms": 1500}, 1.5),
        ({"timeout": 2}, 2),
        ({"timeout_sec": 3}, 3),
        ({"timeout_seconds": 4.5}, 4.5),
        ({}, None),
    ],
)
def test_timeout_in_all_spellings(fields, seconds):
    assert request(cmd=["a"], **fields).timeout_s == seconds


@pytest.mark.parametrize("fields", [{"timeout_ms": 99}, {"timeout_ms": 600_001}, {"timeout": 601}, {"timeout": 0}])
def test_timeout_is_bounded(fields):
    with pytest.raises(msgspec.ValidationError):
        request(cmd=["a"], **fields)


def test_sudo_means_root():
    assert request(cmd=["a"], sudo=True, user="user").runs_as == "root"
    assert request(cmd=["a"], user="user").runs_as == "user"


def result(**changes) -> ExecResult:
    fields = {"stdout": b"", "stderr": b"", "exit_code": 0, "signal": None, "reason": "exited", "duration_ms": 1.6}
    return ExecResult(**{**fields, **changes})


def test_result_tells_failure():
    answer = execution.exec_result(result(exit_code=7, stdout=b"a", stderr=b"b"))
    assert (answer["exit_code"], answer["success"], answer["output"], answer["duration_ms"]) == (7, False, "ab", 2)


def test_result_keeps_bytes_that_are_no_text():
    answer = execution.exec_result(result(stdout=b"a\xffb"))
    assert answer["stdout"] == "a\ufffdb"
    assert base64.b64decode(answer["stdout_base64"]) == b"a\xffb"
    assert "stderr_base64" not in answer


def test_result_says_when_time_ran_out():
    assert execution.exec_result(result(exit_code=124, reason="timeout"))["timed_out"] is True


class Output:
    """A process that wrote the given items and is silent after them."""

    def __init__(self, *items) -> None:
        self._items = list(items)

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self._items:
            raise StopAsyncIteration
        return self._items.pop(0)

    async def aclose(self) -> None:
        self._items.clear()


async def frames_of(*items) -> list[dict]:
    text = b"".join([frame async for frame in outputs.frames(Output(*items))])
    return [orjson.loads(line[6:]) for line in text.splitlines() if line.startswith(b"data: ")]


def chunk(data: bytes, stream="stdout") -> OutputChunk:
    return OutputChunk(stream, 0, data)


async def test_one_frame_per_line():
    frames = await frames_of(chunk(b"one\ntw"), chunk(b"err\n", "stderr"), chunk(b"o\nthree"))
    assert [(frame["type"], frame.get("line")) for frame in frames] == [
        ("stdout", "one\n"),
        ("stderr", "err\n"),
        ("stdout", "two\n"),
        ("stdout", "three"),
    ]


@given(data=st.binary(max_size=200), cuts=st.lists(st.integers(0, 200), max_size=6))
async def test_lines_are_the_same_however_the_bytes_are_cut(data, cuts):
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [chunk(data[start:end]) for start, end in itertools.pairwise(edges)]
    frames = await frames_of(*pieces)
    assert "".join(frame["line"] for frame in frames) == data.decode("utf-8", "replace")
    assert all(frame["line"].endswith("\n") for frame in frames[:-1])


async def test_lines_are_those_that_the_plane_makes():
    """The plane's own test reads the same table."""
    for pieces, expected in json.loads((VECTORS / "output_lines.json").read_bytes()):
        frames = await frames_of(*[chunk(bytes(piece)) for piece in pieces])
        assert "".join(f"<{orjson.dumps(frame['line']).decode()[1:-1]}>" for frame in frames) == expected


async def test_terminal_output_counts_as_stdout():
    assert (await frames_of(chunk(b"x\n", "pty")))[0]["type"] == "stdout"


def test_streams_end_with_their_process_not_with_a_deadline():
    for route in execution.ROUTES:
        if route.answer.media_type == "text/event-stream":
            assert math.isinf(route.terms["timeout_s"])
            assert not route.mutates
