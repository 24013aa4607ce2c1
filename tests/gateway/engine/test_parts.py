"""The engine's pure parts: plans, paths, output, trees, translation."""

from __future__ import annotations

import itertools
import re
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.commands import CreateSandbox
from gateway.engine import translate
from gateway.engine.files import tree
from gateway.engine.output import last_lines, signal_number
from gateway.engine.paths import readable, writable
from gateway.engine.plan import Origin, make_slug, plan
from gateway.engine.urls import preview_url
from gateway.errors import CODES, GatewayError
from gateway.resources import FileEntry, OutputChunk, Principal
from gateway.settings import Settings
from vmm.errors import AgentError

CALLER = Principal("w", "k", frozenset())
SETTINGS = Settings()


def planned(**fields: object) -> CreateSandbox:
    return replace(CreateSandbox(str(uuid.uuid4())), **fields)  # type: ignore[arg-type]


def test_a_plan_fills_in_the_defaults() -> None:
    sandbox = plan(CALLER, planned(), SETTINGS, origin=Origin("base", "base"), now=1000.0)
    assert (sandbox.cpu_count, sandbox.memory_mib, sandbox.disk_mib) == (
        SETTINGS.sandbox_cpu_count,
        SETTINGS.sandbox_memory_mib,
        SETTINGS.sandbox_disk_mib,
    )
    assert sandbox.expires_at == 1000.0 + SETTINGS.sandbox_timeout_s
    assert (sandbox.owner_key_id, sandbox.region) == ("k", SETTINGS.region)


def test_always_on_knows_no_timers() -> None:
    command = planned(always_on=True, timeout_s=5.0, idle_timeout_s=5.0)
    sandbox = plan(CALLER, command, SETTINGS, origin=Origin("base", "base"), now=1000.0)
    assert (sandbox.timeout_s, sandbox.idle_timeout_s, sandbox.expires_at) == (None, None, None)


@pytest.mark.parametrize(
    ("field", "most", "step"),
    [
        ("cpu_count", SETTINGS.sandbox_cpu_count_max, 0.1),
        ("memory_mib", SETTINGS.sandbox_memory_mib_max, 1),
        ("disk_mib", SETTINGS.sandbox_disk_mib_max, 1),
        ("timeout_s", SETTINGS.sandbox_timeout_max_s, 1.0),
    ],
)
def test_a_plan_is_bounded(field: str, most: float, step: float) -> None:
    for value in (most - step, most):
        assert (
            getattr(plan(CALLER, planned(**{field: value}), SETTINGS, origin=Origin("base", "base"), now=0.0), field)
            == value
        )
    for value in (most + step, 0, -1):
        with pytest.raises(GatewayError, match="validation_failed"):
            plan(CALLER, planned(**{field: value}), SETTINGS, origin=Origin("base", "base"), now=0.0)


@pytest.mark.parametrize("slug", ["ab", "-abc", "abc-", "ABC", "a_b", "a" * 41, "ä" * 5, ""])
def test_a_slug_that_is_no_host_label_is_refused(slug: str) -> None:
    with pytest.raises(GatewayError, match="slug"):
        plan(CALLER, planned(slug=slug), SETTINGS, origin=Origin("base", "base"), now=0.0)


def test_made_slugs_are_host_labels_and_differ() -> None:
    slugs = {make_slug() for _ in range(100)}
    assert len(slugs) == 100
    assert all(re.fullmatch(r"[a-z]{8}[2-9]{2}", slug) for slug in slugs)


def test_relative_paths_begin_in_the_workspace() -> None:
    assert readable("a b#.txt") == "/workspace/a b#.txt"
    assert writable("./x/../y//z/") == "/workspace/y/z"
    assert writable("//workspace/x") == "/workspace/x"


@pytest.mark.parametrize(
    "path", ["../etc/passwd", "/etc/passwd", "/workspace/../etc", "/workspaces/x", "/", "/homes/x"]
)
def test_writing_outside_the_roots_is_refused(path: str) -> None:
    with pytest.raises(GatewayError, match="path_forbidden"):
        writable(path)


