"""Templates that sandboxes start from."""

from __future__ import annotations

from typing import Literal, TypedDict

import msgspec

from gateway import commands, resources
from gateway.dialects.miosa.answers import Pagination, iso_time
from gateway.dialects.miosa.route import Route, bare, one
from gateway.pipeline import Call

READ = "sandboxes:read"

#: The name clients send when they mean "whatever is usual".
DEFAULT = "miosa-sandbox"


class ListTemplatesQuery(msgspec.Struct):
    """include_aliases: list each alias as an entry of its own."""

    include_aliases: bool = False


class Template(TypedDict):
    """A template."""

    id: str
    name: str
    slug: str
    description: str
    status: Literal["ready"]
    state: Literal["ready"]
    built_in: bool
    product: Literal["sandbox"]
    aliases: list[str]
    alias_of: str | None
    digest: str
    size_bytes: int
    packages: list[str]
    created_at: str


class TemplateList(TypedDict):
    """All templates, and which one a sandbox gets that names none."""

    default_template_id: str
    data: list[Template]
    page: Pagination


class Catalogue(TypedDict):
    """All templates."""

    templates: list[Template]
    default_template_id: str


def template(item: resources.Template, *, alias: str | None = None) -> Template:
    """A template in MIOSA's words, under one of its aliases if given."""
    name = alias or item.name
    return Template(
        id=item.id if alias is None else alias,
        name=name,
        slug=name,
        description=item.description,
        status="ready",
        state="ready",
        built_in=True,
        product="sandbox",
        aliases=list(item.aliases),
        alias_of=None if alias is None else item.name,
        digest=item.digest,
        size_bytes=item.size_bytes,
        packages=list(item.packages),
        created_at=iso_time(item.created_at),
    )


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


ROUTES = (
    Route("GET", "/sandbox-templates", list_all, bare(TemplateList), READ, query=ListTemplatesQuery),
    Route("GET", "/sandbox-templates/{name}", get, one(Template), READ),
    Route("GET", "/templates", catalogue, one(Catalogue), READ),
)
