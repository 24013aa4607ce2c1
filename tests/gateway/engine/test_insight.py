"""What sandboxes have used lately."""

from __future__ import annotations

from gateway.engine.insight import loads
from gateway.resources import Load
from vmm.types import Sample


def test_a_load_is_what_was_used_since_the_sample_before() -> None:
    samples = [Sample(100.0, 5.0, 10), Sample(110.0, 10.0, 20), Sample(120.0, 10.0, 30)]
    assert loads(samples, 2.0) == (Load(110.0, 25.0, 20), Load(120.0, 0.0, 30))


def test_a_sandbox_that_woke_from_disk_counts_from_zero() -> None:
    assert loads([Sample(100.0, 50.0, 10), Sample(110.0, 1.0, 10)], 1.0) == (Load(110.0, 10.0, 10),)
