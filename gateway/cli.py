"""The `sandgate` command: its arguments, and the subcommands that start no server."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from gateway import first_run, settings
from gateway.app import open_engine
from gateway.commands import CreateApiKey, ListApiKeys, RevokeApiKey
from gateway.errors import GatewayError
from gateway.ids import uuid7
from gateway.resources import ApiKey, Principal
from gateway.settings import Settings
from gateway.store import workspaces
from native import agent_path
from vmm.doctor import diagnose
from vmm.errors import VmmError
from vmm.templates.store import TemplateStore

_DESCRIPTION = "A self-hosted cloud of gVisor sandboxes for AI agents, behind the MIOSA API."

_EPILOG = """\
first steps:
  sandgate doctor        say what this host lacks, and how to fix it
  sandgate serve         start everything; prints the API base URL and a key
  sandgate keys create   make another key

Settings are environment variables (SANDGATE_...), listed in docs/settings.md. The data directory is SANDGATE_HOME,
by default ./.sandgate; run the commands where the server runs, with the same settings.
"""

_SERVE = """\
Start the server in the foreground: the public listener, the API and the host service. The first start makes the data
directory, the default template (about a minute) and a key; later starts take seconds. The API base URL and the key are
printed and kept in credentials.json in the data directory. Ctrl-C lets requests end, removes every sandbox and stops.
"""

#: Settings that have a flag of `serve`; all others come from the environment or the TOML file.
_FLAGS = ("home", "listen", "admin_listen", "domain", "public_url", "workers", "log_level", "log_to")

_PAGE = 1000


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("sandgate", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw)
    commands = top.add_subparsers(dest="command", metavar="command", required=True)

    serve = commands.add_parser("serve", help="start the server", description=_SERVE, formatter_class=raw)
    for name in _FLAGS:
        kind, row = settings.table()[name]
        serve.add_argument(
            f"--{name.replace('_', '-')}",
            metavar=getattr(kind, "__name__", "value").upper(),
            help=f"{row.meaning} [{settings.env_name(name)}, default: {getattr(Settings(), name) or 'empty'}]",
        )

    commands.add_parser("doctor", help="say what this host lacks, and how to fix it")

    keys = commands.add_parser("keys", help="make, list and revoke API keys").add_subparsers(
        dest="action", metavar="action", required=True
    )
    create = keys.add_parser("create", help="make a key and print it, this once")
    create.add_argument("--name", default="made by sandgate keys create", help="what the key is for")
    create.add_argument("--workspace", default=first_run.FIRST_WORKSPACE, help="made if there is none of that name")
    create.add_argument("--scope", action="append", default=[], help="e.g. sandboxes:read; repeat; default: everything")
    create.add_argument("--expires-in-days", type=float, metavar="DAYS", help="default: never")
    create.add_argument("--test", action="store_true", help="a key that starts with msk_test_")
    for action, meaning in (("list", "list the keys of a workspace"), ("revoke", "end a key, at once")):
        sub = keys.add_parser(action, help=meaning)
        sub.add_argument("--workspace", default=first_run.FIRST_WORKSPACE)
        if action == "revoke":
            sub.add_argument("key_id", help="the id that `sandgate keys list` shows")

    templates = commands.add_parser("templates", help="list and build templates").add_subparsers(
        dest="action", metavar="action", required=True
    )
    templates.add_parser("list", help="what sandboxes can start from")
    templates.add_parser("build", help="build what is missing; `serve` does it too")

    commands.add_parser("version", help="print the version")
    # Started by `serve`, and by nobody else.
    commands.add_parser("run-api")
    commands.add_parser("run-hostd")
    return top


def run(arguments: argparse.Namespace, options: Settings) -> int:
    """Run a subcommand that starts no server; the exit code."""
    if arguments.command == "version":
        print(importlib.metadata.version("sandgate"))
        return 0
    if arguments.command == "doctor":
        return _doctor(options)
    if arguments.command == "templates":
        return _templates(arguments, options)
    try:
        return asyncio.run(_keys(arguments, options))
    except GatewayError as error:
        print(f"sandgate: {error.message}", file=sys.stderr)
        return 1


def _doctor(options: Settings) -> int:
    findings = diagnose(cache=options.cache)
    for finding in findings:
        print(f"{'ok  ' if finding.is_ok else 'LACK'}  {finding.name}: {finding.what}")
        if not finding.is_ok:
            print(f"      fix: {finding.fix}")
    return 0 if all(finding.is_ok for finding in findings) else 1


def _templates(arguments: argparse.Namespace, options: Settings) -> int:
    store = TemplateStore(options.cache, agent_path())
    if arguments.action == "build":
        try:
            store.ensure(print)
        except VmmError as error:
            print(f"sandgate: {error.message}\n{error.detail or ''}".rstrip(), file=sys.stderr)
            return 1
    for info in store.load():
        _row(info.name, f"{info.size_bytes / 1024**2:.0f} MiB", info.digest[:12], ", ".join(info.aliases))
    for recipe in store.missing():
        _row(recipe.name, "not built")
    return 0


async def _keys(arguments: argparse.Namespace, options: Settings) -> int:
    if not options.home.exists():
        print(f"sandgate: {options.home} does not exist; start the server first", file=sys.stderr)
        return 1
    async with open_engine(options) as engine:
        workspace_id = await engine.context.database.write(
            lambda connection: workspaces.ensure(connection, arguments.workspace)
        )
        principal = Principal(workspace_id, None, frozenset())
        if arguments.action == "create":
            days = arguments.expires_in_days
            command = CreateApiKey(
                effect_id=str(uuid7()),
                name=arguments.name,
                scopes=tuple(arguments.scope),
                expires_at=None if days is None else time.time() + days * 86_400,
                is_test=arguments.test,
            )
            print((await engine.create_api_key(principal, command)).secret)
        elif arguments.action == "revoke":
            await engine.revoke_api_key(principal, RevokeApiKey(arguments.key_id))
            print("revoked")
        else:
            for key in (await engine.list_api_keys(principal, ListApiKeys(page_size=_PAGE))).items:
                _print_key(key)
    return 0


def _print_key(key: ApiKey) -> None:
    used = "never used" if key.last_used_at is None else f"used {_day(key.last_used_at)}"
    ends = "" if key.expires_at is None else f"expires {_day(key.expires_at)}"
    _row(key.id, f"{key.prefix}…", key.name, ",".join(key.scopes) or "everything", used, ends)


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def _row(*cells: Any) -> None:
    print("  ".join(str(cell) for cell in cells).rstrip())


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    """The arguments, and the settings they, the environment and the TOML file make. Raises SettingsError."""
    arguments = parser().parse_args(argv)
    flags = {name: getattr(arguments, name, None) for name in _FLAGS}
    return arguments, settings.load(os.environ, flags)