@pytest.mark.parametrize("path", ["/proc/1/environ", "/sys", "/dev/zero", "../dev/null"])
def test_reading_kernel_interfaces_is_refused(path: str) -> None:
    with pytest.raises(GatewayError, match="path_forbidden"):
        readable(path)


@pytest.mark.parametrize("path", ["", "a\0b", "\ud800", "x" * 256, "/workspace/" + "x/" * 2100])
def test_impossible_paths_are_refused(path: str) -> None:
    with pytest.raises(GatewayError, match="path_invalid"):
        readable(path)


def test_names_and_paths_may_be_as_long_as_linux_allows() -> None:
    assert readable("x" * 255).endswith("x" * 255)
    longest = "/tmp" + "/x" * 2045 + "y"
    assert len(longest) == 4095
    assert readable(longest) == longest
    with pytest.raises(GatewayError, match="path_invalid"):
        readable(longest + "z")


@given(st.text(), st.sampled_from(["", "/", "/workspace/", "../"]))
def test_a_writable_path_never_escapes(tail: str, head: str) -> None:
    try:
        path = writable(head + tail)
    except GatewayError:
        return
    assert path.startswith("/")
    assert ".." not in path.split("/")


def chunks_of(*parts: bytes) -> list[OutputChunk]:
    offsets = itertools.accumulate(map(len, parts), initial=0)
    return [OutputChunk("stdout", offset, part) for part, offset in zip(parts, offsets, strict=False)]


@given(st.lists(st.text("ab\n", max_size=6).map(str.encode)), st.integers(1, 5))
def test_last_lines_are_those_that_splitting_gives(parts: list[bytes], count: int) -> None:
    whole = b"".join(parts)
    kept = last_lines(chunks_of(*parts), count)
    lines = re.findall(rb"[^\n]*\n|[^\n]+\Z", whole)
    assert b"".join(chunk.data for chunk in kept) == b"".join(lines[-count:])
    assert all(whole[chunk.offset :].startswith(chunk.data) for chunk in kept)


def test_signals_are_numbers_whatever_they_were() -> None:
    assert [signal_number(value) for value in ("SIGKILL", 15, None, "SIGNONE")] == [9, 15, None, None]


def entry(path: str) -> FileEntry:
    return FileEntry(path.rpartition("/")[2], path, "dir", 0, 0o755, 0.0)


def test_a_tree_is_built_from_a_list() -> None:
    root = tree(entry("/w"), [entry("/w/a"), entry("/w/a/b"), entry("/w/c")])
    assert [child.entry.path for child in root.children] == ["/w/a", "/w/c"]
    assert [child.entry.path for child in root.children[0].children] == ["/w/a/b"]
    assert [child.entry.path for child in tree(entry("/"), [entry("/a")]).children] == ["/a"]


def test_every_code_of_the_protocol_is_translated() -> None:
    protocol = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
    listed = "".join(
        line for line in protocol.splitlines() if line.startswith(("Error codes:", "Further error codes:"))
    )
    assert set(re.findall(r"`(\w+)`", listed)) - {"detail"} <= set(translate.CODES)
    assert set(translate.CODES.values()) <= set(CODES)


def test_an_unknown_code_is_a_fault_of_ours() -> None:
    with pytest.raises(GatewayError) as caught, translate.vmm_errors():
        raise AgentError("brand_new", "what is this")
    assert caught.value.code == "internal"
    assert isinstance(caught.value.__cause__, AgentError)


def test_preview_urls_have_the_port_that_clients_use() -> None:
    assert preview_url(Settings(listen="127.0.0.1:8080"), "abc", 3000) == "http://3000-abc.sandbox.localhost:8080"
    public = Settings(public_url="https://api.example.org", domain="example.org")
    assert preview_url(public, "abc", 3000) == "https://3000-abc.sandbox.example.org"
