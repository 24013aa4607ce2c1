"""Puts the parts of the API together: which implementations, with which settings.

`create` makes what each API worker runs; `open_engine` is the same engine without a server, for the command line.
gateway/host.py does the same for hostd.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial

import sqlalchemy as sa
from starlette.types import ASGIApp

from gateway.activity import ActivityRelay
from gateway.auth import Authenticator
from gateway.children import follow_parent
from gateway.dialects.miosa import MiosaDialect
from gateway.endpoint import routes as make_routes
from gateway.engine import Context, Engine
from gateway.engine.routes import PlaneRoutes
from gateway.engine.watcher import HostWatcher
from gateway.entry import BodyLimits, Entry, Mounted
from gateway.events import EventLog
from gateway.idempotency import IdempotencyStore
from gateway.limits import Budget, Limits
from gateway.observability import logs, metrics
from gateway.phases import Phases, Terms
from gateway.publisher import EventPublisher, Frames
from gateway.reconciler import Reconciler
from gateway.settings import Settings, load
from gateway.store import Database, open_database
from gateway.undelivered import Undelivered
from gateway.wakes import WakeRelay
from gateway.worker import Checks, Parts, Worker, every, healthz, metrics_page, readyz
from previews.errors import PlaneError
from previews.plane import PlaneClient
from vmm.client import HostClient
from vmm.errors import VmmError
from vmm.types import PoolStatus

_FLUSH_EVERY_S = 5.0
_SWEEP_EVERY_S = 60.0
_CHECK_WITHIN_S = 1.0


def create() -> ASGIApp:
    """The ASGI application of one API worker; its parts are opened when the server says that it starts."""
    follow_parent()
    settings = load(os.environ)
    logs.configure("api", level=settings.log_level, form=settings.log_format)
    return Worker(partial(open_worker, settings))


@contextlib.asynccontextmanager
async def open_worker(settings: Settings) -> AsyncGenerator[Parts, None]:
    """Everything one worker needs, connected."""
    metrics.forget_dead_workers()
    async with contextlib.AsyncExitStack() as stack:
        dialect = MiosaDialect()
        engine, plane, activity, wakes, publisher = await stack.enter_async_context(
            _connect(settings, {dialect.name: dialect.event_frame})
        )
        context = engine.context
        limits = stack.enter_context(contextlib.closing(Limits(settings.lmdb_dir / "limits")))
        idempotency = IdempotencyStore(
            settings.lmdb_dir / "idempotency",
            ttl_s=settings.idempotency_ttl_s,
            answer_bytes_max=settings.idempotency_answer_bytes_max,
        )
        stack.callback(idempotency.close)
        undelivered = Undelivered(
            settings.lmdb_dir / "undelivered", answer_bytes_max=settings.idempotency_answer_bytes_max
        )
        stack.callback(undelivered.close)
        failures = settings.auth_failures_per_minute
        authenticator = Authenticator(context.database, limits, failures=Budget(failures) if failures else None)
        phases = Phases(
            engine=engine,
            authenticator=authenticator,
            limits=limits,
            idempotency=idempotency,
            undelivered=undelivered,
            terms=_terms(settings),
        )
        stack.push_async_callback(phases.drain, settings.drain_timeout_s)
        checks = {
            "database": partial(_database_answers, context.database),
            "host": partial(_host_answers, context.host),
            "plane": partial(_plane_listens, plane),
        }
        yield Parts(
            entry=_entry(settings, dialect, phases, checks, partial(_pools, context.host)),
            background={
                "activity": activity.run,
                "watcher": HostWatcher(engine).run,
                "wakes": wakes.run,
                "publisher": publisher.run,
                "reconciler": Reconciler(engine).run,
                "flush": lambda: every(_FLUSH_EVERY_S, [authenticator.flush]),
                "sweep": lambda: every(_SWEEP_EVERY_S, [limits.sweep, undelivered.sweep]),
            },
        )


@contextlib.asynccontextmanager
async def open_engine(settings: Settings) -> AsyncGenerator[Engine, None]:
    """The engine without a server; the plane, if it runs, hears of what is changed."""
    async with _connect(settings, {}) as (engine, plane, *_):
        with contextlib.suppress(PlaneError):
            await plane.wait_connected(_CHECK_WITHIN_S)
        yield engine


@contextlib.asynccontextmanager
async def _connect(
    settings: Settings, frames: Frames
) -> AsyncGenerator[tuple[Engine, PlaneClient, ActivityRelay, WakeRelay, EventPublisher], None]:
    """The engine with its connections; those to hostd and the plane are made when their ends are there.

    frames: for the event log's publisher; without any, others publish it.
    """
    async with contextlib.AsyncExitStack() as stack:
        database = open_database(settings.effective_database_url)
        stack.push_async_callback(database.close)
        host = await stack.enter_async_context(HostClient(str(settings.hostd_socket)))
        activity = ActivityRelay(host)

        async def wake(sandbox_id: str) -> None:
            await engine.pausing.wake(sandbox_id)

        async def sync() -> None:
            await plane.sync(routes.snapshot)

        def refuse(sandbox_id: str) -> None:
            plane.refuse_wake(sandbox_id)

        wakes = WakeRelay(wake, refuse)

        def tail(after: int | None) -> None:
            publisher.on_tail(after)

        def relieved() -> None:
            publisher.on_relieved()

        # What the plane says needs what needs the plane; it says nothing before it is entered.
        plane = PlaneClient(
            str(settings.plane_socket),
            on_poke=lambda _topic, _seq: events.wake(),
            on_activity=activity.note,
            on_wake=wakes.note,
            on_tail=tail if frames else None,
            on_relieved=relieved,
            on_new_epoch=sync,
        )
        routes = PlaneRoutes(database, plane)
        events = EventLog(database, routes.poke)
        publisher = EventPublisher(database, events, plane, frames)
        engine = Engine(Context(database, host, routes, events, settings))
        await stack.enter_async_context(plane)
        stack.push_async_callback(engine.close)
        yield engine, plane, activity, wakes, publisher


def _terms(settings: Settings) -> Terms:
    per_minute = settings.rate_limit_per_minute
    return Terms(
        request_timeout_s=settings.request_timeout_s,
        idempotency_wait_s=settings.idempotency_wait_s,
        budget=Budget(per_minute) if per_minute else None,
        is_access_logged=settings.access_log,
    )


def _entry(
    settings: Settings,
    dialect: MiosaDialect,
    phases: Phases,
    checks: Checks,
    pools: Callable[[], Awaitable[Sequence[PoolStatus]]],
) -> ASGIApp:
    return Entry(
        [Mounted(dialect, dialect.prefix, make_routes(phases, dialect))],
        own={"/healthz": healthz, "/readyz": readyz(checks), "/metrics": metrics_page(pools)},
        limits=BodyLimits(settings.json_body_bytes_max, settings.upload_bytes_max),
    )


async def _database_answers(database: Database) -> bool:
    try:
        await database.lookup(lambda connection: connection.execute(sa.text("SELECT 1")).scalar_one())
    except sa.exc.SQLAlchemyError:
        return False
    return True


async def _host_answers(host: HostClient) -> bool:
    try:
        await host.host_info(deadline=asyncio.get_running_loop().time() + _CHECK_WITHIN_S)
    except VmmError:
        return False
    return True


async def _pools(host: HostClient) -> Sequence[PoolStatus]:
    return await host.pool_status(deadline=asyncio.get_running_loop().time() + _CHECK_WITHIN_S)


async def _plane_listens(plane: PlaneClient) -> bool:
    return plane.is_connected
