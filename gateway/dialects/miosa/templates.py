"""Templates that sandboxes start from: the server's, and those that workspaces build."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import Meta

from gateway import commands, resources
from gateway.dialects.miosa import build_spec, decode
from gateway.dialects.miosa.answers import Pagination, iso_time
from gateway.dialects.miosa.route import NOTHING, Route, bare, one
from gateway.errors import GatewayError
from gateway.pipeline import Call

READ = "sandboxes:read"
WRITE = "sandboxes:write"

#: The name clients send when they mean "whatever is usual".
DEFAULT = "miosa-sandbox"
#: Of the form of specifications; clients show it.
SPEC_VERSION = "2026-05-13"

TemplateSlug = Annotated[str, Meta(min_length=1, max_length=80, pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]


class ListTemplatesQuery(msgspec.Struct):
    """include_aliases: list each alias as an entry of its own."""

    include_aliases: bool = False


class CreateTemplateRequest(msgspec.Struct, kw_only=True):
    """What to build; the form of `build_spec` is at `/sandbox-templates/build-spec`."""

    name: decode.Name
    build_spec: dict[str, Any]
    slug: TemplateSlug | None = None
    description: Annotated[str, Meta(max_length=2000)] | None = None
    metadata: decode.Metadata | None = None


class ValidateRequest(msgspec.Struct):
    """The specification to look at."""

    build_spec: dict[str, Any]


class Template(TypedDict):
    """A template. `status` is `ready` once sandboxes can start from it; a rebuild leaves it so."""

    id: str
    name: str
    slug: str
    description: str
    status: Literal["building", "ready", "failed"]
    state: Literal["building", "ready", "failed"]
    built_in: bool
    product: Literal["sandbox"]
    aliases: list[str]
    alias_of: str | None
    digest: str
    size_bytes: int
    packages: list[str]
    image_id: str | None
    current_build_id: str | None
    build_spec: dict[str, Any] | None
    cpu_count: float | None
    memory_mb: int | None
    disk_mb: int | None
    workdir: str
    preview_port: int | None
    start_command: str | None
    readiness_probe: dict[str, Any] | None
    metadata: dict[str, Any]
    created_at: str
    updated_at: str


class TemplateList(TypedDict):
    """All templates, and which one a sandbox gets that names none."""

    default_template_id: str
    data: list[Template]
    page: Pagination


class Catalogue(TypedDict):
    """All templates."""

    templates: list[Template]
    default_template_id: str


class SpecSchema(TypedDict):
    """The form of specifications, as a JSON schema."""

    version: str
    schema: dict[str, Any]
    fields: dict[str, Any]


class SpecProblem(TypedDict):
    """One bad field."""

    code: str
    field: str
    message: str


class Validation(TypedDict):
    """Whether a specification is well-formed; if so, as the server understands it."""

    valid: bool
    build_spec: dict[str, Any] | None
    errors: list[SpecProblem]


def template(item: resources.Template, *, alias: str | None = None) -> Template:
    """A template in MIOSA's words, under one of its aliases if given."""
    name = alias or item.name
    spec = item.spec
    return Template(
        id=item.id if alias is None else alias,
        name=name,
        slug=alias or item.slug,
        description=item.description if alias is None else _description(item, alias),
        status=item.state,
        state=item.state,
        built_in=item.is_built_in,
        product="sandbox",
        aliases=list(item.aliases),
        alias_of=None if alias is None else item.name,
        digest=item.digest,
        size_bytes=item.size_bytes,
        packages=list(item.packages),
        image_id=item.image_id,
        current_build_id=item.build_id,
        build_spec=None if spec is None else build_spec.as_json(spec),
        cpu_count=item.cpu_count,
        memory_mb=item.memory_mib,
        disk_mb=item.disk_mib,
        workdir="/workspace" if spec is None else spec.workdir,
        preview_port=None if spec is None else spec.preview_port,
        start_command=None if spec is None else spec.start_command,
        readiness_probe=None if spec is None or spec.probe is None else build_spec.probe_as_json(spec.probe),
        metadata=dict(item.metadata),
        created_at=iso_time(item.created_at),
        updated_at=iso_time(item.updated_at or item.created_at),
    )


