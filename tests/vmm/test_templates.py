"""Recipes and the store of built templates. Building itself is exercised by every test with a real machine."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from vmm.errors import MachineError
from vmm.templates.build import BuildError, debian_sources
from vmm.templates.recipe import DEFAULT
from vmm.templates.store import TemplateStore


def _pretend_built(cache: Path) -> Path:
    """A template as `build` leaves it, with one small file instead of a system."""
    place = cache / "templates" / DEFAULT.digest
    (place / "rootfs/usr/bin").mkdir(parents=True)
    (place / "rootfs/usr/bin/tool").write_text("tool")
    (place / "template.json").write_bytes(orjson.dumps({"created_at": time.time()}))
    return place


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    path = tmp_path / "agent"
    path.write_bytes(b"agent")
    return path


def test_the_digest_follows_what_is_built_and_nothing_else() -> None:
    assert replace(DEFAULT, description="other", aliases=(), name="x").digest == DEFAULT.digest
    assert replace(DEFAULT, packages=(*DEFAULT.packages, "vim")).digest != DEFAULT.digest
    assert replace(DEFAULT, files={}).digest != DEFAULT.digest


def test_what_is_not_built_is_missing_and_not_found(tmp_path: Path, agent: Path) -> None:
    store = TemplateStore(tmp_path / "cache", agent)
    assert store.missing() == [DEFAULT]
    assert store.load() == []
    with pytest.raises(MachineError) as caught:
        store.find(DEFAULT.name)
    assert caught.value.code == "template_not_found"


def test_a_half_built_template_is_none(tmp_path: Path, agent: Path) -> None:
    place = _pretend_built(tmp_path / "cache")
    (place / "template.json").unlink()
    assert TemplateStore(tmp_path / "cache", agent).missing() == [DEFAULT]


def test_a_template_is_found_by_name_and_alias(tmp_path: Path, agent: Path) -> None:
    _pretend_built(tmp_path / "cache")
    store = TemplateStore(tmp_path / "cache", agent)
    (info,) = store.load()
    assert info.aliases == DEFAULT.aliases
    found = {store.find(name).image for name in (DEFAULT.name, *DEFAULT.aliases)}
    assert len(found) == 1
    assert found.pop().stat().st_size == info.size_bytes > 0


def test_another_agent_is_another_image_beside_the_first(tmp_path: Path, agent: Path) -> None:
    _pretend_built(tmp_path / "cache")
    store = TemplateStore(tmp_path / "cache", agent)
    (first,) = store.load()
    first_image = store.find(DEFAULT.name).image
    stamp = first_image.read_bytes()
    agent.write_bytes(b"another agent")
    (second,) = store.load()
    assert first.digest != second.digest
    assert first_image.read_bytes() == stamp
    assert store.find(DEFAULT.name).image != first_image


def test_images_that_nobody_used_for_long_go(tmp_path: Path, agent: Path) -> None:
    place = _pretend_built(tmp_path / "cache")
    old = place / "0123.erofs"
    old.write_bytes(b"")
    os.utime(old, (0, 0))
    TemplateStore(tmp_path / "cache", agent).load()
    assert not old.exists()


def test_two_builders_wait_for_each_other(tmp_path: Path, agent: Path) -> None:
    _pretend_built(tmp_path / "cache")
    lock = os.open(tmp_path / "cache/templates" / f"{DEFAULT.digest}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    said: list[str] = []
    store = TemplateStore(tmp_path / "cache", agent)
    loading = threading.Thread(target=store.load, args=(said.append,))
    loading.start()
    while not said:
        time.sleep(0.01)
    assert "waiting" in said[0]
    assert not store.infos()
    os.close(lock)
    loading.join(30)
    assert store.infos()


def test_a_removed_template_is_missing_again(tmp_path: Path, agent: Path) -> None:
    _pretend_built(tmp_path / "cache")
    store = TemplateStore(tmp_path / "cache", agent)
    store.load()
    assert store.remove(DEFAULT.name)
    assert not store.remove(DEFAULT.name)
    assert store.missing() == [DEFAULT]


def test_mirrors_come_from_the_hosts_own_configuration() -> None:
    assert any(f" {DEFAULT.suite} main" in source for source in debian_sources(DEFAULT.suite))
    with pytest.raises(BuildError, match="no mirror"):
        debian_sources("no-such-suite")
