import base64

import msgspec
import pytest

from gateway.dialects.miosa import files
from gateway.dialects.miosa.files import FILE_BYTES_MAX, WriteFileRequest, content, file_info, mode_bits, tree
from gateway.errors import GatewayError
from gateway.resources import FileEntry, FileTree
from tests.support.calls import make_call

TEXT = "YWJj"  # text, and base64 of b"abc"

CURL = {"user-agent": "curl/8.5.0"}
LIBRARIES = [
    {"user-agent": "miosa-python/0.1.0"},
    {"user-agent": "miosa-python/2.19.1"},
    {"user-agent": "miosa-sandbox-py/0.1.0"},
    {"user-agent": "miosa-go/0.3.0"},
    {"user-agent": "anything", "x-miosa-client-id": "miosa-python/2.19.2"},
]


def written(headers, **fields) -> bytes:
    return content(make_call(headers=headers), msgspec.convert({"path": "/workspace/a", **fields}, WriteFileRequest))


@pytest.mark.parametrize("headers", [CURL, *LIBRARIES])
def test_content_base64_is_base64_for_everybody(headers):
    assert written(headers, content_base64=TEXT) == b"abc"


@pytest.mark.parametrize("headers", [CURL, *LIBRARIES])
@pytest.mark.parametrize(("encoding", "expected"), [("utf8", b"YWJj"), ("utf-8", b"YWJj"), ("base64", b"abc")])
def test_encoding_is_obeyed(headers, encoding, expected):
    assert written(headers, content=TEXT, encoding=encoding) == expected


@pytest.mark.parametrize("headers", LIBRARIES)
def test_libraries_mean_base64(headers):
    assert written(headers, content=TEXT) == b"abc"


def test_everybody_else_means_text():
    assert written(CURL, content="häh\n") == "häh\n".encode()


def test_empty_file_is_a_file():
    assert written(CURL, content="") == b""
    assert written(CURL, content_base64="") == b""


def test_missing_content_names_the_field():
    with pytest.raises(GatewayError, match=r"content"):
        written(CURL)


@pytest.mark.parametrize("size", [FILE_BYTES_MAX - 1, FILE_BYTES_MAX])
def test_files_up_to_the_limit_fit(size):
    assert len(written(CURL, content_base64=base64.b64encode(bytes(size)).decode())) == size


def test_files_over_the_limit_are_sent_to_the_upload_route():
    with pytest.raises(GatewayError, match="upload") as caught:
        written(CURL, content_base64=base64.b64encode(bytes(FILE_BYTES_MAX + 1)).decode())
    assert caught.value.code == "too_large"


def test_the_largest_file_fits_into_the_largest_body():
    body = msgspec.json.encode({"path": "/" + "x" * 4095, "content_base64": "A" * (4 * -(-FILE_BYTES_MAX // 3))})
    assert all(len(body) <= route.body_bytes_max for route in files.ROUTES if route.body is WriteFileRequest)


@pytest.mark.parametrize(("mode", "bits"), [(None, None), (0o755, 0o755), ("755", 0o755), ("0o644", 0o644)])
def test_modes(mode, bits):
    assert mode_bits(mode) == bits


@pytest.mark.parametrize("mode", ["888", "rwx", 0o10000, -1, "07777777"])
def test_impossible_modes(mode):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"path": "/a", "mode": mode}, files.ChangeModeRequest)


@pytest.mark.parametrize(
    "fields",
    [
        {"from": "/a", "to": "/b"},
        {"source": "/a", "destination": "/b"},
        {"source": "/a", "dest": "/b"},
        {"old_path": "/a", "new_path": "/b"},
    ],
)
def test_both_ends_in_all_spellings(fields):
    assert files.both_ends(msgspec.convert(fields, files.MoveRequest)) == ("/a", "/b")


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 4097])
def test_impossible_paths(path):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"path": path}, files.PathRequest)


def entry(name: str, kind="file", **rest) -> FileEntry:
    return FileEntry(name, f"/workspace/{name}", kind, 3, 0o644, 1_770_000_000.0, **rest)


def test_entries_spell_both_ways():
    info = file_info(entry("a", "symlink", owner="user", target="b"))
    assert (info["size"], info["size_bytes"], info["is_dir"], info["is_symlink"]) == (3, 3, False, True)
    assert info["target"] == "b"
    assert "target" not in file_info(entry("a"))


def test_tree_nests():
    answer = tree(FileTree(entry("d", "dir"), (FileTree(entry("f")),)))
    assert [child["path"] for child in answer["children"]] == ["/workspace/f"]


def test_file_bytes_never_have_a_type_of_their_own():
    for route in files.ROUTES:
        if route.answer.shape == "raw":
            assert route.answer.media_type in ("application/octet-stream", "text/event-stream")
