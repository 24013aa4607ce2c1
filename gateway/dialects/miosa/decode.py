"""From request bodies and query strings to typed, bounded values.

A body is a `msgspec.Struct`: its annotations check the request and describe it in the OpenAPI document. Broken JSON is
`malformed`; wrong fields are `validation_failed` with one detail per field. Fields nobody knows are ignored.
"""

from __future__ import annotations

import base64
import datetime as dt
import functools
import re
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta
from starlette.requests import HTTPConnection

from gateway.errors import FieldProblem, GatewayError, invalid
from gateway.pipeline import Call, SocketCall

T = TypeVar("T", bound=msgspec.Struct)

#: Largest JSON body of an ordinary route; file writes set their own.
JSON_BYTES_MAX = 1024 * 1024

_NO_NUL = r"^[^\x00]*$"
_ENV_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
_SLUG = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"
_PRINTABLE = r"^[^\x00-\x1f\x7f]*$"
_OCTAL = r"^(0o)?[0-7]{1,4}$"
#: What the plane would take for ambiguous is outside of every share, so a share of it would open nothing.
_URL_PATH = r"^(?!.*(//|\\|%2[eEfF]|%5[cC]|%00|/\.\.?(/|$)))/[^\x00-\x20\x7f?#]*$"

_HOST = r"[A-Za-z0-9.-]+(:[0-9]{1,5})?"
_ORIGIN = rf"^(\*|https?://({_HOST}|\[[0-9a-f:.]+\](:[0-9]{{1,5}})?))$"
_FRAME_SOURCE = rf"^(\*|'self'|(https?://)?(\*\.)?{_HOST})$"

#: What msgspec says about a pattern, in words.
_PATTERN_WORDS = {
    _NO_NUL: "must not contain NUL",
    _ENV_NAME: "must be a variable name: letters, digits and _, not starting with a digit",
    _SLUG: "must be lower-case letters, digits and inner hyphens",
    _PRINTABLE: "must not contain control characters",
    _OCTAL: "must be octal permission bits such as 644",
    _ORIGIN: "must be an origin such as https://app.example.com, or *",
    _FRAME_SOURCE: "must be an origin such as https://*.example.com, 'self' or *",
    _URL_PATH: "must be a URL's path: from / on, without //, dot segments, encoded slashes, backslashes or spaces",
}

Text = Annotated[str, Meta(max_length=256, pattern=_PRINTABLE)]
Id = Annotated[str, Meta(max_length=64, pattern=_PRINTABLE)]
Name = Annotated[str, Meta(min_length=1, max_length=120, pattern=_PRINTABLE)]
Slug = Annotated[str, Meta(min_length=1, max_length=40, pattern=_SLUG)]
Path = Annotated[str, Meta(min_length=1, max_length=4096, pattern=_NO_NUL)]
Octal = Annotated[str, Meta(pattern=_OCTAL)]
UrlPath = Annotated[str, Meta(max_length=1024, pattern=_URL_PATH)]
ARGUMENT_LENGTH_MAX = 128 * 1024
Argument = Annotated[str, Meta(max_length=ARGUMENT_LENGTH_MAX, pattern=_NO_NUL)]
EnvName = Annotated[str, Meta(min_length=1, max_length=256, pattern=_ENV_NAME)]
EnvValue = Annotated[str, Meta(max_length=32 * 1024, pattern=_NO_NUL)]
Env = Annotated[dict[EnvName, EnvValue], Meta(max_length=256)]
Tags = Annotated[list[Annotated[str, Meta(min_length=1, max_length=64, pattern=_PRINTABLE)]], Meta(max_length=50)]
Metadata = Annotated[dict[str, Any], Meta(max_length=64)]
Origin = Annotated[str, Meta(max_length=256, pattern=_ORIGIN)]
FrameSource = Annotated[str, Meta(max_length=256, pattern=_FRAME_SOURCE)]
Port = Annotated[int, Meta(ge=1, le=65535)]

_METADATA_BYTES_MAX = 16 * 1024
_ERROR_PLACE = re.compile(r"^(?P<reason>.*?)(?: - at (?P<key>`key` in )?`(?P<place>[^`]*)`)?$", re.DOTALL)
_ERROR_PATTERN = re.compile(r"expected str matching regex (?P<pattern>'.*')$")


async def body(call: Call, kind: type[T], *, bytes_max: int = JSON_BYTES_MAX) -> T:
    """The request's JSON object as a `kind`. An absent body counts as an empty object."""
    request = call.request
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    raw = await request.body()
    if len(raw) > bytes_max:
        raise GatewayError("too_large", f"The body may have at most {bytes_max} bytes.")
    if raw and media_type and media_type != "application/json" and not media_type.endswith("+json"):
        raise GatewayError("malformed", f"Send JSON with Content-Type: application/json, not {media_type}.")
    return json_object(raw or b"{}", kind)


