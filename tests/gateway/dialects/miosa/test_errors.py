import orjson
import pytest

from gateway.dialects.miosa import errors
from gateway.errors import CODES, FieldProblem, GatewayError

#: (status, code) pairs the specification writes down.
SPECIFIED = {
    "malformed": (400, "bad_request"),
    "unauthenticated": (401, "unauthorized"),
    "forbidden": (403, "forbidden"),
    "not_found": (404, "not_found"),
    "sandbox_not_found": (404, "sandbox_not_found"),
    "conflict": (409, "conflict"),
    "too_large": (413, "payload_too_large"),
    "validation_failed": (422, "validation_error"),
    "rate_limited": (429, "rate_limited"),
    "agent_unavailable": (502, "bad_gateway"),
}


def test_every_code_has_a_row_and_no_row_is_left_over():
    assert set(errors.TABLE) == set(CODES)


@pytest.mark.parametrize(("code", "row"), SPECIFIED.items())
def test_specified_spellings(code, row):
    assert errors.TABLE[code] == row


@pytest.mark.parametrize("code", CODES)
def test_status_tells_who_has_to_act(code):
    status, _ = errors.TABLE[code]
    assert (status < 500) == (CODES[code].source == "caller")


def test_error_is_said_nested_and_flat():
    error = GatewayError("validation_failed", "Bad.", details=[FieldProblem("port", "is required")])
    response = errors.error_response(error, "req_1")
    body = orjson.loads(response.body)
    assert response.status_code == 422
    assert body["error"] == {
        "code": "validation_error",
        "message": "Bad.",
        "request_id": "req_1",
        "details": [{"field": "port", "reason": "is required"}],
    }
    assert {name: body[name] for name in ("code", "message", "request_id", "details")} == body["error"]


def test_details_and_retry_after_only_where_they_apply():
    body = orjson.loads(errors.error_response(GatewayError("not_found", "No."), "req_1").body)
    assert set(body) == {"error", "code", "message", "request_id"}


def test_retry_after_is_whole_seconds_rounded_up():
    response = errors.error_response(GatewayError("rate_limited", "Slow.", retry_after_s=1.2), "req_1")
    assert response.headers["retry-after"] == "2"
    body = orjson.loads(response.body)
    assert (body["retry_after"], body["error"]["retry_after"]) == (2, 2)


def test_missing_key_says_how_to_authenticate():
    assert errors.error_response(GatewayError("unauthenticated", "No."), "r").headers["www-authenticate"] == "Bearer"


def test_late_failure_cannot_pass_for_success():
    response = errors.error_response(GatewayError("agent_unavailable", "Gone."), "req_1", status_sent=True)
    body = orjson.loads(response.body)
    assert body["exit_code"] != 0
    assert body["stderr"] == "Gone."
    assert body["error"]["code"] == "bad_gateway"
