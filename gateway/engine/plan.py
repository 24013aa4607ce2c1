"""From a create command to the sandbox it asks for: defaults filled in, limits checked."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import TypeVar

from gateway.commands import CreateSandbox
from gateway.errors import invalid
from gateway.resources import Principal, Sandbox, SandboxState
from gateway.settings import Settings

_CONSONANTS = "bdfghjklmnprstvz"
_VOWELS = "aeiou"
_DIGITS = "23456789"
_SLUG = re.compile(r"[a-z0-9](?:[a-z0-9-]{1,38}[a-z0-9])")
_MIB_MIN = 64

N = TypeVar("N", int, float)


def plan(
    principal: Principal,
    command: CreateSandbox,
    settings: Settings,
    *,
    template: str,
    now: float,
    choose: Callable[[str], str] = secrets.choice,
) -> Sandbox:
    """The sandbox to make, in state provisioning.

    Raises GatewayError validation_failed naming the field that is out of bounds.
    """
    timeout_s = command.timeout_s if command.timeout_s is not None else settings.sandbox_timeout_s
    idle_timeout_s = command.idle_timeout_s if command.idle_timeout_s is not None else settings.sandbox_idle_timeout_s
    check_timeout("timeout", timeout_s, settings)
    if command.slug is not None and not _SLUG.fullmatch(command.slug):
        raise invalid("slug", "must be 3 to 40 of a-z, 0-9 and -, with a letter or digit at both ends")
    return Sandbox(
        id=command.effect_id,
        workspace_id=principal.workspace_id,
        owner_key_id=principal.key_id,
        name=command.name,
        slug=command.slug or make_slug(choose),
        state=SandboxState.PROVISIONING,
        template=template,
        cpu_count=_within(
            "cpu_count", command.cpu_count, settings.sandbox_cpu_count, 0.1, settings.sandbox_cpu_count_max
        ),
        memory_mib=_within(
            "memory_mb", command.memory_mib, settings.sandbox_memory_mib, _MIB_MIN, settings.sandbox_memory_mib_max
        ),
        disk_mib=_within(
            "disk_mb", command.disk_mib, settings.sandbox_disk_mib, _MIB_MIN, settings.sandbox_disk_mib_max
        ),
        env=command.env,
        metadata=command.metadata,
        tags=tuple(dict.fromkeys(command.tags)),
        attribution=command.attribution,
        # There is one, whatever the caller calls it; clients that name another still work and are told the truth.
        region=settings.region,
        address=None,
        timeout_s=None if command.always_on else timeout_s,
        idle_timeout_s=None if command.always_on else idle_timeout_s,
        always_on=command.always_on,
        created_at=now,
        started_at=None,
        destroyed_at=None,
        expires_at=None if command.always_on else now + timeout_s,
        stop_cause=None,
        stop_detail=None,
        boot_ms=None,
    )


def make_slug(choose: Callable[[str], str] = secrets.choice) -> str:
    """Ten characters one can read aloud, such as `kumatosi47`: 2.6e9 of them, checked for use before one is taken."""
    syllables = "".join(choose(_CONSONANTS) + choose(_VOWELS) for _ in range(4))
    return syllables + choose(_DIGITS) + choose(_DIGITS)


def check_timeout(field: str, timeout_s: float, settings: Settings) -> None:
    """Raise validation_failed unless a sandbox may live that long."""
    if not 1 <= timeout_s <= settings.sandbox_timeout_max_s:
        raise invalid(field, f"must be between 1 and {settings.sandbox_timeout_max_s:g} seconds")


def _within(field: str, value: N | None, default: N, least: float, most: float) -> N:
    if value is None:
        return default
    if not least <= value <= most:
        raise invalid(field, f"must be between {least:g} and {most:g}")
    return value
