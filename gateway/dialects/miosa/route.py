"""A row of MIOSA's route table: what the pipeline serves and the OpenAPI document tells, in one place.

A handler gets the decoded body and query as keyword arguments and returns the object of its answer; the row wraps it.
Bytes, streams and odd shapes are returned as a whole `Response`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from starlette.responses import Response

from gateway.dialects.miosa import answers, clients, decode
from gateway.pipeline import Call, Operation

#: one: an object, flat and under `data`. bare: an object as it is. many: a page of objects. nothing: 204.
#: raw: bytes of `media_type`.
Shape = Literal["one", "bare", "many", "nothing", "raw"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a route answers with. kinds: the TypedDict of the object or of a list's items, or several it may be."""

    shape: Shape
    kinds: tuple[Any, ...] = ()
    status: int = 200
    media_type: str = "application/json"

    def encode(self, result: Any) -> Response:
        """The HTTP answer for what a handler returned."""
        if isinstance(result, Response):
            return result
        if self.shape == "many":
            return answers.many(result)
        if self.shape == "bare":
            return answers.json_response(result, self.status)
        if self.shape == "nothing":
            return Response(status_code=204)
        return answers.one(result, self.status)


NOTHING = Answer("nothing", status=204)
EVENT_STREAM = Answer("raw", media_type="text/event-stream")
BYTES = Answer("raw", media_type="application/octet-stream")


def one(*kinds: Any, status: int = 200) -> Answer:
    """An object."""
    return Answer("one", kinds, status)


def bare(kind: Any) -> Answer:
    """An object that does not come in the usual envelope."""
    return Answer("bare", (kind,))


def many(kind: Any) -> Answer:
    """A page of objects."""
    return Answer("many", (kind,))


@dataclass(frozen=True, slots=True)
class Route:
    """One operation. Its summary and description are the handler's docstring.

    upload: media types of a body that the handler reads as a stream.
    terms: further arguments of `gateway.pipeline.Operation`.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    answer: Answer
    scope: str | None = None
    body: type[msgspec.Struct] | None = None
    body_bytes_max: int = decode.JSON_BYTES_MAX
    upload: tuple[str, ...] = ()
    query: type[msgspec.Struct] | None = None
    terms: dict[str, Any] = field(default_factory=dict)

    @property
    def mutates(self) -> bool:
        """Whether it changes something: everything but GET, unless the row says otherwise."""
        return bool(self.terms.get("mutates", self.method != "GET"))

    async def handle(self, call: Call) -> Response:
        """Decode, let the handler do its work, encode."""
        inputs: dict[str, Any] = {}
        if self.query is not None:
            inputs["query"] = decode.query(call.request, self.query)
        if self.body is not None:
            inputs["body"] = await decode.body(call, self.body, bytes_max=self.body_bytes_max)
        return self.answer.encode(await self.handler(call, **inputs))

    def operation(self) -> Operation:
        """The row as the pipeline wants it."""
        terms = {**self.terms, "mutates": self.mutates}
        if self.mutates:
            terms.setdefault("is_repeat_possible", clients.repeats_changes)
        return Operation(self.method, self.path, self.handle, self.scope, **terms)
