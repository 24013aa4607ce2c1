"""`sandgate plane`: look at the plane that runs, replace it, take it out of service."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Any

import orjson

from gateway.orders import OrderError, give_order
from gateway.settings import Settings
from previews.errors import PlaneError
from previews.plane import PlaneClient

#: For the plane to be found and to answer.
_ANSWER_WITHIN_S = 5.0


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Run the subcommand; the exit code."""
    try:
        asyncio.run(_ACTIONS[arguments.action](arguments, settings))
    except (OrderError, PlaneError) as error:
        message = "no plane answers here; is the server running?" if isinstance(error, PlaneError) else str(error)
        print(f"sandgate: {message}", file=sys.stderr)
        return 1
    return 0


async def _routes(arguments: argparse.Namespace, settings: Settings) -> None:
    async with PlaneClient(str(settings.plane_socket), push_timeout_s=_ANSWER_WITHIN_S) as plane:
        await plane.wait_connected(_ANSWER_WITHIN_S)
        async for route in plane.routes():
            if arguments.json:
                _print_json(route)
            else:
                ports = " ".join(f"{port['port']}{'' if port['is_public'] else '*'}" for port in route["ports"])
                _row(route["slug"], route["id"], route["state"], route["address"], route["in_flight"], ports)


async def _connections(arguments: argparse.Namespace, settings: Settings) -> None:
    async with PlaneClient(str(settings.plane_socket), push_timeout_s=_ANSWER_WITHIN_S) as plane:
        await plane.wait_connected(_ANSWER_WITHIN_S)
        found = await plane.connections()
    if arguments.json:
        _print_json({name: value for name, value in found.items() if name not in {"t", "n"}})
        return
    for name in ("connections", "tunnels", "waiting", "requests"):
        _row(f"{name:12}", found[name])
    for client in found["clients"]:
        _row("client", client["address"], client["connections"])
    for sandbox in found["sandboxes"]:
        _row("sandbox", sandbox["slug"], sandbox["id"], sandbox["in_flight"], f"{sandbox['waiting']} waiting")


async def _restart(_: argparse.Namespace, settings: Settings) -> None:
    answer = await give_order(settings.orders_socket, "restart plane")
    print(f"process {answer['pid']} serves now")


async def _drain(_: argparse.Namespace, settings: Settings) -> None:
    await give_order(settings.orders_socket, "drain plane")
    print("the plane has ended; `sandgate plane restart` starts it again")


def _row(*cells: Any) -> None:
    print("  ".join(str(cell) for cell in cells).rstrip())


def _print_json(value: Any) -> None:
    print(orjson.dumps(value).decode())


_ACTIONS = {"routes": _routes, "conns": _connections, "restart": _restart, "drain": _drain}
