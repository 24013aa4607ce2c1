"""How MIOSA spells errors: one row per code of `gateway.errors.CODES`.

The body says everything twice, nested for the specification and clients from 1.2 on, flat for 1.0 and 1.1. Codes are
the specification's; where it has none, the spelling of the documentation page of that route.
"""

from __future__ import annotations

import math
from typing import Any, NotRequired, TypedDict

import orjson
from starlette.responses import Response

from gateway.errors import GatewayError

TABLE: dict[str, tuple[int, str]] = {
    "malformed": (400, "bad_request"),
    "validation_failed": (422, "validation_error"),
    "unauthenticated": (401, "unauthorized"),
    "forbidden": (403, "forbidden"),
    "route_not_found": (404, "not_found"),
    "method_not_allowed": (405, "method_not_allowed"),
    "not_found": (404, "not_found"),
    "sandbox_not_found": (404, "sandbox_not_found"),
    "template_not_found": (404, "TEMPLATE_NOT_FOUND"),
    "build_not_found": (404, "not_found"),
    "snapshot_not_found": (404, "not_found"),
    "preview_not_found": (404, "not_found"),
    "process_not_found": (404, "not_found"),
    "path_not_found": (404, "not_found"),
    "path_invalid": (400, "INVALID_PATH"),
    "path_forbidden": (403, "FORBIDDEN_PATH"),
    "path_conflict": (409, "conflict"),
    "permission_denied": (403, "forbidden"),
    "command_invalid": (422, "validation_error"),
    "sandbox_not_running": (409, "conflict"),
    "sandbox_paused": (409, "sandbox_paused"),
    "snapshot_not_ready": (409, "SNAPSHOT_NOT_READY"),
    "snapshot_in_use": (409, "SNAPSHOT_IN_USE"),
    "snapshot_incompatible": (409, "snapshot_incompatible"),
    "snapshot_too_large": (413, "snapshot_too_large"),
    "template_not_ready": (409, "template_not_ready"),
    "template_in_use": (409, "TEMPLATE_IN_USE"),
    "build_spec_invalid": (422, "INVALID_BUILDSPEC"),
    "conflict": (409, "conflict"),
    "name_taken": (409, "conflict"),
    "idempotency_mismatch": (422, "idempotency_mismatch"),
    "idempotency_in_progress": (409, "idempotency_in_progress"),
    "too_large": (413, "payload_too_large"),
    "rate_limited": (429, "rate_limited"),
    "quota_exceeded": (429, "quota_exceeded"),
    "unsupported": (422, "unsupported"),
    "timeout": (504, "timeout"),
    "disk_full": (507, "disk_full"),
    "agent_unavailable": (502, "bad_gateway"),
    "no_capacity": (503, "no_capacity"),
    "host_unavailable": (503, "host_unavailable"),
    "boot_failed": (503, "boot_failed"),
    "snapshot_failed": (503, "snapshot_failed"),
    "snapshot_corrupt": (500, "snapshot_corrupt"),
    "wake_timeout": (504, "wake_timeout"),
    "internal": (500, "internal_error"),
}

#: The exit code of a command whose outcome got lost after its status line had been sent; no real process has it.
EXIT_CODE_UNKNOWN = -1


class ErrorDetail(TypedDict):
    """One bad field."""

    field: str
    reason: str


class ErrorBody(TypedDict):
    """What went wrong."""

    code: str
    message: str
    request_id: str
    details: NotRequired[list[ErrorDetail]]
    retry_after: NotRequired[int]


class Error(ErrorBody):
    """The error object, nested and flat."""

    error: ErrorBody


def describe(error: GatewayError, request_id: str) -> ErrorBody:
    """The error in MIOSA's words."""
    _, code = TABLE[error.code]
    answer = ErrorBody(code=code, message=error.message, request_id=request_id)
    if error.details:
        answer["details"] = [ErrorDetail(field=detail.field, reason=detail.reason) for detail in error.details]
    if error.retry_after_s is not None:
        answer["retry_after"] = max(1, math.ceil(error.retry_after_s))
    return answer


def error_response(error: GatewayError, request_id: str, *, status_sent: bool = False) -> Response:
    """The error answer.

    status_sent: a 200 has already gone out ahead of a long command. Clients then read an exit code, and a missing one
    would pass for success.
    """
    status, _ = TABLE[error.code]
    inner = describe(error, request_id)
    answer: dict[str, Any] = {"error": inner, **inner}
    if status_sent:
        answer |= {"stdout": "", "stderr": error.message, "exit_code": EXIT_CODE_UNKNOWN, "success": False}
    headers = {}
    if "retry_after" in inner:
        headers["retry-after"] = str(inner["retry_after"])
    if error.allowed_methods:
        headers["allow"] = ", ".join(error.allowed_methods)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(orjson.dumps(answer), status, headers, media_type="application/json")
