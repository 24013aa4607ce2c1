"""The arguments of the `sandgate` command. What its subcommands do is in gateway/administration.py and __main__.py."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from gateway import settings
from gateway.settings import Settings

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
printed and kept in credentials.json in the data directory. Ctrl-C lets requests end, removes every sandbox that is not
paused, and stops.
"""

#: Settings that have a flag of `serve`; all others come from the environment or the TOML file.
_FLAGS = ("home", "listen", "admin_listen", "domain", "public_url", "workers", "log_level", "log_to")

#: Commands that `serve` starts its processes with. Nobody else has use for them, so no help names them.
_PARTS = frozenset({"run-api", "run-hostd"})


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
    create.add_argument("--workspace", default=settings.FIRST_WORKSPACE, help="made if there is none of that name")
    create.add_argument("--scope", action="append", default=[], help="e.g. sandboxes:read; repeat; default: everything")
    create.add_argument("--expires-in-days", type=float, metavar="DAYS", help="default: never")
    create.add_argument("--test", action="store_true", help="a key that starts with msk_test_")
    for action, meaning in (("list", "list the keys of a workspace"), ("revoke", "end a key, at once")):
        sub = keys.add_parser(action, help=meaning)
        sub.add_argument("--workspace", default=settings.FIRST_WORKSPACE)
        if action == "revoke":
            sub.add_argument("key_id", help="the id that `sandgate keys list` shows")

    templates = commands.add_parser("templates", help="list and build templates").add_subparsers(
        dest="action", metavar="action", required=True
    )
    templates.add_parser("list", help="what sandboxes can start from")
    templates.add_parser("build", help="build what is missing; `serve` does it too")

    plane = commands.add_parser("plane", help="look at the public listener, replace it, stop it").add_subparsers(
        dest="action", metavar="action", required=True
    )
    for action, meaning in (
        (
            "routes",
            "the sandboxes it leads to: slug, id, state, address, requests in flight, ports (* is private)",
        ),
        ("conns", "its connections, and the clients and sandboxes with most of them"),
    ):
        plane.add_parser(action, help=meaning).add_argument("--json", action="store_true", help="as JSON lines")
    plane.add_parser("restart", help="replace it by a fresh process, without a failed request")
    plane.add_parser("drain", help="accept no more connections, end those that are open, stay down until a restart")

    commands.add_parser("version", help="print the version")
    return top


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    """The arguments, and the settings they, the environment and the TOML file make. Raises SettingsError."""
    given = sys.argv[1:] if argv is None else list(argv)
    is_part = len(given) == 1 and given[0] in _PARTS
    arguments = argparse.Namespace(command=given[0]) if is_part else parser().parse_args(given)
    flags = {name: getattr(arguments, name, None) for name in _FLAGS}
    return arguments, settings.load(os.environ, flags)
