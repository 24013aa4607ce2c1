"""The PEP 517 build backend of Sandgate: maturin, with what maturin does not build added first.

    build_wheel / build_editable
        1. native/*.pyx                → native/*.so                 (Cython and the C compiler)
        2. native/crates/agent, plane  → native/bin/sandgate-*       (cargo)
        3. native/crates/pyext         → native/_core.so, the wheel  (maturin)

Every step is incremental: cargo and Cython rebuild only what changed. `SANDGATE_CARGO_PROFILE=dev` builds the
programs without optimisation; anything installed should keep the default, `release`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import maturin

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "native"
BIN = NATIVE / "bin"
PROGRAMS = ("sandgate-agent", "sandgate-plane")

# What a source distribution holds, besides the Python packages.
SDIST_FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE")
SDIST_PACKAGES = ("gateway", "vmm", "previews", "native")
SDIST_LEFT_OUT = {"__pycache__", "target", "bin"}
SDIST_SUFFIXES_LEFT_OUT = {".so", ".c", ".pyc"}

Config = dict[str, Any] | None

get_requires_for_build_wheel = maturin.get_requires_for_build_wheel
get_requires_for_build_editable = maturin.get_requires_for_build_editable
prepare_metadata_for_build_wheel = maturin.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = maturin.prepare_metadata_for_build_editable


def build_wheel(directory: str, config_settings: Config = None, metadata_directory: str | None = None) -> str:
    """Build everything and return the wheel's file name."""
    build_native()
    return maturin.build_wheel(directory, config_settings, metadata_directory)


def build_editable(directory: str, config_settings: Config = None, metadata_directory: str | None = None) -> str:
    """Build everything in place and return the file name of a wheel that points here."""
    build_native()
    return maturin.build_editable(directory, config_settings, metadata_directory)


def build_sdist(directory: str, config_settings: Config = None) -> str:
    """Pack the sources; maturin's own sdist would leave out the crates that its extension does not depend on."""
    with tempfile.TemporaryDirectory() as scratch:
        info = maturin.prepare_metadata_for_build_wheel(scratch, config_settings)
        metadata = Path(scratch, info, "METADATA")
        name = info.removesuffix(".dist-info")
        with tarfile.open(Path(directory, f"{name}.tar.gz"), "w:gz", format=tarfile.PAX_FORMAT) as archive:
            archive.add(metadata, f"{name}/PKG-INFO")
            for path in sdist_paths():
                archive.add(path, f"{name}/{path.relative_to(ROOT)}", recursive=False)
    return f"{name}.tar.gz"


def sdist_paths() -> Iterator[Path]:
    """Every source file of the distribution, sorted."""
    yield from (path for name in SDIST_FILES if (path := ROOT / name).exists())
    for package in SDIST_PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            left_out = SDIST_LEFT_OUT.intersection(path.relative_to(ROOT).parts)
            if path.is_file() and not left_out and path.suffix not in SDIST_SUFFIXES_LEFT_OUT:
                yield path


def build_native() -> None:
    """Compile the Cython modules and the Rust programs in place."""
    build_cython()
    build_programs()


def build_cython() -> None:
    """Compile `native/*.pyx` beside their sources."""
    # setuptools patches the standard library when it is imported, so it comes only when it is needed, and first.
    from setuptools import Distribution, Extension  # noqa: I001, PLC0415

    from Cython.Build import cythonize  # noqa: PLC0415

    scratch = str(NATIVE / "target" / "cython")
    with contextlib.chdir(ROOT):
        extensions = [
            Extension(f"native.{source.stem}", [str(source)], extra_compile_args=["-O3"])
            for source in sorted(Path("native").glob("*.pyx"))
        ]
        modules = cythonize(extensions, build_dir=scratch, compiler_directives={"language_level": "3"}, quiet=True)
        # Named packages keep setuptools from searching the tree for its own idea of what to pack.
        command = Distribution({"name": "sandgate", "packages": ["native"], "ext_modules": modules}).get_command_obj(
            "build_ext"
        )
        command.inplace = True
        command.build_lib = command.build_temp = scratch
        command.ensure_finalized()
        command.run()


def build_programs() -> None:
    """Build the agent and the plane, static, and publish them in `native/bin`."""
    profile = os.environ.get("SANDGATE_CARGO_PROFILE", "release")
    host = host_triple()
    # The agent runs inside root file systems that we do not choose, so it brings its own C library; the plane shares
    # its build. The flag goes through an explicit target: as RUSTFLAGS it would also hit build scripts and macros.
    flags = {f"CARGO_TARGET_{host.upper().replace('-', '_')}_RUSTFLAGS": "-C target-feature=+crt-static"}
    command = ["cargo", "build", "--manifest-path", str(NATIVE / "Cargo.toml"), "--locked", "--profile", profile]
    selected = [argument for program in PROGRAMS for argument in ("--bin", program)]
    subprocess.run([*command, "--target", host, *selected], check=True, env={**os.environ, **flags}, stdout=sys.stderr)
    target = Path(os.environ.get("CARGO_TARGET_DIR", NATIVE / "target"))
    for program in PROGRAMS:
        publish(target / host / ("debug" if profile == "dev" else profile) / program)


def publish(program: Path) -> None:
    """Put `program` into `native/bin` in one step, so that nobody starts half a file; leave an equal one alone."""
    BIN.mkdir(exist_ok=True)
    destination = BIN / program.name
    if destination.exists() and destination.read_bytes() == program.read_bytes():
        return
    scratch = destination.with_suffix(".new")
    shutil.copy2(program, scratch)
    scratch.replace(destination)


def host_triple() -> str:
    """The target that the installed rustc builds for by default, such as x86_64-unknown-linux-gnu."""
    lines = subprocess.run(["rustc", "-vV"], check=True, capture_output=True, text=True).stdout.splitlines()
    return next(line.removeprefix("host: ") for line in lines if line.startswith("host: "))


if __name__ == "__main__":
    build_native()
