"""The variables of a sandbox: SQL holds the truth, the agent gives them to every later process."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa

from gateway.commands import DeleteEnv, ListEnv, SetEnv
from gateway.engine.context import Context, owned_row, require_usable
from gateway.engine.translate import vmm_errors
from gateway.errors import GatewayError, invalid
from gateway.resources import Principal
from gateway.store import sandboxes as rows

#: Linux refuses to start a process with more than a few hundred KiB of arguments and variables.
_BYTES_MAX = 128 * 1024


class EnvironmentService:
    """Commands about variables."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def list(self, principal: Principal, command: ListEnv) -> Mapping[str, str]:
        """The variables set through the API. Raises sandbox_not_found."""
        return (await self._context.sandbox(principal, command.sandbox_id)).env

    async def set(self, principal: Principal, command: SetEnv) -> Mapping[str, str]:
        """Set some; returns all. Raises sandbox_not_found, sandbox_not_running, validation_failed (too much)."""
        env = await self._change(principal, command.sandbox_id, command.variables, ())
        with vmm_errors():
            await self._context.host.agent(command.sandbox_id).identity(env=command.variables)
        return env

    async def delete(self, principal: Principal, command: DeleteEnv) -> None:
        """Remove one. Raises sandbox_not_found, sandbox_not_running, not_found."""
        await self._change(principal, command.sandbox_id, {}, (command.name,))
        with vmm_errors():
            await self._context.host.agent(command.sandbox_id).identity(unset=(command.name,))

    async def _change(
        self, principal: Principal, sandbox_id: str, added: Mapping[str, str], removed: tuple[str, ...]
    ) -> Mapping[str, str]:
        def job(connection: sa.Connection) -> Mapping[str, str]:
            sandbox = owned_row(connection, principal, sandbox_id)
            require_usable(sandbox)
            env = {**sandbox.env, **added}
            for name in removed:
                if env.pop(name, None) is None:
                    raise GatewayError("not_found", f"There is no variable {name!r}.")
            if sum(len(name.encode()) + len(value.encode()) for name, value in env.items()) > _BYTES_MAX:
                raise invalid("env", f"all variables together may have {_BYTES_MAX} bytes")
            rows.change(connection, sandbox.id, env=env)
            return env

        return await self._context.database.write(job)
