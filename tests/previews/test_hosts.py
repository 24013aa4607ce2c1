"""The host grammar: the vectors hold for the Python and the Rust parser, and the two agree on anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from native import hosts as native_hosts
from previews.errors import HostError
from previews.hosts import AGENT_PORT, parse_host, preview_host, preview_id_host

VECTORS = json.loads((Path(__file__).parents[1] / "vectors/hosts.json").read_text())


def python_view(header: str, domains: list[str]) -> dict[str, Any]:
    try:
        target = parse_host(header, domains)
    except HostError as error:
        return {"error": error.code}
    view = {"kind": target.kind, "port": target.port, "slug": target.slug, "id_prefix": target.id_prefix}
    return {key: value for key, value in view.items() if value is not None}


def rust_view(header: str, domains: list[str]) -> dict[str, Any]:
    try:
        target = native_hosts.parse_host(header, domains)
    except native_hosts.HostError:
        return {"error": None}
    return {key: value for key, value in target._asdict().items() if value is not None}


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["host"][:40] or "empty")
def test_vectors_hold_in_python(case: dict[str, Any]) -> None:
    assert python_view(case["host"], case.get("domains", VECTORS["domains"])) == case["want"]


LABELS = st.one_of(
    st.sampled_from(["sandbox", "preview", "computer", "localhost", "example", "com", "api", "3000-demo", "[::1]", ""]),
    st.from_regex(r"[0-9]{1,6}-[a-zA-Z0-9-]{0,8}", fullmatch=True),
    st.from_regex(r"sbx-[0-9a-f]{6,14}-[0-9]{0,6}", fullmatch=True),
    st.text(max_size=70),
)
HOSTS = st.builds(
    lambda labels, port: ".".join(labels) + port,
    st.lists(LABELS, max_size=6),
    st.one_of(st.just(""), st.from_regex(r":[0-9]{0,6}", fullmatch=True), st.text(max_size=3)),
)


@given(HOSTS, st.lists(st.sampled_from(["localhost", "example.com", "a.example.com"]), max_size=3))
@example("[::ffff:1.2.3.4]:80", ["localhost"])
@example("[fe80::1%eth0]", ["localhost"])
@example("[::١]", ["localhost"])
@example("1٣-a.sandbox.localhost", ["localhost"])
@example("a\n", ["localhost"])
@example("İ.localhost", ["localhost"])
def test_both_parsers_agree(header: str, domains: list[str]) -> None:
    seen = python_view(header, domains)
    assert rust_view(header, domains) == ({"error": None} if "error" in seen else seen)


@given(
    st.integers(1, 65535).filter(lambda port: port != AGENT_PORT),
    st.from_regex(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?", fullmatch=True),
)
def test_what_is_made_is_read_back(port: int, slug: str) -> None:
    target = native_hosts.parse_host(preview_host(port, slug, "localhost").upper(), ["localhost"])
    assert (target.kind, target.port, target.slug) == ("preview", port, slug)


@given(st.uuids(), st.integers(1, 10_000))
def test_hosts_by_id_are_read_back(sandbox: Any, port: int) -> None:
    target = native_hosts.parse_host(preview_id_host(port, str(sandbox), "example.com"), ["example.com"])
    assert (target.kind, target.port) == ("preview", port)
    assert target.id_prefix is not None
    assert sandbox.hex.startswith(target.id_prefix)


@pytest.mark.parametrize("port", [0, -1, 65536, AGENT_PORT])
def test_hosts_for_impossible_ports_are_refused(port: int) -> None:
    with pytest.raises(HostError, match="bad_port"):
        preview_host(port, "demo", "localhost")


@pytest.mark.parametrize("slug", ["", "-a", "a-", "A", "a_b", "a.b", "a\n", "a" * 58])
def test_hosts_for_impossible_slugs_are_refused(slug: str) -> None:
    with pytest.raises(HostError, match="bad_name"):
        preview_host(80, slug, "localhost")


def test_hosts_for_what_is_no_uuid_are_refused() -> None:
    with pytest.raises(HostError, match="bad_name"):
        preview_id_host(80, "c0ffee", "localhost")
