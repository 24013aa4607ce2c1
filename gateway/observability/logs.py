"""Log lines: one JSON object each (or a readable line for a terminal), with the id of the request they belong to.

error: a request failed because of us. warning: we recovered. info: life-cycle and the access log. Never secrets, never
bodies.
"""

from __future__ import annotations

import logging
import sys
import time
from contextvars import ContextVar
from typing import Any, TextIO

import orjson

#: The request being worked on in this task; "" outside any.
request_id: ContextVar[str] = ContextVar("request_id", default="")

#: What a LogRecord has anyway; anything else came by `extra=` and becomes a field of the line.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object per record: at, level, logger, message, request_id, extras, error."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if identity := request_id.get():
            line["request_id"] = identity
        line.update((name, value) for name, value in vars(record).items() if name not in _STANDARD)
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode("utf-8", "replace")


class TextFormatter(logging.Formatter):
    """A line for people: time, level, message, extras."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        extras = "".join(f" {name}={value}" for name, value in vars(record).items() if name not in _STANDARD)
        identity = f" request_id={value}" if (value := request_id.get()) else ""
        line = f"{clock} {record.levelname.lower():7} {record.getMessage()}{identity}{extras}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(process: str, *, level: str, form: str, stream: TextIO = sys.stderr) -> None:
    """Send this process's log lines to `stream`. form: "json" or "text"."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(process) if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Libraries that tell at "info" what is routine.
    for name in ("alembic", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
