"""The subcommands of `sandgate` that start no server: doctor, keys, templates, version."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import sys
import time
from typing import Any

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

_PAGE = 1000


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
