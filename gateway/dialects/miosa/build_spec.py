"""From a build specification as callers spell it to the engine's.

The official clients write camel case (`startCmd`, `memoryMib`); snake case is taken as well. Steps come in two forms,
`{"run": "make"}` and `{"type": "run", "command": "make"}`; the lists `apt`, `pip`, `npm`, `files` and `commands` beside
them are short for steps, in that order.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from gateway.dialects.miosa import decode
from gateway.dialects.miosa.decode import first
from gateway.errors import FieldProblem, GatewayError
from gateway.resources import BuildSpec, BuildStep, Probe

#: Names, versions and extras as apt, pip and npm write them; never an option.
_PACKAGE = r"^[A-Za-z0-9@][A-Za-z0-9@/_.+:~^*\[\],=<>!-]*$"

Package = Annotated[str, Meta(max_length=200, pattern=_PACKAGE)]
Packages = Annotated[list[Package], Meta(max_length=200)]
Line = Annotated[str, Meta(min_length=1, max_length=32 * 1024, pattern=r"^[^\x00]*$")]
Content = Annotated[str, Meta(max_length=1024 * 1024)]
Kind = Literal["apt", "pip", "npm", "run", "file"]

#: Of fields whose names are no names here.
_SPELLINGS = {
    "from_": "from",
    "memory_mib": "memoryMib",
    "disk_mib": "diskMib",
    "start_cmd": "startCmd",
    "ready_cmd": "readyCmd",
    "shown_port": "previewPort",
}


class Step(msgspec.Struct, kw_only=True):
    """One step: packages of `apt`, `pip` or `npm`, a shell line to `run`, or a `file` with its `content`."""

    type: Kind | None = None
    apt: Packages | str | None = None
    pip: Packages | str | None = None
    npm: Packages | str | None = None
    run: Line | None = None
    file: decode.Path | None = None
    packages: Packages | None = None
    command: Line | None = None
    cmd: Line | None = None
    path: decode.Path | None = None
    content: Content | None = None
    mode: decode.Octal | None = None


class ReadinessProbe(msgspec.Struct, kw_only=True):
    """When the start command has done its work: a `command` succeeds, or a port or URL of the sandbox answers."""

    type: Literal["command", "http", "port", "tcp"] | None = None
    command: Line | None = None
    url: decode.Text | None = None
    port: decode.Port | None = None
    path: decode.UrlPath | None = None
    timeout_sec: Annotated[float, Meta(ge=1, le=600)] | None = None


class Spec(msgspec.Struct, kw_only=True, rename=_SPELLINGS):
    """What a template is made of. `from`: the template it starts from; sizes are in MiB."""

    from_: decode.Name | None = None
    vcpu: Annotated[float, Meta(ge=0.1, le=8)] | None = None
    cpu_count: Annotated[float, Meta(ge=0.1, le=8)] | None = None
    memory_mib: Annotated[int, Meta(ge=128, le=16384)] | None = None
    memory_mb: Annotated[int, Meta(ge=128, le=16384)] | None = None
    disk_mib: Annotated[int, Meta(ge=64, le=32768)] | None = None
    disk_mb: Annotated[int, Meta(ge=64, le=32768)] | None = None
    apt: Packages | None = None
    packages: Packages | None = None
    pip: Packages | None = None
    npm: Packages | None = None
    files: Annotated[dict[decode.Path, Content], Meta(max_length=200)] | None = None
    commands: Annotated[list[Line], Meta(max_length=200)] | None = None
    steps: Annotated[list[Step], Meta(max_length=200)] | None = None
    env: decode.Env | None = None
    workdir: decode.Path | None = None
    user: Annotated[str, Meta(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")] | None = None
    start_cmd: Line | None = None
    start_command: Line | None = None
    ready_cmd: Line | None = None
    ready_command: Line | None = None
    readiness_probe: ReadinessProbe | None = None
    shown_port: decode.Port | None = None
    preview_port: decode.Port | None = None


def parse(fields: Mapping[str, Any], default_base: str) -> BuildSpec:
    """A specification. Raises GatewayError build_spec_invalid with a detail per bad field."""
    try:
        spec = msgspec.convert(dict(fields), Spec)
    except msgspec.ValidationError as error:
        found = decode.invalid_fields(fields, Spec, strict=True)
        raise _invalid([FieldProblem(f"build_spec.{one.field}", one.reason) for one in found.details]) from error
    workdir = spec.workdir or "/workspace"
    if not workdir.startswith("/"):
        raise _invalid([FieldProblem("build_spec.workdir", "must be an absolute path")])
    return BuildSpec(
        base=spec.from_ or default_base,
        steps=tuple(_steps(spec)),
        env=spec.env or {},
        workdir=workdir,
        user=spec.user,
        start_command=first(spec.start_cmd, spec.start_command),
        probe=_probe(spec),
        preview_port=first(spec.shown_port, spec.preview_port),
        cpu_count=first(spec.vcpu, spec.cpu_count),
        memory_mib=first(spec.memory_mib, spec.memory_mb),
        disk_mib=first(spec.disk_mib, spec.disk_mb),
    )


def _steps(spec: Spec) -> Iterator[BuildStep]:
    for kind, packages in (("apt", first(spec.apt, spec.packages)), ("pip", spec.pip), ("npm", spec.npm)):
        if packages:
            yield BuildStep(kind, tuple(packages))  # type: ignore[arg-type]
    for path, content in (spec.files or {}).items():
        yield _file(f"files.{path}", path, content, None)
    for line in spec.commands or ():
        yield BuildStep("run", command=line)
    for number, step in enumerate(spec.steps or ()):
        yield _step(f"steps[{number}]", step)


def _step(place: str, step: Step) -> BuildStep:
    given = [kind for kind in ("apt", "pip", "npm", "run", "file") if getattr(step, kind) is not None]
    if len(given) > 1 or (step.type is None and not given):
        raise _invalid([FieldProblem(f"build_spec.{place}", "must be exactly one of apt, pip, npm, run and file")])
    kind: Kind = step.type or given[0]  # type: ignore[assignment]
    if kind == "run":
        line = first(step.run, step.command, step.cmd)
        if line is None:
            raise _invalid([FieldProblem(f"build_spec.{place}.run", "is required")])
        return BuildStep("run", command=line)
    if kind == "file":
        return _file(place, first(step.file, step.path), step.content, step.mode)
    return BuildStep(kind, _packages(f"{place}.{kind}", first(getattr(step, kind), step.packages)))


def _packages(place: str, given: list[str] | str | None) -> tuple[str, ...]:
    """Packages as a list, or as one line with spaces between."""
    try:
        packages = msgspec.convert(shlex.split(given) if isinstance(given, str) else given, Packages)
    except (msgspec.ValidationError, ValueError) as error:
        raise _invalid([FieldProblem(f"build_spec.{place}", "must be names of packages")]) from error
    if not packages:
        raise _invalid([FieldProblem(f"build_spec.{place}", "must not be empty")])
    return tuple(packages)


def _file(place: str, path: str | None, content: str | None, mode: str | None) -> BuildStep:
    if path is None or not path.startswith("/"):
        raise _invalid([FieldProblem(f"build_spec.{place}", "must be an absolute path")])
    return BuildStep("file", path=path, content=content or "", mode=0o644 if mode is None else int(mode, 8))


def _probe(spec: Spec) -> Probe | None:
    line = first(spec.ready_cmd, spec.ready_command)
    if line is not None:
        return Probe("command", command=line)
    probe = spec.readiness_probe
    if probe is None:
        return None
    timeout_s = probe.timeout_sec or 60.0
    if probe.command is not None:
        return Probe("command", command=probe.command, timeout_s=timeout_s)
    port, path = probe.port, probe.path
    if probe.url is not None:
        port, path = _place_of(probe.url)
    if port is None:
        reason = "needs a command, a port or a URL of the sandbox such as http://127.0.0.1:3000/"
        raise _invalid([FieldProblem("build_spec.readiness_probe", reason)])
    kind: Literal["http", "port"] = "port" if probe.type in ("port", "tcp") else "http"
    return Probe(kind, port=port, path=path or "/", timeout_s=timeout_s)


def _place_of(url: str) -> tuple[int | None, str]:
    try:
        parts = urlsplit(url)
        return parts.port or 80, msgspec.convert(parts.path or "/", decode.UrlPath)
    except (ValueError, msgspec.ValidationError) as error:
        raise _invalid([FieldProblem("build_spec.readiness_probe.url", "must be a URL")]) from error


def _invalid(problems: list[FieldProblem]) -> GatewayError:
    message = "; ".join(f"{problem.field} {problem.reason}" for problem in problems[:3])
    return GatewayError("build_spec_invalid", f"The specification is invalid: {message}.", details=problems)


def schema() -> dict[str, Any]:
    """The JSON schema of a specification."""
    return msgspec.json.schema(Spec)


def as_json(spec: BuildSpec) -> dict[str, Any]:
    """A specification in the clients' words."""
    document: dict[str, Any] = {
        "from": spec.base,
        "steps": [_step_as_json(step) for step in spec.steps],
        "env": dict(spec.env),
        "workdir": spec.workdir,
        "user": spec.user,
        "startCmd": spec.start_command,
        "previewPort": spec.preview_port,
        "vcpu": spec.cpu_count,
        "memoryMib": spec.memory_mib,
        "diskMib": spec.disk_mib,
    }
    if spec.probe is not None and spec.probe.kind == "command":
        document["readyCmd"] = spec.probe.command
    elif spec.probe is not None:
        document["readiness_probe"] = probe_as_json(spec.probe)
    return {name: value for name, value in document.items() if value is not None}


def probe_as_json(probe: Probe) -> dict[str, Any]:
    """A probe in the clients' words."""
    document: dict[str, Any] = {"type": probe.kind, "timeout_sec": probe.timeout_s}
    if probe.kind == "command":
        return document | {"command": probe.command}
    return document | {"port": probe.port, "path": probe.path}


def _step_as_json(step: BuildStep) -> dict[str, Any]:
    if step.kind == "run":
        return {"run": step.command}
    if step.kind == "file":
        return {"file": step.path, "content": step.content, "mode": f"{step.mode:o}"}
    return {step.kind: list(step.packages)}
