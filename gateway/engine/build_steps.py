"""What the steps of a build do inside the builder's machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gateway.resources import BuildSpec, BuildStep, Probe
from vmm.guest import Command

#: Builders change the system, which only root may.
ROOT = "root"

#: Debian's package manager must not ask anything, and its lists would only make the image larger.
_APT_ENV = {"DEBIAN_FRONTEND": "noninteractive"}
#: The usual template has Node.js without its package manager.
_NPM = "command -v npm >/dev/null || { apt-get update -q && apt-get install -qy --no-install-recommends npm; }"
_PROBE_S = 10.0


def commands(step: BuildStep, spec: BuildSpec, timeout_s: float) -> Iterator[Command]:
    """The commands of a step, to be run one after the other. A `file` step has none."""
    if step.kind == "apt":
        yield _as_root(["apt-get", "update", "-q"], timeout_s, _APT_ENV)
        yield _as_root(["apt-get", "install", "-qy", "--no-install-recommends", *step.packages], timeout_s, _APT_ENV)
        yield _as_root(["apt-get", "clean"], timeout_s, _APT_ENV)
    elif step.kind == "pip":
        yield _as_root(["python3", "-m", "pip", "install", "--no-cache-dir", *step.packages], timeout_s, spec.env)
    elif step.kind == "npm":
        yield Command(shell=_NPM, cwd="/", env=_APT_ENV, user=ROOT, timeout_s=timeout_s)
        yield _as_root(["npm", "install", "--global", "--no-fund", "--no-audit", *step.packages], timeout_s, spec.env)
    elif step.kind == "run":
        yield Command(shell=step.command, cwd=spec.workdir, env=spec.env, user=spec.user or ROOT, timeout_s=timeout_s)


def _as_root(argv: list[str], timeout_s: float, env: Mapping[str, str]) -> Command:
    return Command(argv=argv, cwd="/", env=env, user=ROOT, timeout_s=timeout_s)


def start_command(spec: BuildSpec) -> Command:
    """What goes on running in every sandbox made from the template."""
    return Command(
        shell=spec.start_command, cwd=spec.workdir, env=spec.env, user=spec.user, background=True, name="start"
    )


def probe_command(probe: Probe, spec: BuildSpec) -> Command:
    """Exits with 0 once what was started is ready: for a port when it takes connections, for HTTP below status 400."""
    if probe.kind == "command":
        return Command(shell=probe.command, cwd=spec.workdir, env=spec.env, user=spec.user, timeout_s=_PROBE_S)
    if probe.kind == "http":
        url = f"http://127.0.0.1:{probe.port}{probe.path}"
        argv = ["curl", "--silent", "--show-error", "--output", "/dev/null", "--max-time", "5", "--fail", url]
        return Command(argv=argv, cwd="/", timeout_s=_PROBE_S)
    connect = f"exec 3<>/dev/tcp/127.0.0.1/{probe.port}"
    return Command(argv=["bash", "-c", connect], cwd="/", timeout_s=_PROBE_S)
