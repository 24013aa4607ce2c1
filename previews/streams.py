"""What API and plane say to each other to have the plane move a client's bytes (docs/protocol.md, "Streams").

All of it stands in headers that the plane takes off and that nobody outside can send. Not for what flows then.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: The header of an order.
HEADER = "x-sandgate-stream"
#: The header's value for a process's output; the body says which and in which words (docs/protocol.md).
OUTPUT_ORDER = '{"kind":"output"}'
#: The same for a file that the client is to get, and for the request's body that is to become a file.
FILE_ORDER = '{"kind":"file"}'
UPLOAD_ORDER = '{"kind":"upload"}'

#: On a request whose body comes only when the API reads it: the plane can be ordered to receive it instead.
BODY = "x-sandgate-body"
HELD = "held"
#: On the request that follows an order: what came of it. Its answer is the client's.
REPORT = "x-sandgate-report"


@dataclass(frozen=True, slots=True)
class EventsOrder:
    """Events of a topic that come after the answer's body, which is the backlog followed by `cursor_mark`.

    types: shell-style patterns, one of which an event's type must match; none means all.
    key_hash: hex SHA-256 of the API key behind it; the stream ends with the key.
    """

    topic: str
    types: Sequence[str] = ()
    resource_type: str | None = None
    resource_id: str | None = None
    key_hash: str | None = None

    def header(self) -> str:
        """The header's value."""
        return _header(
            {
                "kind": "events",
                "topic": self.topic,
                "types": list(self.types),
                "resource_type": self.resource_type,
                "resource_id": self.resource_id,
                "key": self.key_hash,
            }
        )


@dataclass(frozen=True, slots=True)
class PublishedEvent:
    """An event for everybody who follows its topic. frame: the bytes that each of them gets, UTF-8."""

    seq: int
    topic: str
    type: str
    resource_type: str
    resource_id: str
    frame: str


def cursor_mark(seq: int) -> bytes:
    """The end of a backlog: up to where in the log it reaches. The client never sees it."""
    return b"%020d" % seq


def _header(order: dict[str, Any]) -> str:
    # ASCII only: a header has no encoding of its own.
    return json.dumps(order, separators=(",", ":"))
