# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Frame codec (docs/protocol.md, "Frames"). Imported through `native.frames`, which documents it.

Bounds checks are off: every index below is limited by `_SPLIT_HEAD` or by the size of the buffer it came from.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

# Little-endian hosts only: the integers are copied as they lie in memory. setup of this module fails elsewhere.
cdef extern from *:
    """
    #if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "the frame codec copies integers as they lie in memory: little-endian machines only"
    #endif
    """

cdef enum:
    _HEAD = 12
    _OFFSET = 8
    _SPLIT_HEAD = 20
    _TYPE_MAX = 13
    _DATA = 5
    _END = 6
    _CREDIT = 7
    _CLOSE = 10
    _PING = 11
    _PONG = 12
    _ACK = 13
    _DATA_BYTES_MAX = 256 * 1024
    _PAYLOAD_BYTES_MAX = 8 * 1024 * 1024

HEAD_BYTES = _HEAD
DATA_BYTES_MAX = _DATA_BYTES_MAX
PAYLOAD_BYTES_MAX = _PAYLOAD_BYTES_MAX


class FrameError(ValueError):
    """The bytes are no frame. The connection they came from is of no further use."""


cdef inline bint _carries_offset(uint8_t kind) noexcept:
    return _DATA <= kind <= _CREDIT


cdef inline uint32_t _length_min(uint8_t kind) noexcept:
    return _OFFSET if _carries_offset(kind) or kind == _PING or kind == _PONG else 0


cdef inline uint32_t _length_max(uint8_t kind) noexcept:
    if kind == _DATA:
        return _OFFSET + _DATA_BYTES_MAX
    if kind == _END or kind == _CREDIT or kind == _PING or kind == _PONG:
        return _OFFSET
    if kind == _CLOSE or kind == _ACK:
        return 0
    return _PAYLOAD_BYTES_MAX


cdef inline void _put_head(char* out, uint32_t length, uint8_t kind, uint8_t channel, uint32_t stream) noexcept:
    memcpy(out, &length, 4)
    out[4] = <char>kind
    out[5] = <char>channel
    out[6] = 0
    out[7] = 0
    memcpy(out + 8, &stream, 4)


cdef class FrameDecoder:
    """Incremental decoder of one direction of one connection."""

    cdef uint8_t _head[_SPLIT_HEAD]
    cdef Py_ssize_t _head_have
    cdef Py_ssize_t _head_need
    cdef uint32_t _length          # bytes of _payload, offset excluded
    cdef Py_ssize_t _payload_have
    cdef bytes _payload            # the payload being filled, None while the head is incomplete
    cdef bint _is_broken

    def __cinit__(self):
        self._head_need = _HEAD

    def feed(self, data) -> list:
        cdef Py_buffer view
        if self._is_broken:
            raise FrameError("an earlier frame on this connection was malformed")
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            return self._feed(<const uint8_t*>view.buf, view.len)
        except FrameError:
            self._is_broken = True
            raise
        finally:
            PyBuffer_Release(&view)

    @property
    def is_idle(self) -> bool:
        return self._head_have == 0

    cdef list _feed(self, const uint8_t* data, Py_ssize_t size):
        cdef list frames = []
        cdef Py_ssize_t at = 0
        cdef Py_ssize_t part
        while at < size:
            if self._payload is None:
                part = min(self._head_need - self._head_have, size - at)
                memcpy(self._head + self._head_have, data + at, part)
                self._head_have += part
                at += part
                if self._head_have < self._head_need:
                    break
                if self._head_need == _HEAD:
                    self._check_head()
                    if self._head_need > _HEAD:
                        continue
                self._payload = PyBytes_FromStringAndSize(NULL, self._length)
                self._payload_have = 0
            part = min(<Py_ssize_t>self._length - self._payload_have, size - at)
            if part > 0:
                memcpy(PyBytes_AS_STRING(self._payload) + self._payload_have, data + at, part)
                self._payload_have += part
                at += part
            if self._payload_have == self._length:
                frames.append(self._take())
        return frames

    cdef int _check_head(self) except -1:
        cdef uint32_t length
        cdef uint8_t kind = self._head[4]
        memcpy(&length, self._head, 4)
        if kind == 0 or kind > _TYPE_MAX:
            raise FrameError(f"unknown frame type {kind}")
        if self._head[6] or self._head[7]:
            raise FrameError("the reserved field of a frame is not zero")
        if not _length_min(kind) <= length <= _length_max(kind):
            raise FrameError(f"a frame of type {kind} cannot have {length} bytes")
        self._length = length
        if _carries_offset(kind):
            self._length -= _OFFSET
            self._head_need = _SPLIT_HEAD
        return 0

    cdef tuple _take(self):
        cdef uint64_t offset = 0
        cdef uint32_t stream
        cdef bytes payload = self._payload
        memcpy(&stream, self._head + 8, 4)
        if self._head_need > _HEAD:
            memcpy(&offset, self._head + _HEAD, 8)
        frame = (self._head[4], self._head[5], stream, offset, payload)
        self._payload = None
        self._head_have = 0
        self._head_need = _HEAD
        return frame


cdef _check_length(uint8_t kind, Py_ssize_t length):
    if kind == 0 or kind > _TYPE_MAX:
        raise FrameError(f"unknown frame type {kind}")
    if not _length_min(kind) <= length <= _length_max(kind):
        raise FrameError(f"a frame of type {kind} cannot have {length} bytes")


def encode(uint8_t kind, uint8_t channel, uint32_t stream, bytes payload not None=b"") -> bytes:
    cdef Py_ssize_t length = len(payload)
    _check_length(kind, length)
    frame = PyBytes_FromStringAndSize(NULL, _HEAD + length)
    cdef char* out = PyBytes_AS_STRING(frame)
    _put_head(out, <uint32_t>length, kind, channel, stream)
    memcpy(out + _HEAD, PyBytes_AS_STRING(payload), length)
    return frame


def encode_offset(uint8_t kind, uint8_t channel, uint32_t stream, uint64_t offset, bytes payload not None=b"") -> bytes:
    cdef Py_ssize_t length = len(payload)
    if not _carries_offset(kind):
        raise FrameError(f"a frame of type {kind} carries no offset")
    _check_length(kind, _OFFSET + length)
    frame = PyBytes_FromStringAndSize(NULL, _SPLIT_HEAD + length)
    cdef char* out = PyBytes_AS_STRING(frame)
    _put_head(out, <uint32_t>(_OFFSET + length), kind, channel, stream)
    memcpy(out + _HEAD, &offset, 8)
    memcpy(out + _SPLIT_HEAD, PyBytes_AS_STRING(payload), length)
    return frame


def data_head(uint8_t channel, uint32_t stream, uint64_t offset, Py_ssize_t size) -> bytes:
    _check_length(_DATA, _OFFSET + size)
    frame = PyBytes_FromStringAndSize(NULL, _SPLIT_HEAD)
    cdef char* out = PyBytes_AS_STRING(frame)
    _put_head(out, <uint32_t>(_OFFSET + size), _DATA, channel, stream)
    memcpy(out + _HEAD, &offset, 8)
    return frame
