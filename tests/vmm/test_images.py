"""The image store: images are whole or not there, are checked before use, and share what they have in common."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from native import images as native
from vmm.drivers.base import Shape
from vmm.drivers.gvisor.disk import make_disk
from vmm.errors import MachineError
from vmm.images import manifest as manifests
from vmm.images.manifest import ImageFile, Manifest
from vmm.images.store import ImageStore

_SHAPE = Shape("default", cpu_count=1.0, memory_mib=512, disk_mib=1024)
_PAGE = 4096
_NAMES = ("checkpoint.img", "pages.img", "pages_meta.img")


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return opened(tmp_path)


def opened(directory: Path, disk_mib_max: int = 100) -> ImageStore:
    store = ImageStore(directory / "images", disk_mib_max=disk_mib_max)
    store.load()
    return store


def manifest(image_id: str) -> Manifest:
    return Manifest(image_id, "secret", _SHAPE, "a" * 64, "20240729", created_at=1.0, parent="older")


def pages(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count * _PAGE)


def publish(store: ImageStore, image_id: str, content: bytes = b"pages", *, is_lasting: bool = True) -> Manifest:
    draft = store.draft(image_id)
    for name, data in zip(_NAMES, (b"state", content, b""), strict=True):
        (draft / name).write_bytes(data)
    return store.publish(manifest(image_id), is_lasting=is_lasting)


def content_of(store: ImageStore, image_id: str) -> bytes:
    with store.open(image_id) as files:
        assert (files.token, files.shape, files.runtime) == ("secret", _SHAPE, "20240729")
        assert (files.directory / "checkpoint.img").read_bytes() == b"state"
        return (files.directory / "pages.img").read_bytes()


def refusal(store: ImageStore, image_id: str) -> str:
    with pytest.raises(MachineError) as caught:
        content_of(store, image_id)
    return caught.value.code


def test_what_is_published_can_be_opened_now_and_after_a_restart(store: ImageStore, tmp_path: Path) -> None:
    published = publish(store, "one", pages(300))
    assert [file.name for file in published.files] == list(_NAMES)
    assert published.size_bytes == 300 * _PAGE + 5
    for each in (store, opened(tmp_path)):
        assert content_of(each, "one") == pages(300)
        assert each.get("one") == published
        assert each.list() == [published]
    assert not store.has("another")
    assert refusal(store, "another") == "snapshot_not_found"


def test_what_is_published_for_this_process_only_is_of_no_use_to_another(store: ImageStore, tmp_path: Path) -> None:
    publish(store, "one", pages(3), is_lasting=False)
    assert content_of(store, "one") == pages(3)
    assert refusal(opened(tmp_path), "one") == "snapshot_corrupt"


def test_a_draft_is_nothing_until_it_is_published(store: ImageStore, tmp_path: Path) -> None:
    draft = store.draft("one")
    (draft / "pages.img").write_bytes(b"half")
    assert not store.has("one")
    again = opened(tmp_path)
    assert again.list() == []
    assert not draft.exists()


def test_a_directory_without_a_manifest_is_no_image(store: ImageStore, tmp_path: Path) -> None:
    publish(store, "one")
    (tmp_path / "images" / "one" / manifests.NAME).write_bytes(b"{}")
    assert opened(tmp_path).list() == []


@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_damaged_image_is_refused(store: ImageStore, tmp_path: Path, is_restarted: bool) -> None:
    publish(store, "one", pages(50))
    assert content_of(store, "one") == pages(50)
    path = tmp_path / "images" / "one" / "pages.img"
    with path.open("r+b") as file:
        file.seek(100_000)
        byte = file.read(1)[0]
        file.seek(100_000)
        file.write(bytes([byte ^ 1]))
    assert refusal(opened(tmp_path) if is_restarted else store, "one") == "snapshot_corrupt"
    path.unlink()
    assert refusal(store, "one") in ("snapshot_corrupt", "snapshot_failed")


def test_an_image_that_is_open_is_not_removed(store: ImageStore, tmp_path: Path) -> None:
    publish(store, "one", pages(10))
    with store.open("one"), store.open("one"):
        assert store.is_open("one")
        assert not store.pack("one")
        with pytest.raises(MachineError, match="in_use"):
            store.delete("one")
    assert not store.is_open("one")
    assert store.delete("one")
    assert not store.delete("one")
    assert not list((tmp_path / "images").iterdir())


def test_many_open_one_image_at_once(store: ImageStore, tmp_path: Path) -> None:
    publish(store, "one", pages(1000))
    store.pack("one")
    again = opened(tmp_path)
    together = threading.Barrier(8)

    def read() -> bytes:
        together.wait(10)
        return content_of(again, "one")

    with ThreadPoolExecutor(8) as readers:
        contents = list(readers.map(lambda _: read(), range(8)))
    assert set(contents) == {pages(1000)}
    assert not again.is_open("one")


def test_packed_images_share_what_they_have_in_common_and_come_back(store: ImageStore, tmp_path: Path) -> None:
    first = pages(2000)
    second = first[: 700 * _PAGE] + pages(3, seed=1) + first[700 * _PAGE :]
    publish(store, "first", first)
    publish(store, "second", second)
    raw = store.used_bytes()
    assert store.pack("first")
    once = store.used_bytes() - 2003 * _PAGE
    assert store.pack("second")
    assert store.used_bytes() < once * 1.2
    assert store.used_bytes() < raw * 0.6
    again = opened(tmp_path)
    assert again.used_bytes() == store.used_bytes()
    assert content_of(again, "first") == first
    assert again.delete("first")
    assert content_of(again, "second") == second
    assert again.delete("second")
    assert again.used_bytes() == 0


def test_a_damaged_chunk_is_noticed(store: ImageStore, tmp_path: Path) -> None:
    publish(store, "one", pages(100))
    store.pack("one")
    chunk = max((tmp_path / "images" / "chunks").glob("*/*"), key=lambda path: path.stat().st_size)
    chunk.write_bytes(chunk.read_bytes()[:-1])
    assert refusal(store, "one") == "snapshot_corrupt"
    chunk.unlink()
    assert refusal(store, "one") == "snapshot_corrupt"


def test_chunks_of_an_interrupted_packing_are_removed(store: ImageStore, tmp_path: Path) -> None:
    publish(store, "one", pages(100))
    chunks = tmp_path / "images" / "chunks"
    native.pack(tmp_path / "images" / "one", ["pages.img"], chunks)
    (tmp_path / "images" / "one" / native.INDEX).unlink()
    assert any(chunks.glob("*/*"))
    again = opened(tmp_path)
    assert not any(chunks.glob("*/*"))
    assert content_of(again, "one") == pages(100)


def test_images_keep_within_their_quota(tmp_path: Path) -> None:
    store = opened(tmp_path, disk_mib_max=1)
    publish(store, "small", pages(100))
    with pytest.raises(MachineError, match="no_space"):
        publish(store, "large", pages(200))
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["small"]
    publish(store, "fits", pages(100))


def test_a_full_disk_is_told_as_such_and_nothing_is_left(tmp_path: Path) -> None:
    disk = make_disk(tmp_path, 1024 * 1024)
    try:
        # It has room for a handful of files, whatever their size.
        store = opened(Path(disk.path))
        with pytest.raises(MachineError) as caught:
            publish(store, "one", pages(200))
        assert caught.value.code == "no_space"
        assert not list((Path(disk.path) / "images").iterdir())
    finally:
        disk.release()


def test_an_image_travels_as_one_file(store: ImageStore, tmp_path: Path) -> None:
    published = publish(store, "one", pages(500))
    store.pack("one")
    file = tmp_path / "exported"
    file.touch()
    store.export("one", file)
    other = opened(tmp_path / "other")
    imported = other.import_("two", file)
    assert imported.files == published.files
    assert (imported.id, imported.parent) == ("two", "older")
    assert content_of(other, "two") == pages(500)


def test_an_image_travels_through_a_pipe(store: ImageStore, tmp_path: Path) -> None:
    publish(store, "one", pages(500))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    other = opened(tmp_path / "other")
    with ThreadPoolExecutor(1) as sender:
        sent = sender.submit(store.export, "one", pipe)
        other.import_("two", pipe)
        sent.result(10)
    assert content_of(other, "two") == pages(500)


@pytest.fixture
def exported(store: ImageStore, tmp_path: Path) -> Path:
    publish(store, "one", pages(20))
    file = tmp_path / "exported"
    file.touch()
    store.export("one", file)
    return file


@pytest.mark.parametrize("at", [0, 8, 40, 1000, 40_000, -1])
def test_a_damaged_file_is_not_imported(store: ImageStore, exported: Path, at: int) -> None:
    data = bytearray(exported.read_bytes())
    data[at] ^= 0x55
    exported.write_bytes(data)
    with pytest.raises(MachineError) as caught:
        store.import_("two", exported)
    assert caught.value.code in ("snapshot_corrupt", "snapshot_incompatible")
    assert not store.has("two")
    assert [manifest.id for manifest in store.list()] == ["one"]


def test_a_file_that_is_cut_off_or_too_large_is_not_imported(store: ImageStore, exported: Path, tmp_path: Path) -> None:
    narrow = opened(tmp_path / "narrow", disk_mib_max=0)
    with pytest.raises(MachineError, match="no_space"):
        narrow.import_("two", exported)
    os.truncate(exported, exported.stat().st_size // 2)
    with pytest.raises(MachineError, match="snapshot_corrupt"):
        store.import_("two", exported)
    assert not list((tmp_path / "images").glob("two*"))


def test_an_import_with_a_manifest_that_lies_is_refused(store: ImageStore, tmp_path: Path) -> None:
    published = publish(store, "one", pages(5))
    files = (*published.files[:2], ImageFile("pages_meta.img", 0, "0" * 64))
    liar = Manifest("one", "secret", _SHAPE, "a" * 64, "20240729", 1.0, files=files)
    file = tmp_path / "exported"
    file.touch()
    native.export_to(file, liar.encode(), tmp_path / "images" / "one", _NAMES)
    with pytest.raises(MachineError, match="snapshot_corrupt"):
        store.import_("two", file)
    assert not store.has("two")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"files": []},
        {"files": [{"name": "../x", "size": 1, "hash": "0" * 64}]},
        {"files": [{"name": "x", "size": -1, "hash": "0" * 64}]},
        {"files": [{"name": "x", "size": 1, "hash": "0" * 63}]},
        {"files": [{"name": "x", "size": 1, "hash": "0" * 64}] * 2},
        {"template_digest": "x"},
        {"shape": None},
        {"token": 7},
    ],
)
def test_a_manifest_is_read_strictly(change: dict[str, object]) -> None:
    sound = Manifest("one", "t", _SHAPE, "a" * 64, "r", 1.0, files=(ImageFile("x", 1, "0" * 64),))
    assert manifests.decode(sound.encode()) == sound
    changed = {**msgspec.to_builtins(sound), **change}
    with pytest.raises(MachineError, match=r"snapshot_(corrupt|incompatible)"):
        manifests.decode(msgspec.json.encode(changed))


@given(st.binary(max_size=300))
def test_any_bytes_for_a_manifest_are_refused(text: bytes) -> None:
    with pytest.raises(MachineError):
        manifests.decode(text)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "scratch"
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


def test_any_bytes_for_an_image_are_refused(scratch: Path) -> None:
    noise = random.Random(1)
    source = scratch / "source"
    for length in (0, 7, 8, 12, 100, 5000):
        source.write_bytes(b"sgimage1"[:length] + noise.randbytes(length))
        target = scratch / str(length)
        target.mkdir()
        with pytest.raises((native.ImageCorrupt, native.ImageTooLarge)):
            native.import_from(source, target, 1 << 20)
