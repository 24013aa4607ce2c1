"""Templates: what the host offers, found by name, alias or id."""

from __future__ import annotations

import time
import uuid

from gateway.commands import GetTemplate, ListTemplates
from gateway.engine.translate import vmm_errors
from gateway.errors import GatewayError
from gateway.resources import Principal, Template
from vmm.client import HostClient
from vmm.types import TemplateInfo

#: A host's templates change when somebody builds one; a create need not ask each time. A miss always asks.
_CACHE_S = 5.0

#: Template ids are made from names, so that they are the same on every host and after every restart.
_NAMESPACE = uuid.UUID("7c8a5d5e-4b0e-5a6f-9d0b-2f1d9d1c6b77")


class TemplateService:
    """Commands about templates."""

    def __init__(self, host: HostClient) -> None:
        self._host = host
        self._known: tuple[Template, ...] = ()
        self._asked_at = -_CACHE_S

    async def list(self, _principal: Principal, _command: ListTemplates) -> tuple[Template, ...]:
        """All of them, by name."""
        return await self._ask()

    async def get(self, _principal: Principal, command: GetTemplate) -> Template:
        """By id, name or alias. Raises template_not_found."""
        return await self.resolve(command.name)

    async def resolve(self, name: str) -> Template:
        """By id, name or alias. Raises template_not_found."""
        found = _find(self._known, name) if time.monotonic() - self._asked_at < _CACHE_S else None
        found = found or _find(await self._ask(), name)
        if found is None:
            raise GatewayError("template_not_found", f"There is no template {name!r}.")
        return found

    async def _ask(self) -> tuple[Template, ...]:
        with vmm_errors():
            infos = await self._host.templates()
        self._known = tuple(sorted(map(_template, infos), key=lambda template: template.name))
        self._asked_at = time.monotonic()
        return self._known


def _find(templates: tuple[Template, ...], name: str) -> Template | None:
    return next((one for one in templates if name in {one.name, one.id, *one.aliases}), None)


def _template(info: TemplateInfo) -> Template:
    return Template(
        id=str(uuid.uuid5(_NAMESPACE, info.name)),
        name=info.name,
        description=info.description,
        aliases=tuple(info.aliases),
        digest=info.digest,
        size_bytes=info.size_bytes,
        packages=tuple(info.packages),
        created_at=info.created_at,
    )
