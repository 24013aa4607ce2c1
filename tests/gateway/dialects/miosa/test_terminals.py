import pytest

from gateway.dialects.miosa import MiosaDialect, terminals
from gateway.dialects.miosa.terminals import parse_control
from tests.support.calls import make_request


@pytest.mark.parametrize("text", ["ls -l\n", "{", "{}", '{"type": "other"}', '{"type": 1}', "[1]"])
def test_everything_but_a_known_control_is_input(text):
    assert parse_control(text) is None


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"type": "stdin", "data": "ls\\n"}', "stdin"),
        ('{"type":"resize","rows":40,"cols":120}', "resize"),
        ('{"type":"signal","signal":"SIGINT"}', "signal"),
        ('{"type":"ping"}', "ping"),
    ],
)
def test_controls(text, kind):
    control = parse_control(text)
    assert control is not None
    assert control.type == kind


def socket_request(**headers):
    return make_request(path="/api/v1/sandboxes/x/terminal", headers={"host": "sandgate.example:8443", **headers})


@pytest.mark.parametrize(("proto", "scheme"), [("http", "ws"), ("https", "wss")])
def test_socket_url_is_what_the_caller_reaches(proto, scheme):
    url = terminals.socket_url(socket_request(**{"x-forwarded-proto": proto}), "/sandboxes/x", ticket="t 1")
    assert url == f"{scheme}://sandgate.example:8443/api/v1/sandboxes/x?ticket=t+1"


@pytest.mark.parametrize(
    ("headers", "subprotocols", "key"),
    [
        ({"authorization": "Bearer msk_live_1"}, [], "msk_live_1"),
        ({"authorization": "bearer  msk_live_1 "}, [], "msk_live_1"),
        ({"authorization": "Basic abc"}, [], None),
        ({}, ["miosa-exec-v1", "bearer.msk_live_1"], "msk_live_1"),
        ({}, ["miosa-exec-v1"], None),
        ({}, [], None),
    ],
)
def test_where_keys_stand(headers, subprotocols, key):
    request = make_request(headers=headers, query={"ticket": "t"})
    request.scope["subprotocols"] = subprotocols
    credentials = MiosaDialect().credentials(request)
    assert (credentials.key, credentials.ticket) == (key, "t")


@pytest.mark.parametrize("text", ['{"type":"resize","rows":0,"cols":80}', '{"type":"resize","rows":"many"}'])
def test_a_control_with_bad_fields_is_neither_obeyed_nor_typed(text):
    control = parse_control(text)
    assert control is not None
    assert (control.type, control.data) == ("ignored", "")
