"""What hostd remembers of its machines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.support.host import machine_spec
from vmm.drivers.base import Placement
from vmm.host.journal import Journal, Record
from vmm.types import MachineState, StopCause


def _record(**fields: object) -> Record:
    spec = machine_spec(env={"A": "b"})
    return Record(spec, 1.0, 2.0, 3.0, None, **fields)  # type: ignore[arg-type]


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "machines", Record)
    assert journal.load() == []
    placement = Placement("198.18.0.2", resolvers=("192.0.2.1",), facts={"pid": 7, "slot": 1})
    record = _record(state=MachineState.STOPPED, placement=placement, cause=StopCause.OOM, detail="x", boot_ms=1.5)
    journal.save(record)
    (loaded,) = journal.load()
    assert loaded == record
    assert loaded.is_over
    journal.remove(record.spec.id)
    journal.remove(record.spec.id)
    assert journal.load() == []


def test_the_last_of_many_records_counts_and_nothing_else_is_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path, Record)
    record = _record()
    for length in (10, 5000, 1, 300, 0):
        record = replace(record, detail="x" * length)
        journal.save(record)
        assert Journal(tmp_path, Record).load() == [record]
        journal.save(record)
        journal.save(record)
    # A hostd died while it wrote: what the record was before still counts.
    (tmp_path / f"{record.id}.spare").write_bytes(b'{"spec": {"id"')
    assert journal.load() == [record]
    journal.save(record)
    journal.save(record)
    journal.remove(record.id)
    assert list(tmp_path.iterdir()) == []


def test_records_are_for_their_owner_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "machines", Record)
    journal.load()
    record = _record()
    journal.save(record)
    assert (tmp_path / "machines").stat().st_mode & 0o077 == 0
    assert (tmp_path / "machines" / f"{record.spec.id}.json").stat().st_mode & 0o077 == 0


def test_an_unreadable_record_is_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path, Record)
    journal.save(_record())
    (tmp_path / "torn.json").write_bytes(b'{"spec": {"id"')
    (tmp_path / "old.json").write_bytes(b'{"version": 0}')
    assert len(journal.load()) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_the_address_is_told_while_the_machine_lives(tmp_path: Path) -> None:
    record = _record(placement=Placement("198.18.0.2"))
    assert record.info().address == "198.18.0.2"
    record.state = MachineState.STOPPED
    assert record.info().address is None
