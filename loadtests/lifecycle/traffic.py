"""Many sandboxes that sleep most of the time, and visitors who wake them."""

from __future__ import annotations

import asyncio
import random
import time

from loadtests import report
from loadtests.http import Connection, UnexpectedAnswer
from loadtests.lifecycle.box import Box, create
from loadtests.report import Row
from loadtests.server import Target

SANDBOXES = 40
PER_S = 4.0
SECONDS = 120
#: Short, so that a few minutes see every kind of sleep.
IDLE_S, HIBERNATE_S = 2, 15


async def visits(api: Connection, target: Target) -> list[Row]:
    """Preview requests whose sandboxes are chosen by Zipf's law, at a fixed rate, whatever the answers take.

    Latency counts from the moment a visit was due. Every sandbox is frozen when idle, and hibernated when frozen long.
    """
    boxes: list[Box] = []
    try:
        for _ in range(SANDBOXES):
            made = await create(
                api, target, idle_timeout_sec=IDLE_S, on_idle="pause", hibernate_after_sec=HIBERNATE_S, always_on=False
            )
            boxes.append(made)
            await made.load("hold", "4")
        return await _visit(boxes)
    finally:
        # The first connection has been idle for longer than the plane keeps one.
        async with Connection(target.base_url, target.key) as later:
            for made in boxes:
                await Box(later, target, made.id).destroy()


async def _visit(boxes: list[Box]) -> list[Row]:
    chance = random.Random(1)
    weights = [1 / rank for rank in range(1, len(boxes) + 1)]
    durations: list[float] = []
    refused: list[str] = []

    async def visit(which: Box, due: float) -> None:
        try:
            await which.visit()
        except (UnexpectedAnswer, OSError, asyncio.IncompleteReadError) as error:
            refused.append(repr(error))
        durations.append(time.perf_counter() - due)

    async with asyncio.TaskGroup() as visitors:
        began = time.perf_counter()
        for number in range(int(SECONDS * PER_S)):
            due = began + number / PER_S
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            visitors.create_task(visit(chance.choices(boxes, weights)[0], due))
    note = f"refused {len(refused)} {refused[:1] or ''}".strip()
    return [
        report.latency(f"{len(boxes)} sleeping sandboxes, {PER_S:g} visits/s", durations, target="p99 500", note=note)
    ]