def json_object(raw: bytes, kind: type[T]) -> T:
    """Bytes of one JSON object as a `kind`."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        fields = _json(raw)
    if not isinstance(fields, dict):
        raise GatewayError("malformed", "The body must be a JSON object.")
    raise invalid_fields(fields, kind, strict=True)


def _json(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise GatewayError("malformed", f"The body is not valid JSON: {error}") from error


def query(connection: HTTPConnection, kind: type[T]) -> T:
    """The query string as a `kind`; a repeated parameter counts as one with commas."""
    parameters = connection.query_params
    fields = {name: ",".join(parameters.getlist(name)) for name in parameters}
    try:
        return msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as error:
        raise invalid_fields(fields, kind, strict=False) from error


def invalid_fields(fields: Mapping[str, Any], kind: type[msgspec.Struct], *, strict: bool) -> GatewayError:
    """All bad fields: msgspec stops at the first, callers want to hear of every one."""
    problems = []
    for row in msgspec.structs.fields(kind):
        name = row.encode_name
        if name not in fields:
            if row.required:
                problems.append(FieldProblem(name, "is required"))
            continue
        try:
            msgspec.convert({"value": fields[name]}, _alone(row.type), strict=strict)
        except msgspec.ValidationError as error:
            problems.append(_problem(name, str(error)))
    message = "; ".join(f"{problem.field} {problem.reason}" for problem in problems[:3])
    return GatewayError("validation_failed", f"The request is invalid: {message}.", details=problems)


@functools.cache
def _alone(kind: Any) -> type[msgspec.Struct]:
    """A body of the one field `value`.

    msgspec keeps what it knows of a struct. What it makes for any other type it makes and frees anew in each call.
    """
    return msgspec.defstruct("Alone", [("value", kind)])


def _problem(name: str, message: str) -> FieldProblem:
    """`files[2].path` and `must not contain NUL` from "Expected `str` matching regex '…' - at `$.value[2].path`"."""
    match = _ERROR_PLACE.match(message)
    assert match is not None  # every part of the pattern is optional  # noqa: S101
    reason = match["reason"].replace("`", "").replace("Expected", "expected", 1)
    pattern = _ERROR_PATTERN.search(reason)
    if pattern is not None:
        reason = next((words for regex, words in _PATTERN_WORDS.items() if repr(regex) == pattern["pattern"]), reason)
    if match["key"]:
        reason = f"a name in it {reason}"
    return FieldProblem(name + (match["place"] or "").removeprefix("$.value"), reason)


def first(*values: Any) -> Any:
    """The first value that was given, for fields with several spellings."""
    return next((value for value in values if value is not None), None)


def resource_id(connection: HTTPConnection, name: str, *, missing: str = "not_found") -> str:
    """A UUID from the path in its canonical form; anything else cannot name a resource."""
    try:
        return str(uuid.UUID(connection.path_params[name]))
    except ValueError:
        raise GatewayError(missing, "No resource with that id exists in this workspace.") from None


def sandbox_id(call: Call | SocketCall) -> str:
    """The sandbox a route is about."""
    connection = call.request if isinstance(call, Call) else call.socket
    return resource_id(connection, "sandbox_id", missing="sandbox_not_found")


def pid(call: Call) -> int:
    """The process a route is about."""
    raw = call.request.path_params["pid"]
    if not (raw.isascii() and raw.isdigit() and len(raw) < 10):
        raise GatewayError("process_not_found", "No such process in this sandbox.")
    return int(raw)


def timestamp(field: str, value: str | None) -> float | None:
    """Unix seconds of an ISO 8601 time; UTC unless it says otherwise."""
    if value is None:
        return None
    try:
        moment = dt.datetime.fromisoformat(value)
    except ValueError:
        raise invalid(field, "must be an ISO 8601 time such as 2027-01-01T00:00:00Z") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.UTC)
    seconds = moment.timestamp()
    try:
        dt.datetime.fromtimestamp(seconds, dt.UTC)
    except (OverflowError, ValueError):
        raise invalid(field, "must lie in the years 1 to 9999, in UTC too") from None
    return seconds


def base64_bytes(field: str, value: str) -> bytes:
    """Standard base64; white space between is allowed, other stray characters are not."""
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except ValueError:
        raise invalid(field, "must be base64") from None


def metadata(value: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Free-form data, bounded in size."""
    if value is not None and len(msgspec.json.encode(value)) > _METADATA_BYTES_MAX:
        raise invalid("metadata", f"must not exceed {_METADATA_BYTES_MAX} bytes as JSON")
    return value
