"""Writes the OpenAPI 3.1 document from the route table, so that the two cannot drift apart."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.dialects.miosa.answers import Pagination
from gateway.dialects.miosa.errors import TABLE, Error
from gateway.dialects.miosa.route import Answer, Route
from gateway.errors import CODES

_REFERENCE = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"{(\w+)(?::path)?}")

_DESCRIPTION = """\
The part of the MIOSA API that this server offers.

Send `Authorization: Bearer msk_live_…`. Changes take an `Idempotency-Key`: repeating a request with its key within
24 hours gives the first answer again. An object comes as `{…object, "data": object}`, a list as
`{"data": […], "page": {…}}`, an error as `{"error": {…}, "message": …, "code": …}`.
"""

Schema = dict[str, Any]


def document(families: Mapping[str, tuple[Route, ...]]) -> Schema:
    """The document of a route table, grouped by family."""
    schemas = _Schemas([route for routes in families.values() for route in routes])
    paths: dict[str, Schema] = {}
    for family, routes in families.items():
        for route in routes:
            paths.setdefault(_PARAMETER.sub(r"{\1}", route.path), {})[route.method.lower()] = _operation(
                route, family, schemas
            )
    return {
        "openapi": "3.1.0",
        "info": {"title": "Sandgate: MIOSA API", "version": "1.0.0", "description": _DESCRIPTION},
        "servers": [{"url": "/api/v1"}],
        "security": [{"bearer": []}],
        "tags": [{"name": family} for family in families],
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "responses": {"Error": _content("application/json", schemas.of(Error), _error_codes())},
        },
    }


class _Schemas:
    """JSON schemas of all bodies, queries and answers."""

    def __init__(self, routes: list[Route]) -> None:
        kinds = {kind for route in routes for kind in (route.body, route.query, *route.answer.kinds) if kind}
        ordered = sorted(kinds, key=str)
        everything: list[Any] = [*ordered, Error, Pagination]
        schemas, self.components = msgspec.json.schema_components(everything, ref_template=_REFERENCE)
        self._by_kind: dict[Any, Schema] = dict(zip(everything, schemas, strict=True))

    def of(self, kind: Any) -> Schema:
        """A reference to the schema of a type."""
        return self._by_kind[kind]

    def properties(self, kind: Any) -> tuple[dict[str, Schema], list[str]]:
        """The fields of a query and which of them are required."""
        component = self.components[self.of(kind)["$ref"].rpartition("/")[2]]
        return component["properties"], component.get("required", [])


def _operation(route: Route, family: str, schemas: _Schemas) -> Schema:
    summary, _, description = inspect.cleandoc(route.handler.__doc__ or "").partition("\n")
    operation: Schema = {
        "operationId": _operation_id(route),
        "tags": [family],
        "summary": summary.rstrip("."),
        "parameters": _parameters(route, schemas),
        "responses": {str(route.answer.status): _answer(route.answer, schemas)},
    }
    if description.strip():
        operation["description"] = description.strip()
    if route.terms.get("public"):
        operation["security"] = []
    else:
        operation["responses"]["default"] = {"$ref": "#/components/responses/Error"}
        if route.scope is not None:
            operation["x-scope"] = route.scope
    if route.body is not None:
        operation["requestBody"] = _body(schemas.of(route.body))
    elif route.terms.get("streams_body"):
        operation["requestBody"] = _upload_body()
    return operation


def _operation_id(route: Route) -> str:
    """`post_sandboxes_sandbox_id_exec`."""
    return "_".join([route.method.lower(), *re.findall(r"\w+", route.path.replace(":path", ""))]).replace("-", "_")


def _parameters(route: Route, schemas: _Schemas) -> list[Schema]:
    parameters: list[Schema] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(route.path)
    ]
    if route.query is not None:
        fields, required = schemas.properties(route.query)
        parameters += [
            {"name": name, "in": "query", "required": name in required, "schema": schema}
            for name, schema in fields.items()
        ]
    if route.mutates:
        key = {"name": "Idempotency-Key", "in": "header", "required": False, "schema": {"type": "string"}}
        parameters.append(key)
    return parameters


def _body(schema: Schema) -> Schema:
    return {"required": False, "content": {"application/json": {"schema": schema}}}


def _upload_body() -> Schema:
    form = {
        "type": "object",
        "properties": {"path": {"type": "string"}, "file": {"type": "string", "format": "binary"}},
        "required": ["file"],
    }
    content: Schema = {"application/octet-stream": {}, "multipart/form-data": {"schema": form}}
    return {"required": True, "content": content}


def _answer(answer: Answer, schemas: _Schemas) -> Schema:
    if answer.shape == "nothing":
        return {"description": "Done"}
    if answer.shape == "raw":
        return _content(answer.media_type, None, "The content")
    items = [schemas.of(kind) for kind in answer.kinds]
    item: Schema = items[0] if len(items) == 1 else {"anyOf": items}
    if answer.shape == "bare":
        return _content("application/json", item, "The object")
    if answer.shape == "many":
        envelope: Schema = {
            "type": "object",
            "properties": {"data": {"type": "array", "items": item}, "page": schemas.of(Pagination)},
            "required": ["data", "page"],
        }
        return _content("application/json", envelope, "A page")
    envelope = {"allOf": [item, {"type": "object", "properties": {"data": item}, "required": ["data"]}]}
    return _content("application/json", envelope, "The object, flat and under `data`")


def _content(media_type: str, schema: Schema | None, description: str) -> Schema:
    return {"description": description, "content": {media_type: {} if schema is None else {"schema": schema}}}


def _error_codes() -> str:
    rows = sorted(set(TABLE.values()))
    meanings = [
        f"- {status} `{code}`: {' '.join(CODES[ours].meaning for ours, row in TABLE.items() if row == (status, code))}"
        for status, code in rows
    ]
    return "An error. Codes:\n\n" + "\n".join(meanings)
