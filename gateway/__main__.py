"""The `sandgate` command. The only module that starts servers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

from gateway import cli
from gateway.observability import logs
from gateway.settings import Settings, SettingsError, unknown_variables

# Each command loads what it needs and no more: a part that died is back the sooner, and `--help` answers at once.
# ruff: noqa: PLC0415

#: The plane is the only client and has its own limits on headers and connections; this must not be the smaller.
_HEADER_BYTES_MAX = 256 * 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    try:
        arguments, settings = cli.parse(argv)
    except SettingsError as error:
        print(f"sandgate: {error}", file=sys.stderr)
        return 2
    if arguments.command == "serve":
        return _serve(settings)
    if arguments.command == "run-api":
        return _run_api(settings)
    if arguments.command == "run-hostd":
        return _run_hostd(settings)
    if arguments.command == "plane":
        from gateway import plane_command

        return plane_command.run(arguments, settings)
    from gateway import administration

    return administration.run(arguments, settings)


def _serve(settings: Settings) -> int:
    from gateway.children import StartError
    from gateway.supervisor import Supervisor

    logs.configure("supervisor", level=settings.log_level, form="text" if sys.stderr.isatty() else settings.log_format)
    for name in unknown_variables(os.environ):
        logging.getLogger(__name__).warning("%s is no setting and is ignored", name)
    try:
        asyncio.run(Supervisor(settings, lambda line: print(line, flush=True)).run())
    except StartError as error:
        print(f"sandgate: {error}", file=sys.stderr)
        return 1
    return 0


def _run_api(settings: Settings) -> int:
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces, Loops
    from granian.http import HTTP1Settings

    logs.configure("api", level=settings.log_level, form=settings.log_format)
    # A killed instance leaves its socket behind, which cannot be bound again.
    settings.api_socket.unlink(missing_ok=True)
    Granian(
        "gateway.app:create",
        factory=True,
        interface=Interfaces.ASGI,
        uds=settings.api_socket,
        uds_permissions=0o600,
        workers=settings.effective_workers,
        loop=Loops.uvloop,
        http=HTTPModes.http1,
        http1_settings=HTTP1Settings(max_buffer_size=_HEADER_BYTES_MAX),
        respawn_failed_workers=True,
        respawn_interval=0.1,
        workers_kill_timeout=max(1, round(settings.drain_timeout_s)),
        log_enabled=False,
    ).serve()
    return 0


def _run_hostd(settings: Settings) -> int:
    import uvloop

    from vmm.errors import VmmError

    logs.configure("hostd", level=settings.log_level, form=settings.log_format)
    try:
        uvloop.run(_host_service(settings))
    except VmmError as error:
        print(f"sandgate: {error.message}\n{error.detail or ''}".rstrip(), file=sys.stderr)
        return 1
    return 0


async def _host_service(settings: Settings) -> None:
    from gateway.children import settle_heap
    from gateway.host import host_config, host_driver
    from vmm.host.server import serve as serve_host

    serving = asyncio.ensure_future(serve_host(host_config(settings), host_driver(settings), ready=settle_heap))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await serving


if __name__ == "__main__":
    sys.exit(main())
