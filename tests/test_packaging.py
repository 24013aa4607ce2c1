"""The distribution holds what an installed Sandgate needs, and nothing that only building it needs."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.host import CACHE

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gateway", "vmm", "previews", "native")
BUILD_ONLY = (".rs", ".pyx", ".c", ".toml", ".lock", ".allow")


def build(hook: str, directory: Path) -> Path:
    """Call a hook of the build backend as an installer would, in a process of its own."""
    code = f"import sandgate_build; print(sandgate_build.{hook}({str(directory)!r}))"
    environment = {
        **os.environ,
        # What scripts/build has compiled is not compiled again.
        "SANDGATE_BUILD_CACHE": str(CACHE / "build"),
        "PYTHONPATH": str(ROOT / "native" / "build_backend"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return directory / done.stdout.splitlines()[-1]


def package_files() -> set[str]:
    """Every file of the packages that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("build_wheel", tmp_path_factory.mktemp("wheel")))


def test_the_wheel_holds_every_file_that_is_used_at_run_time(wheel: zipfile.ZipFile) -> None:
    sources = {
        name
        for name in package_files()
        if not name.endswith(BUILD_ONLY) and not name.startswith(("native/crates/", "native/build_backend/"))
    }

    assert sources - set(wheel.namelist()) == set()


def test_the_wheel_holds_the_compiled_parts(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()

    assert [name for name in names if name.startswith("native/_core.") and name.endswith(".so")]
    assert [name for name in names if name.startswith("native/_frames.") and name.endswith(".so")]
    for program in ("native/bin/sandgate-agent", "native/bin/sandgate-jailer", "native/bin/sandgate-plane"):
        assert wheel.getinfo(program).external_attr >> 16 & stat.S_IXUSR


def test_the_wheel_holds_no_sources_of_compiled_parts(wheel: zipfile.ZipFile) -> None:
    ours = [name for name in wheel.namelist() if name.startswith(PACKAGES)]

    assert [name for name in ours if name.endswith((".rs", ".pyx", ".c", ".lock"))] == []


def test_the_source_distribution_holds_all_sources(tmp_path: Path) -> None:
    archive = build("build_sdist", tmp_path)

    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert package_files() - names == set()
    assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= names
