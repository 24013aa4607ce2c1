import re

import pytest
from openapi_spec_validator import validate

from gateway.dialects.miosa import MiosaDialect, openapi
from gateway.dialects.miosa.routes import FAMILIES, ROUTES


@pytest.fixture(scope="module")
def document():
    return openapi.document(FAMILIES)


def test_document_is_valid(document):
    assert document["openapi"].startswith("3.1")
    validate(document)


def test_every_served_route_is_documented_and_no_other(document):
    served = {(row.method, re.sub(r":\w+}", "}", row.path)) for row in MiosaDialect().operations}
    documented = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert served == documented


def test_no_route_is_listed_twice():
    rows = [(route.method, route.path) for route in ROUTES]
    assert len(rows) == len(set(rows))


def test_operation_ids_are_unique(document):
    ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids))


def test_every_operation_says_what_it_does(document):
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation["summary"], operation["operationId"]


def test_only_documents_need_no_key(document):
    public = {
        operation["tags"][0]
        for methods in document["paths"].values()
        for operation in methods.values()
        if operation.get("security") == []
    }
    assert public == {"Documents"}


def test_changes_take_an_idempotency_key_and_reads_do_not(document):
    for route in ROUTES:
        operation = document["paths"][route.path.replace(":path", "")][route.method.lower()]
        names = {parameter["name"] for parameter in operation["parameters"]}
        assert ("Idempotency-Key" in names) == route.mutates


def test_no_route_hides_another():
    """The first match wins, so a path with parameters must come after the literal ones it would swallow."""
    for index, route in enumerate(ROUTES):
        pattern = re.sub(r"{\w+:path}", ".+", re.sub(r"{\w+}", "[^/]+", route.path))
        for later in ROUTES[index + 1 :]:
            if later.method == route.method and later.path != route.path:
                assert not re.fullmatch(pattern, later.path), f"{route.path} hides {later.path}"
