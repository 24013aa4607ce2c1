"""Log lines and metrics."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.observability import logs, metrics
from vmm.types import PoolStatus


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    stream, root = io.StringIO(), logging.getLogger()
    before, level = root.handlers[:], root.level
    logs.configure("api", level="info", form="json", stream=stream)
    yield stream
    root.handlers[:] = before
    root.setLevel(level)


def test_line_is_json_with_request_id_and_extras(lines: io.StringIO) -> None:
    token = logs.request_id.set("req_1")
    logging.getLogger("gateway.test").info("%s happened", "it", extra={"status": 200, "odd": Path("/x")})
    logs.request_id.reset(token)
    line = json.loads(lines.getvalue())

    assert line["message"] == "it happened"
    assert (line["level"], line["process"], line["request_id"]) == ("info", "api", "req_1")
    assert (line["status"], line["odd"]) == (200, "/x")


def test_exception_stays_on_one_line(lines: io.StringIO) -> None:
    try:
        raise RuntimeError("broken\nin two")
    except RuntimeError:
        logging.getLogger("gateway.test").exception("oh")
    (line,) = lines.getvalue().splitlines()

    assert "RuntimeError: broken" in json.loads(line)["error"]
    assert "request_id" not in json.loads(line)


def test_debug_is_left_out_at_info(lines: io.StringIO) -> None:
    logging.getLogger("gateway.test").debug("detail")

    assert lines.getvalue() == ""


def test_text_for_a_terminal_has_the_same_facts() -> None:
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "gone", (), None)
    record.machine = "m1"

    assert logs.TextFormatter().format(record).endswith("warning gone machine=m1")


WORKER = """
import sys
from gateway.observability import metrics
metrics.REQUESTS.labels(dialect="d", operation="o", status="200").inc(int(sys.argv[1]))
metrics.IN_FLIGHT.inc()
print(metrics.render().decode() if sys.argv[2] == "render" else "")
"""


def test_workers_are_added_up_and_gauges_of_the_dead_forgotten(tmp_path: Path) -> None:
    def work(count: int, then: str = "") -> str:
        environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
        argv = [sys.executable, "-c", WORKER, str(count), then]
        return subprocess.run(argv, env=environ, check=True, capture_output=True, text=True).stdout

    work(2)
    text = work(3, "render").splitlines()
    assert 'sandgate_api_requests_total{dialect="d",operation="o",status="200"} 5.0' in text
    assert "sandgate_api_requests_in_flight 2.0" in text

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
        metrics.forget_dead_workers()
    assert "sandgate_api_requests_in_flight 1.0" in work(0, "render").splitlines()


def test_table_lists_every_metric_once() -> None:
    families = text_string_to_metric_families(metrics.render().decode())
    # Without several workers each counter also tells when it began.
    exposed = {family.name for family in families if not family.name.endswith("_created")}
    assert {row.name.removesuffix("_total") for row in metrics.TABLE} == exposed


def test_the_pools_are_exposed_by_shape() -> None:
    pool = PoolStatus("default", 1.0, 1024, 3072, 2, 1, 2, 1, 7, 3, 210.0, thawed=1, refills=9, failures=4)
    families = text_string_to_metric_families(metrics.render([pool]).decode())
    samples = [sample for family in families for sample in family.samples if "_pool_" in sample.name]
    shape = {"template": "default", "cpu_count": "1.0", "memory_mib": "1024", "disk_mib": "3072"}
    assert all(sample.labels == shape for sample in samples)
    assert {sample.name.removeprefix("sandgate_pool_"): sample.value for sample in samples} == {
        "ready": 2,
        "thawed": 1,
        "shells": 1,
        "hits_total": 4,
        "misses_total": 3,
        "refills_total": 9,
        "failures_total": 4,
    }
