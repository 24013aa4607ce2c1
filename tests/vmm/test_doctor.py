"""The doctor's findings on this host, which can run machines, and on one that lacks things."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from vmm.doctor import diagnose


def test_this_host_is_well(tmp_path: Path) -> None:
    assert [finding for finding in diagnose(cache=tmp_path) if not finding.is_ok] == []


def test_missing_programs_are_named_with_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("vmm.programs._ALSO", ())
    lacks = {finding.name: finding.fix for finding in diagnose(cache=tmp_path) if not finding.is_ok}
    assert "backports" in lacks["runsc"]
    assert "nftables" in lacks["nftables"]
    assert "e2fsprogs" in lacks["machine disks"]
    assert all(lacks.values())
    assert {"mmdebstrap", "erofs-utils"} <= set(lacks["template builders"].strip("`").split())


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = ("127.0.0.1", server.getsockname()[1])
        (taken,) = [finding for finding in diagnose(cache=tmp_path, ports=[address]) if finding.name == "port"]
    assert not taken.is_ok
    assert str(address[1]) in taken.what
