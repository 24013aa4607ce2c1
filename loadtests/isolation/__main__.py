"""`python -m loadtests.isolation`: requests to several sandboxes while parts of the server die and routes change.

Every sandbox answers with its own id, and the load generator knows which one each host stands for. A wrong answer, or
a failure that is not one of the plane's documented codes, makes this program fail.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from loadtests import report
from loadtests.isolation.caller import Speaker, make_speaker
from loadtests.isolation.upheaval import Upheaval
from loadtests.proxy import loadgen
from loadtests.server import SETTINGS, Target, serve

#: An answer of the plane's own: a status and a code of docs/previews.md.
_DOCUMENTED = re.compile(r"\d{3} [a-z_]+")
_PATIENCE_S = 3600.0


async def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.isolation", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--sandboxes", type=int, default=6)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--every-s", type=float, default=4.0, help="between two parts that die or are replaced")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="directory for the results")
    options = parser.parse_args(arguments)

    await loadgen.build()
    about = report.facts(SETTINGS)
    async with serve(SETTINGS) as target:
        speakers = [await make_speaker(target) for _ in range(options.sandboxes)]
        print(f"{len(speakers)} sandboxes answer; asking {options.requests:,} times", file=sys.stderr)
        upheaval = Upheaval(target, speakers, options.every_s)
        going_on = asyncio.create_task(upheaval.run())
        try:
            measured = await ask_all(target, speakers, options.requests, options.connections)
        finally:
            going_on.cancel()
            ended = await asyncio.gather(going_on, return_exceptions=True)
    # What went wrong in the upheaval itself would otherwise look like peace.
    if not isinstance(ended[0], asyncio.CancelledError):
        raise ended[0] if isinstance(ended[0], BaseException) else RuntimeError("the upheaval ended by itself")
    result = {"about": about, "measured": measured, "done": upheaval.done, "wrong": upheaval.wrong}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"isolation-{about['measured_at'].replace(':', '')}.json"
    path.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2))
    print(summary(measured, upheaval))
    return 0 if is_good(measured, upheaval) else 1


async def ask_all(target: Target, speakers: Sequence[Speaker], requests: int, connections: int) -> dict[str, Any]:
    """So many requests to the speakers in turn, each answer compared with what it must be."""
    with tempfile.NamedTemporaryFile("w", suffix=".hosts") as hosts:
        hosts.writelines(f"{speaker.host} {speaker.id}\n" for speaker in speakers)
        hosts.flush()
        port = urlsplit(target.base_url).port
        arguments = ["http", "--connect", f"127.0.0.1:{port}", "--hosts", hosts.name, "--warm-up-s", "0"]
        arguments += ["--requests", str(requests), "--connections", str(connections)]
        return await loadgen.load(arguments, seconds=_PATIENCE_S)


def is_good(measured: dict[str, Any], upheaval: Upheaval) -> bool:
    """Whether no answer was wrong and every failure is a documented one."""
    return not upheaval.wrong and all(_DOCUMENTED.fullmatch(name) for name in measured["failures"])


def summary(measured: dict[str, Any], upheaval: Upheaval) -> str:
    """A few lines for a person."""
    wrong = measured["failures"].get("wrong body", 0) + len(upheaval.wrong)
    lines = [
        f"{measured['requests']:,} answers in {measured['seconds']:.0f} s, {wrong} of another sandbox",
        f"failures: {measured['failures'] or 'none'}; sent again on a new connection: {measured['retries']}",
        f"meanwhile: {', '.join(f'{count} {what}' for what, count in upheaval.done.items())}",
        *upheaval.wrong,
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
