"""What a workspace or a sandbox used."""

from __future__ import annotations

import datetime as dt
from typing import Literal, TypedDict

import msgspec

from gateway import commands, resources
from gateway.dialects.miosa import decode
from gateway.dialects.miosa.answers import iso_time
from gateway.dialects.miosa.route import Route, one
from gateway.pipeline import Call

SCOPE = "usage:read"

Period = Literal["current_month", "last_month", "last_7d", "last_30d", "7d", "30d"]


class UsageQuery(msgspec.Struct):
    """Which span of time."""

    period: Period = "current_month"


class Usage(TypedDict):
    """What was used. Nothing is charged here, so the credit balance is zero."""

    credit_balance_usd: float
    period: str
    period_start: str
    period_end: str
    compute_hours: float
    cpu_core_hours: float
    memory_gib_hours: float
    running_sec: float
    sandbox_count: int
    computer_count: int
    egress_gb: float | None


def span(period: Period, now: dt.datetime) -> tuple[float, float]:
    """First and last moment of a period, in Unix seconds."""
    month = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    if period == "current_month":
        return month.timestamp(), now.timestamp()
    if period == "last_month":
        return (month - dt.timedelta(days=1)).replace(day=1).timestamp(), month.timestamp()
    days = 7 if period in ("last_7d", "7d") else 30
    return (now - dt.timedelta(days=days)).timestamp(), now.timestamp()


def usage(item: resources.Usage, period: str) -> Usage:
    """Usage in MIOSA's words."""
    return Usage(
        credit_balance_usd=0.0,
        period=period,
        period_start=iso_time(item.period_start),
        period_end=iso_time(item.period_end),
        compute_hours=round(item.running_s / 3600, 4),
        cpu_core_hours=round(item.cpu_core_s / 3600, 4),
        memory_gib_hours=round(item.memory_gib_s / 3600, 4),
        running_sec=round(item.running_s, 3),
        sandbox_count=item.sandbox_count,
        computer_count=0,
        egress_gb=None,
    )


async def of_workspace(call: Call, query: UsageQuery) -> Usage:
    """What the workspace used in a period."""
    start, end = span(query.period, dt.datetime.now(dt.UTC))
    item = await call.engine.get_usage(call.principal, commands.GetUsage(None, start, end))
    return usage(item, query.period)


async def of_sandbox(call: Call) -> Usage:
    """What a sandbox used in its life."""
    command = commands.GetUsage(decode.sandbox_id(call), 0.0, dt.datetime.now(dt.UTC).timestamp())
    return usage(await call.engine.get_usage(call.principal, command), "lifetime")


ROUTES = (
    Route("GET", "/usage", of_workspace, one(Usage), SCOPE, query=UsageQuery),
    Route("GET", "/usage/summary", of_workspace, one(Usage), SCOPE, query=UsageQuery),
    Route("GET", "/sandboxes/{sandbox_id}/usage", of_sandbox, one(Usage), "sandboxes:read"),
)
