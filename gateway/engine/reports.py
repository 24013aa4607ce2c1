"""What the plane tells of a file that it was ordered to read or to write.

{"reply": {…}}                           the agent's last word
{"error": {"code", "message", "detail"}}  that of the agent, of hostd, or of the plane in their words
"""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.engine.translate import vmm_errors
from gateway.errors import GatewayError
from vmm.calls import decode
from vmm.errors import AgentError
from vmm.guest import WrittenFile


class _Failure(msgspec.Struct):
    code: str
    message: str
    detail: str | None = None


class _Report(msgspec.Struct):
    reply: dict[str, Any] | None = None
    error: _Failure | None = None


def reply_of(report: str) -> dict[str, Any]:
    """What the agent replied. Raises what went wrong instead, as if it had gone wrong here."""
    try:
        told = msgspec.json.decode(report, type=_Report)
    except msgspec.DecodeError as error:
        raise GatewayError("malformed", "The report is not one.") from error
    with vmm_errors():
        if told.error is not None:
            raise AgentError(told.error.code, told.error.message, detail=told.error.detail)
    return told.reply or {}


def written_file(report: str) -> WrittenFile:
    """The file that was written. Raises as `reply_of`."""
    reply = reply_of(report)
    with vmm_errors():
        return decode(WrittenFile, reply)