def _description(item: resources.Template, alias: str) -> str:
    note = item.aliases[alias]
    return f"{item.description} ({note})" if note else item.description


async def list_all(call: Call, query: ListTemplatesQuery) -> TemplateList:
    """List templates, and which one a sandbox gets that names none."""
    found = await call.engine.list_templates(call.principal, commands.ListTemplates())
    items = [template(item) for item in found]
    if query.include_aliases:
        items += [template(item, alias=alias) for item in found for alias in item.aliases]
    default = next((item["id"] for item in items if DEFAULT in {item["name"], *item["aliases"]}), DEFAULT)
    page = Pagination(page=1, page_size=max(len(items), 1), total=len(items))
    return TemplateList(default_template_id=default, data=items, page=page)


async def catalogue(call: Call) -> Catalogue:
    """List templates for clients from 1.2 on, which look for `templates` within `data`."""
    found = await call.engine.list_templates(call.principal, commands.ListTemplates())
    return Catalogue(templates=[template(item) for item in found], default_template_id=DEFAULT)


async def get(call: Call) -> Template:
    """Get a template by id, name or alias."""
    command = commands.GetTemplate(call.request.path_params["name"])
    return template(await call.engine.get_template(call.principal, command))


def parse(call: Call, fields: Mapping[str, Any]) -> resources.BuildSpec:
    """A specification; one without a base starts from the default template."""
    return build_spec.parse(fields, call.engine.context.settings.default_template)


async def create(call: Call, body: CreateTemplateRequest) -> Template:
    """Make a template from a specification; its build begins at once.

    Follow `current_build_id`, or the newest of its builds, to see how it goes.
    """
    command = commands.CreateTemplate(
        call.effect_id,
        body.name,
        parse(call, body.build_spec),
        slug=body.slug,
        description=body.description or "",
        metadata=decode.metadata(body.metadata) or {},
    )
    return template(await call.engine.create_template(call.principal, command))


async def delete(call: Call) -> None:
    """Delete a template of the workspace with its builds; refused while a sandbox is being made from it."""
    await call.engine.delete_template(call.principal, commands.DeleteTemplate(call.request.path_params["name"]))


async def spec_schema(call: Call) -> SpecSchema:  # noqa: ARG001
    """The form of specifications."""
    schema = build_spec.schema()
    fields = schema["$defs"]["Spec"]["properties"]
    return SpecSchema(version=SPEC_VERSION, schema=schema, fields=fields)


async def validate(call: Call, body: ValidateRequest) -> Validation:
    """Look at a specification without building it."""
    try:
        spec = parse(call, body.build_spec)
    except GatewayError as error:
        problems = [SpecProblem(code=error.code, field=one.field, message=one.reason) for one in error.details]
        return Validation(valid=False, build_spec=None, errors=problems)
    return Validation(valid=True, build_spec=build_spec.as_json(spec), errors=[])


_ALL = "/sandbox-templates"
_ONE = _ALL + "/{name}"

ROUTES = (
    Route("GET", _ALL, list_all, bare(TemplateList), READ, query=ListTemplatesQuery),
    Route("POST", _ALL, create, one(Template, status=201), WRITE, CreateTemplateRequest),
    Route("GET", _ALL + "/build-spec", spec_schema, bare(SpecSchema), READ),
    Route("POST", _ALL + "/validate", validate, one(Validation), READ, ValidateRequest, terms={"mutates": False}),
    Route("GET", _ONE, get, one(Template), READ),
    Route("DELETE", _ONE, delete, NOTHING, WRITE),
    Route("GET", "/templates", catalogue, one(Catalogue), READ),
)
