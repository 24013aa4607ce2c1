"""The API's Prometheus metrics, one table for the code and for docs/metrics.md.

Workers are processes of their own: with `PROMETHEUS_MULTIPROC_DIR` set (the supervisor does), each keeps its numbers in
a mapped file there and `render` adds them up, so any worker can answer for all. The plane adds its own metrics to what
the API answers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.owners import is_running
from vmm.types import PoolStatus

REGISTRY = CollectorRegistry()

#: From a replay (0.5 ms) to a long command.
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class Row:
    """One metric as docs/metrics.md lists it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str


TABLE: list[Row] = []


def _counter(name: str, meaning: str, *labels: str) -> Counter:
    TABLE.append(Row(f"{name}_total", "counter", labels, meaning))
    return Counter(name, meaning, labels, registry=REGISTRY)


def _gauge(name: str, meaning: str) -> Gauge:
    TABLE.append(Row(name, "gauge", (), meaning))
    return Gauge(name, meaning, multiprocess_mode="livesum", registry=REGISTRY)


def _histogram(name: str, meaning: str, *labels: str) -> Histogram:
    TABLE.append(Row(name, "histogram", labels, meaning))
    return Histogram(name, meaning, labels, buckets=_SECONDS, registry=REGISTRY)


REQUESTS = _counter(
    "sandgate_api_requests",
    "API requests answered, by dialect, operation (method and path pattern) and status.",
    "dialect",
    "operation",
    "status",
)
REQUEST_SECONDS = _histogram(
    "sandgate_api_request_seconds",
    "Time from the request's arrival at a worker until its answer starts, by operation.",
    "operation",
)
IN_FLIGHT = _gauge("sandgate_api_requests_in_flight", "API requests being worked on, open streams included.")
SOCKETS = _gauge("sandgate_api_websockets", "Open WebSocket connections.")
ABANDONED = _counter(
    "sandgate_api_abandoned",
    "Requests whose caller left early, by what came of them: finished or cancelled.",
    "outcome",
)
IDEMPOTENCY = _counter(
    "sandgate_idempotency",
    "Requests with an idempotency key: first, resumed (an earlier attempt had died), replayed or refused.",
    "outcome",
)
JOINED = _counter("sandgate_joined", "Repeated requests that got the answer of an abandoned identical one.")
RATE_LIMITED = _counter("sandgate_rate_limited", "Requests refused by the workspace's rate limit.")
AUTH_FAILURES = _counter("sandgate_auth_failures", "Requests whose key or ticket was missing or refused.", "reason")
UNEXPECTED = _counter("sandgate_unexpected_errors", "Faults of ours answered as `internal`; each is in the log.")


#: Of the warm pool; the host keeps the numbers and is asked for them. Name, kind, meaning, and where they are found.
_POOL: list[tuple[str, str, str, Callable[[PoolStatus], float]]] = [
    ("sandgate_pool_ready", "gauge", "Booted sandboxes in stock, by shape.", lambda pool: pool.ready),
    ("sandgate_pool_thawed", "gauge", "Of those, the ones that are not frozen.", lambda pool: pool.thawed),
    (
        "sandgate_pool_shells",
        "gauge",
        "Shells in stock, in which nothing runs yet.",
        lambda pool: pool.shells,
    ),
    ("sandgate_pool_hits", "counter", "Creates that found one ready.", lambda pool: pool.claims - pool.misses),
    ("sandgate_pool_misses", "counter", "Creates that found none ready.", lambda pool: pool.misses),
    ("sandgate_pool_refills", "counter", "Sandboxes and shells made ahead.", lambda pool: pool.refills),
    ("sandgate_pool_failures", "counter", "Those that could not be made; see hostd's log.", lambda pool: pool.failures),
]
_SHAPE = ("template", "cpu_count", "memory_mib", "disk_mib")
TABLE += [
    Row(f"{name}_total" if kind == "counter" else name, kind, _SHAPE, meaning) for name, kind, meaning, _ in _POOL
]


class _Pools(Collector):
    """The pool's numbers as the host has told them."""

    def __init__(self, pools: Sequence[PoolStatus]) -> None:
        self._pools = pools

    def collect(self) -> Iterator[Metric]:
        for name, kind, meaning, value in _POOL:
            family = (CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(name, meaning, labels=_SHAPE)
            for pool in self._pools:
                family.add_metric([str(getattr(pool, label)) for label in _SHAPE], value(pool))
            yield family


def render(pools: Sequence[PoolStatus] = ()) -> bytes:
    """The exposition of all workers, and of the host's pools."""
    registry = CollectorRegistry()
    registry.register(_Pools(pools))
    directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if directory is None:
        return generate_latest(REGISTRY) + generate_latest(registry)
    multiprocess.MultiProcessCollector(registry, directory)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def forget_dead_workers() -> None:
    """Drop the gauges of workers that died; their counters stay, since what they counted has happened."""
    directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if directory is None:
        return
    for path in Path(directory).glob("gauge_live*.db"):
        pid = int(path.stem.rpartition("_")[2])
        if not is_running(pid):
            path.unlink(missing_ok=True)


def as_markdown() -> str:
    """The text of docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "`GET /metrics` on the admin listener (`SANDGATE_ADMIN_LISTEN`) answers in Prometheus text format, all API",
        "workers added up and the plane's own metrics appended. This is the API's part; the plane's is in",
        "[previews.md](previews.md#metrics).",
        "",
        "| metric | type | labels | meaning |",
        "|---|---|---|---|",
    ]
    for row in TABLE:
        labels = ", ".join(f"`{label}`" for label in row.labels)
        lines.append(f"| `{row.name}` | {row.kind} | {labels} | {row.meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
