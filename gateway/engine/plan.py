"""From a create command to the sandbox it asks for: defaults filled in, limits checked."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from gateway.commands import CreateSandbox
from gateway.errors import invalid
from gateway.resources import IdleAction, Principal, Sandbox, SandboxState, Snapshot, Template
from gateway.settings import Settings

_CONSONANTS = "bdfghjklmnprstvz"
_VOWELS = "aeiou"
_DIGITS = "23456789"
_SLUG = re.compile(r"[a-z0-9](?:[a-z0-9-]{1,38}[a-z0-9])")
_MIB_MIN = 64

N = TypeVar("N", int, float)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a sandbox starts from. With a memory image its sizes are those the image was saved with."""

    template: str
    base_template: str
    image_id: str | None = None
    snapshot_id: str | None = None
    parent_id: str | None = None
    cpu_count: float | None = None
    memory_mib: int | None = None
    disk_mib: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)


def origin_of_template(template: Template) -> Origin:
    """A template's files, or the memory image it was built into."""
    return Origin(
        template.slug or template.name,
        template.base_template or template.name,
        image_id=template.image_id,
        cpu_count=template.cpu_count,
        memory_mib=template.memory_mib,
        disk_mib=template.disk_mib,
        env=template.env,
    )


def origin_of_snapshot(snapshot: Snapshot) -> Origin:
    """A snapshot's memory and files."""
    return Origin(
        snapshot.template,
        snapshot.base_template,
        image_id=snapshot.id,
        snapshot_id=snapshot.id,
        parent_id=snapshot.sandbox_id,
        cpu_count=snapshot.cpu_count,
        memory_mib=snapshot.memory_mib,
        disk_mib=snapshot.disk_mib,
        env=snapshot.env,
    )


def plan(
    principal: Principal,
    command: CreateSandbox,
    settings: Settings,
    *,
    origin: Origin,
    now: float,
    choose: Callable[[str], str] = secrets.choice,
) -> Sandbox:
    """The sandbox to make, in state provisioning.

    Raises GatewayError validation_failed naming the field that is out of bounds.
    """
    timeout_s = command.timeout_s if command.timeout_s is not None else settings.sandbox_timeout_s
    check_timeout("timeout", timeout_s, settings)
    idle_action = _idle_action(command, settings)
    if command.slug is not None and not _SLUG.fullmatch(command.slug):
        raise invalid("slug", "must be 3 to 40 of a-z, 0-9 and -, with a letter or digit at both ends")
    return Sandbox(
        id=command.effect_id,
        workspace_id=principal.workspace_id,
        owner_key_id=principal.key_id,
        name=command.name,
        slug=command.slug or make_slug(choose),
        state=SandboxState.PROVISIONING,
        template=origin.template,
        base_template=origin.base_template,
        image_id=origin.image_id,
        snapshot_id=origin.snapshot_id,
        parent_id=origin.parent_id,
        cpu_count=_size("cpu_count", command.cpu_count, origin.cpu_count)
        or _within("cpu_count", command.cpu_count, settings.sandbox_cpu_count, 0.1, settings.sandbox_cpu_count_max),
        memory_mib=_size("memory_mb", command.memory_mib, origin.memory_mib)
        or _within(
            "memory_mb", command.memory_mib, settings.sandbox_memory_mib, _MIB_MIN, settings.sandbox_memory_mib_max
        ),
        disk_mib=_size("disk_mb", command.disk_mib, origin.disk_mib)
        or _within("disk_mb", command.disk_mib, settings.sandbox_disk_mib, _MIB_MIN, settings.sandbox_disk_mib_max),
        env={**origin.env, **command.env},
        metadata=command.metadata,
        tags=tuple(dict.fromkeys(command.tags)),
        attribution=command.attribution,
        # There is one, whatever the caller calls it; clients that name another still work and are told the truth.
        region=settings.region,
        address=None,
        timeout_s=None if command.always_on else timeout_s,
        idle_timeout_s=None if command.always_on else _idle_timeout_s(command, settings, timeout_s),
        always_on=command.always_on,
        idle_action=idle_action,
        auto_resume=command.auto_resume is not False,
        hibernate_after_s=command.hibernate_after_s,
        created_at=now,
        started_at=None,
        destroyed_at=None,
        expires_at=None if command.always_on or command.is_persistent else now + timeout_s,
        stop_cause=None,
        stop_detail=None,
        boot_ms=None,
    )


def _idle_action(command: CreateSandbox, settings: Settings) -> IdleAction:
    if command.idle_action is not None:
        return command.idle_action
    if command.always_on:
        return IdleAction.KEEP
    return IdleAction.PAUSE if command.is_persistent else IdleAction(settings.sandbox_idle_action)


def _idle_timeout_s(command: CreateSandbox, settings: Settings, timeout_s: float) -> float | None:
    if command.idle_timeout_s is not None:
        return command.idle_timeout_s
    # Nothing else would ever pause it.
    return timeout_s if command.is_persistent else settings.sandbox_idle_timeout_s


def make_slug(choose: Callable[[str], str] = secrets.choice) -> str:
    """Ten characters one can read aloud, such as `kumatosi47`: 2.6e9 of them, checked for use before one is taken."""
    syllables = "".join(choose(_CONSONANTS) + choose(_VOWELS) for _ in range(4))
    return syllables + choose(_DIGITS) + choose(_DIGITS)


def check_timeout(field: str, timeout_s: float, settings: Settings) -> None:
    """Raise validation_failed unless a sandbox may live that long."""
    if not 1 <= timeout_s <= settings.sandbox_timeout_max_s:
        raise invalid(field, f"must be between 1 and {settings.sandbox_timeout_max_s:g} seconds")


def _size(field: str, wanted: N | None, fixed: N | None) -> N | None:
    """The size that a memory image dictates, if one does."""
    if fixed is not None and wanted is not None and wanted != fixed:
        raise invalid(field, f"must be {fixed:g}, as in the memory that the sandbox starts from")
    return fixed


def _within(field: str, value: N | None, default: N, least: float, most: float) -> N:
    if value is None:
        return default
    if not least <= value <= most:
        raise invalid(field, f"must be between {least:g} and {most:g}")
    return value
