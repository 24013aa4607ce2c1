"""The PEP 517 build backend of Sandgate: maturin, with what maturin does not build added first.

    build_wheel / build_editable
        1. native/*.pyx                → native/*.so                 (Cython and the C compiler)
        2. native/crates/{agent,jailer,plane} → native/bin/sandgate-* (cargo)
        3. native/crates/pyext         → native/_core.so, the wheel  (maturin)

Every step is incremental: cargo and Cython rebuild only what changed. `SANDGATE_CARGO_PROFILE=dev` builds the
programs without optimisation; anything installed should keep the default, `release`.

`SANDGATE_BUILD_CACHE` names a directory that checkouts share. Others' crates are in its `cargo`. Finished programs are
in its `programs` by the hash of what they are made from: another checkout of the same sources takes them, instead of a
minute of link-time optimisation, and gets the very agent that the cached templates hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
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
PROGRAMS = ("sandgate-agent", "sandgate-jailer", "sandgate-plane")
#: Sets of programs that a build cache keeps; the oldest go first.
PROGRAM_SETS_MAX = 8
#: What it keeps of compiled crates; nothing else ever removes what old checkouts and compilers left.
CRATES_BYTES_MAX = 4 * 1024**3

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
    with build_cache():
        build_native()
        return maturin.build_wheel(directory, config_settings, metadata_directory)


def build_editable(directory: str, config_settings: Config = None, metadata_directory: str | None = None) -> str:
    """Build everything in place and return the file name of a wheel that points here."""
    with build_cache():
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


@contextlib.contextmanager
def build_cache() -> Iterator[None]:
    """Have cargo use the build cache, if there is one. Checkouts share file names there, so one builds at a time."""
    cache = os.environ.get("SANDGATE_BUILD_CACHE")
    if not cache or "CARGO_TARGET_DIR" in os.environ:
        yield
        return
    crates = Path(cache, "cargo")
    crates.mkdir(parents=True, exist_ok=True)
    with Path(cache, "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if sum(path.lstat().st_size for path in crates.rglob("*")) > CRATES_BYTES_MAX:
            shutil.rmtree(crates)
        forget_own_crates(crates)
        os.environ["CARGO_TARGET_DIR"] = str(crates)
        try:
            yield
        finally:
            del os.environ["CARGO_TARGET_DIR"]


def forget_own_crates(crates: Path) -> None:
    """Have cargo compile our crates again. It tells those of two checkouts apart by nothing but the times of their
    files: one whose sources are older than the last build of another would get the other's programs.
    """
    for depth in ("*", "*/*"):
        for fingerprint in crates.glob(f"{depth}/.fingerprint/sandgate-*"):
            shutil.rmtree(fingerprint)


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
    """Build the programs, static, and publish them in `native/bin`."""
    profile = os.environ.get("SANDGATE_CARGO_PROFILE", "release")
    compiler = subprocess.run(["rustc", "-vV"], check=True, capture_output=True, text=True).stdout
    host = host_triple(compiler)
    # The agent runs inside root file systems that we do not choose, so it brings its own C library; the others share
    # its build. The flag goes through an explicit target: as RUSTFLAGS it would also hit build scripts and macros.
    flags = {f"CARGO_TARGET_{host.upper().replace('-', '_')}_RUSTFLAGS": "-C target-feature=+crt-static"}
    command = ["cargo", "build", "--manifest-path", str(NATIVE / "Cargo.toml"), "--locked", "--profile", profile]
    selected = [argument for program in PROGRAMS for argument in ("--bin", program)]
    command += ["--target", host, *selected]
    cached = cached_programs(" ".join([compiler, *flags.values(), *command[4:]]))
    if cached is None or not all((cached / program).exists() for program in PROGRAMS):
        subprocess.run(command, check=True, env={**os.environ, **flags}, stdout=sys.stderr)
        target = Path(os.environ.get("CARGO_TARGET_DIR", NATIVE / "target"))
        built = target / host / ("debug" if profile == "dev" else profile)
        if cached is None:
            cached = built
        else:
            keep(built, cached)
    for program in PROGRAMS:
        publish(cached / program, BIN / program)


def cached_programs(how: str) -> Path | None:
    """Where the build cache keeps the programs made from today's sources; None without one.

    how: whatever else decides what is built, such as the compiler's version.
    """
    cache = os.environ.get("SANDGATE_BUILD_CACHE")
    if not cache:
        return None
    key = hashlib.sha256(how.encode())
    sources = [*NATIVE.glob("Cargo.*"), *NATIVE.glob("crates/**/*.rs"), *NATIVE.glob("crates/*/Cargo.toml")]
    for source in sorted(sources):
        key.update(f"{source.relative_to(NATIVE)}\0".encode() + hashlib.sha256(source.read_bytes()).digest())
    return Path(cache, "programs", key.hexdigest())


def keep(built: Path, cached: Path) -> None:
    """Put the programs into the build cache, and make room for them."""
    cached.mkdir(parents=True, exist_ok=True)
    for program in PROGRAMS:
        publish(built / program, cached / program)
    by_age = sorted(cached.parent.iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
    for entry in by_age[PROGRAM_SETS_MAX:]:
        shutil.rmtree(entry, ignore_errors=True)


def publish(program: Path, destination: Path) -> None:
    """Copy a program in one step, so that nobody starts half a file; leave an equal one alone."""
    destination.parent.mkdir(exist_ok=True)
    if destination.exists() and destination.read_bytes() == program.read_bytes():
        return
    scratch = destination.with_suffix(f".{os.getpid()}")
    shutil.copy2(program, scratch)
    scratch.replace(destination)


def host_triple(compiler: str) -> str:
    """The target that rustc builds for, such as x86_64-unknown-linux-gnu. compiler: what `rustc -vV` says."""
    lines = compiler.splitlines()
    return next(line.removeprefix("host: ") for line in lines if line.startswith("host: "))


if __name__ == "__main__":
    build_native()
