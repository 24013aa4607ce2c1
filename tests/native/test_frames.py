"""The compiled frame codec against its plain twin, and its limits one by one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from native import frames
from tests.native import twin_frames as twin

U8, U32, U64 = st.integers(0, 2**8 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
KIND = st.integers(1, 13)


@st.composite
def valid_frames(draw: st.DrawFn) -> bytes:
    kind = draw(KIND)
    least, most = twin.lengths(kind)
    payload = draw(st.binary(min_size=least, max_size=min(most, 300)))
    return twin.encode(kind, draw(U8), draw(U32), payload)


def chunks_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def outcome(decoder: Any, chunks: list[bytes]) -> list[Any]:
    """What a decoder makes of chunks: per chunk the frames and whether it is idle, at last perhaps "refused"."""
    seen: list[Any] = []
    for chunk in chunks:
        try:
            seen.append((decoder.feed(chunk), decoder.is_idle))
        except ValueError:
            seen.append("refused")
    return seen


@given(st.lists(valid_frames(), max_size=8), st.lists(st.integers(0, 10_000), max_size=12))
def test_any_chunking_gives_the_frames_the_twin_sees(encoded: list[bytes], cuts: list[int]) -> None:
    chunks = chunks_of(b"".join(encoded), cuts)
    seen = outcome(frames.FrameDecoder(), chunks)
    assert seen == outcome(twin.FrameDecoder(), chunks)
    assert sum(len(decoded) for decoded, _ in seen) == len(encoded)


@given(st.lists(valid_frames(), max_size=3), st.binary(max_size=200), st.lists(st.integers(0, 1000), max_size=6))
def test_garbage_is_refused_where_the_twin_refuses_it(encoded: list[bytes], tail: bytes, cuts: list[int]) -> None:
    chunks = chunks_of(b"".join(encoded) + tail, cuts)
    assert outcome(frames.FrameDecoder(), chunks) == outcome(twin.FrameDecoder(), chunks)


@given(st.integers(0, 255), U8, U32, st.binary(max_size=100))
@example(5, 1, 1, b"1234567")
@example(5, 1, 1, b"12345678")
def test_encode_equals_the_twin(kind: int, channel: int, stream: int, payload: bytes) -> None:
    try:
        expected = twin.encode(kind, channel, stream, payload)
    except twin.FrameError:
        with pytest.raises(frames.FrameError):
            frames.encode(kind, channel, stream, payload)
    else:
        assert frames.encode(kind, channel, stream, payload) == expected


@given(KIND, U8, U32, U64, st.binary(max_size=100))
def test_encode_offset_equals_the_twin(kind: int, channel: int, stream: int, offset: int, payload: bytes) -> None:
    try:
        expected = twin.encode_offset(kind, channel, stream, offset, payload)
    except twin.FrameError:
        with pytest.raises(frames.FrameError):
            frames.encode_offset(kind, channel, stream, offset, payload)
    else:
        assert frames.encode_offset(kind, channel, stream, offset, payload) == expected


@given(U8, U32, U64, st.integers(0, frames.DATA_BYTES_MAX))
def test_a_data_head_equals_the_twin(channel: int, stream: int, offset: int, size: int) -> None:
    assert frames.data_head(channel, stream, offset, size) == twin.data_head(channel, stream, offset, size)


@pytest.mark.parametrize("excess", [-1, 0, 1])
@pytest.mark.parametrize("kind", [frames.DATA, frames.REPLY])
def test_payload_length_is_limited(kind: int, excess: int) -> None:
    most = twin.lengths(kind)[1]
    encoded = (most + excess).to_bytes(4, "little") + bytes([kind, 1, 0, 0]) + bytes(4)
    payload = bytes(most + excess)
    decoder = frames.FrameDecoder()
    if excess > 0:
        with pytest.raises(frames.FrameError):
            decoder.feed(encoded)
        with pytest.raises(frames.FrameError):
            frames.encode(kind, 1, 0, payload)
    else:
        assert [len(frame[4]) for frame in decoder.feed(encoded + payload)] == [
            most + excess - (8 if kind == frames.DATA else 0)
        ]


@pytest.mark.parametrize("size", [-1, frames.DATA_BYTES_MAX + 1])
def test_a_data_head_of_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises((frames.FrameError, OverflowError)):
        frames.data_head(1, 1, 0, size)


def test_a_broken_decoder_stays_broken() -> None:
    decoder = frames.FrameDecoder()
    with pytest.raises(frames.FrameError):
        decoder.feed(b"\0\0\0\0\xff\0\0\0\0\0\0\0")
    with pytest.raises(frames.FrameError):
        decoder.feed(frames.encode(frames.CLOSE, 0, 1))


def test_a_payload_larger_than_any_chunk_arrives_whole() -> None:
    data = bytes(range(256)) * 1024
    encoded = frames.encode_data(1, 7, 99, data)
    decoder = frames.FrameDecoder()
    decoded = [frame for start in range(0, len(encoded), 1000) for frame in decoder.feed(encoded[start : start + 1000])]
    assert decoded == [(frames.DATA, 1, 7, 99, data)]


@pytest.mark.parametrize("chunk", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_fed(chunk: Any) -> None:
    assert frames.FrameDecoder().feed(chunk(frames.encode(frames.ACK, 0, 3))) == [(frames.ACK, 0, 3, 0, b"")]


@pytest.mark.parametrize(("kind", "channel", "stream"), [(256, 0, 0), (1, 256, 0), (1, 0, 2**32), (-1, 0, 0)])
def test_numbers_that_do_not_fit_are_refused(kind: int, channel: int, stream: int) -> None:
    with pytest.raises(OverflowError):
        frames.encode(kind, channel, stream)
