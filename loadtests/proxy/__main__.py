"""`python -m loadtests.proxy`: compare the plane with other proxies and write JSON, Markdown and HTML.

Peers that are not installed are left out, and how to install them is printed. Needs cargo, taskset and openssl.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from loadtests import report
from loadtests.proxy import loadgen, page, peers, table
from loadtests.proxy.cases import CASES, PLANE, Case, Subject
from loadtests.proxy.pairs import Plan, Result, compare
from loadtests.proxy.peers import Site
from loadtests.proxy.processes import BenchError, settle
from loadtests.report import say


async def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.proxy", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of each case")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run, after the warm-up")
    parser.add_argument("--warm-up-s", type=float, default=0.5)
    parser.add_argument("--rate", type=float, help="requests a second: an open loop for every case of HTTP")
    parser.add_argument("--lock", type=Path, help="a file to lock for each round, where others measure too")
    parser.add_argument(
        "--base", type=Path, help="another build of the plane, to be compared in every case with a plane"
    )
    parser.add_argument("--only-base", action="store_true", help="leave the other proxies out")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="directory for the results")
    options = parser.parse_args(arguments)
    chosen = [case for case in CASES if case.name in options.cases or not options.cases]
    if options.base:
        chosen = [with_base(case, options.base, is_alone=options.only_base) for case in chosen]
    if unknown := set(options.cases) - {case.name for case in CASES}:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    if not peers.PLANE.exists():
        parser.error("the plane is not built: run `make build`")

    # Like an interrupt: nothing that was started is left behind.
    if task := asyncio.current_task():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    # Before this process is confined to one core.
    facts = report.facts({})
    settle()
    await loadgen.build()
    plan = Plan(options.pairs, options.seconds, options.warm_up_s, options.lock, options.rate)
    about = {**facts, "versions": peers.versions(), "pairs": plan.pairs, "seconds": plan.seconds}
    results = await measure(chosen, plan)
    write(results, about, options.out)
    for name in sorted({tool.install for tool in peers.TOOLS.values() if not tool.is_present()}):
        say(f"not installed, so not compared: {name}")


def with_base(case: Case, program: Path, *, is_alone: bool) -> Case:
    """The case with an earlier build of the plane among its subjects; alone: and with nothing else."""
    ours = [subject for subject in case.subjects if subject == PLANE]
    base = [Subject("plane, base", peers.plane(program))] if ours else []
    if is_alone:
        return replace(case, subjects=[*ours, *base], bars=())
    return replace(case, subjects=[*case.subjects, *base])


async def measure(cases: Sequence[Case], plan: Plan) -> list[Result]:
    """Every case in turn, each with proxies of its own in front of one origin."""
    results = []
    with tempfile.TemporaryDirectory(prefix="sandgate-bench-") as home:
        directory = Path(home)
        certificate, key = make_certificate(directory / "tls")
        async with loadgen.origin(directory) as origin:
            for case in cases:
                say(f"{case.name}: {case.about}")
                tls = (certificate, key) if case.is_tls else (None, None)

                def site(routes: int, tls: Any = tls) -> Site:
                    return Site(directory, origin, [f"s{number:05}" for number in range(routes)], *tls)

                results.append(await compare(case, site, plan, say))
    return results


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for every preview, which the load generator is told to trust."""
    directory.mkdir()
    certificate, key = directory / "bench.crt", directory / "bench.key"
    names = "subjectAltName=DNS:*.sandbox.localhost,DNS:localhost"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", names, "-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return certificate, key


def write(results: Sequence[Result], about: dict[str, Any], out: Path) -> None:
    """The three files, and the table for who watches."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"proxy-{about['measured_at'].replace(':', '')}.json"
    whole = {"about": about, "cases": [result.as_json() for result in results]}
    path.write_bytes(orjson.dumps(whole, option=orjson.OPT_INDENT_2))
    markdown = table.markdown(results, about)
    path.with_suffix(".md").write_text(markdown)
    path.with_suffix(".html").write_text(page.html(results, about))
    print(markdown)
    say(f"written to {path}, .md and .html")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        try:
            asyncio.run(main(sys.argv[1:]))
        except BenchError as error:
            sys.exit(f"loadtests.proxy: {error}")
