import msgspec
import pytest

from gateway.dialects.miosa import clients, paging
from gateway.errors import GatewayError
from tests.support.calls import make_request

LIBRARY = {"user-agent": "miosa-python/0.1.0"}


def page(headers=None, **fields) -> tuple[int, int]:
    return paging.page(make_request(headers=headers), msgspec.convert(fields, paging.PageQuery))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (1, 20)),
        ({"page": 2}, (2, 20)),
        ({"page_size": 5}, (1, 5)),
        ({"per_page": 5, "page": 3}, (3, 5)),
        ({"limit": 5}, (1, 5)),
        ({"limit": 5, "offset": 10}, (3, 5)),
        ({"offset": 20}, (2, 20)),
    ],
)
def test_page_in_all_spellings(fields, expected):
    assert page(**fields) == expected


def test_libraries_that_do_not_page_see_a_hundred():
    assert page(LIBRARY) == (1, 100)


@pytest.mark.parametrize("fields", [{"page": 1}, {"offset": 0}])
def test_libraries_that_page_get_what_is_usual(fields):
    assert page(LIBRARY, **fields) == (1, 20)


def test_offset_between_pages_is_refused():
    with pytest.raises(GatewayError, match="offset"):
        page(offset=7)


@pytest.mark.parametrize("fields", [{"page": 0}, {"page_size": 0}, {"page_size": 101}, {"limit": -1}, {"offset": -1}])
def test_bounds(fields):
    with pytest.raises(msgspec.ValidationError):
        page(**fields)


@pytest.mark.parametrize(
    ("agent", "repeats"),
    [
        ("miosa-python/0.1.0", True),
        ("miosa-python/1.3.8", True),
        ("miosa-python/2.5.9", True),
        ("miosa-python/2.6.0", False),
        ("miosa-python/2.19.2", False),
        ("miosa-python/10.0.0", False),
        ("curl/8.5.0", False),
        ("", False),
    ],
)
def test_who_repeats_changes_without_a_key(agent, repeats):
    assert clients.repeats_changes(make_request(headers={"user-agent": agent})) is repeats
