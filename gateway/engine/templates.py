"""Templates: what the host offers and what workspaces have built, found by name, slug, alias or id."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable

from gateway.commands import GetTemplate, ListTemplates
from gateway.engine.context import Context
from gateway.engine.translate import vmm_errors
from gateway.errors import GatewayError
from gateway.resources import Principal, Template
from gateway.store import templates as rows
from vmm.types import TemplateInfo

#: A host's templates change when somebody builds one; a create need not ask each time. A miss always asks.
_CACHE_S = 5.0

#: Template ids are made from names, so that they are the same on every host and after every restart.
_NAMESPACE = uuid.UUID("7c8a5d5e-4b0e-5a6f-9d0b-2f1d9d1c6b77")

#: What clients ask for by these names, and what they get: the truth about a name that promises something else.
_ALIASES = {
    "python-3.12": "the Python of the template below, which need not be 3.12",
    "react-vite": "Node.js to run Vite with; no project is set up inside",
    "static": "Python to serve files with: python3 -m http.server",
}


class TemplateService:
    """Commands that find templates."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._known: tuple[Template, ...] = ()
        self._asked_at = -_CACHE_S

    async def list(self, principal: Principal, _command: ListTemplates) -> tuple[Template, ...]:
        """The host's by name, then the workspace's by slug."""
        own = await self._context.database.read(lambda connection: rows.find(connection, principal.workspace_id))
        return (*await self._ask(), *own)

    async def get(self, principal: Principal, command: GetTemplate) -> Template:
        """By id, name, slug or alias; a workspace's own wins over the host's. Raises template_not_found."""
        return await self.resolve(principal, command.name)

    async def resolve(self, principal: Principal, name: str) -> Template:
        """By id, name, slug or alias; a workspace's own wins over the host's. Raises template_not_found."""
        own = await self._context.database.lookup(lambda connection: rows.get(connection, principal.workspace_id, name))
        if own is not None:
            return own
        found = _find(self._known, name) if time.monotonic() - self._asked_at < _CACHE_S else None
        found = found or _find(await self._ask(), name)
        if found is None:
            raise GatewayError("template_not_found", f"There is no template {name!r}.")
        return found

    async def is_built_in(self, name: str) -> bool:
        """Whether the host has a template of that name, alias or id."""
        return _find(await self._ask(), name) is not None

    async def startable(self, principal: Principal, name: str) -> Template:
        """The same, if sandboxes can start from it. Raises template_not_found, template_not_ready."""
        template = await self.resolve(principal, name)
        if not template.is_built_in and template.image_id is None:
            raise GatewayError("template_not_ready", f"The template {name!r} has no build that succeeded yet.")
        return template

    async def _ask(self) -> tuple[Template, ...]:
        with vmm_errors():
            infos = await self._context.host.templates()
        self._known = tuple(sorted(map(_template, infos), key=lambda template: template.name))
        self._asked_at = time.monotonic()
        return self._known


def _find(templates: Iterable[Template], name: str) -> Template | None:
    return next((one for one in templates if name in {one.name, one.id, *one.aliases}), None)


def _template(info: TemplateInfo) -> Template:
    return Template(
        id=str(uuid.uuid5(_NAMESPACE, info.name)),
        name=info.name,
        slug=info.name,
        description=info.description,
        aliases={alias: _ALIASES.get(alias, "") for alias in info.aliases},
        digest=info.digest,
        size_bytes=info.size_bytes,
        packages=tuple(info.packages),
        created_at=info.created_at,
        base_template=info.name,
    )
