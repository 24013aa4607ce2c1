"""Makes a root file system from a recipe with mmdebstrap.

Mirrors and keys are those of this machine's own apt configuration; certificates that the host's administrator added
are added to the template too, so that what the host can reach over TLS its guests can reach as well.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from vmm import programs
from vmm.errors import VmmError
from vmm.templates.recipe import Recipe

#: Called with one line of progress at a time.
Progress = Callable[[str], None]

_TIMEOUT_S = 900
_USER_ID = 1000
_HOST_CERTIFICATES = Path("/usr/local/share/ca-certificates")
_GUEST_CERTIFICATES = "usr/local/share/ca-certificates/host"
_LINES_KEPT = 40
#: Nothing reads manuals in a sandbox, and they are a fifth of its size.
_LEFT_OUT = ("doc", "man", "info", "locale", "bash-completion", "lintian", "doc-base")


class BuildError(VmmError):
    """A template could not be built; `detail` holds the builder's last lines."""

    def __init__(self, message: str, *, detail: str | None = None) -> None:
        super().__init__("driver_failed", message, detail=detail)


def build(recipe: Recipe, target: Path, progress: Progress) -> None:
    """Build into `target`, which must not exist. Blocks for 25 to 60 s. Raises BuildError and leaves nothing behind."""
    if programs.find("mmdebstrap") is None:
        raise BuildError("mmdebstrap is missing; run `apt-get install mmdebstrap`")
    sources = debian_sources(recipe.suite)
    try:
        _bootstrap(recipe, sources, target, progress)
        progress("adding the user and files")
        _add_files(recipe, target)
        _add_user(recipe, target)
        _add_certificates(target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def debian_sources(suite: str) -> list[str]:
    """apt source lines for a suite and its updates, as this machine's apt is configured. Raises BuildError."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError("apt's configuration could not be read", detail=str(error)) from error
    wanted = {suite, f"{suite}-updates", f"{suite}-security"}
    lines = [line.split() for line in done.stdout.splitlines()]
    sources = [f"deb {' '.join(line)}" for line in lines if len(line) == 3 and line[1] in wanted and line[2] == "main"]
    if not any(line.split()[2] == suite for line in sources):
        raise BuildError(f"apt knows no mirror for {suite}; add one to /etc/apt/sources.list.d")
    return sources


def _bootstrap(recipe: Recipe, sources: list[str], target: Path, progress: Progress) -> None:
    command = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(recipe.packages)}"]
    command += ['--aptopt=Acquire::Languages "none"']
    command += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _LEFT_OUT]
    command += [recipe.suite, str(target), *sources]
    last: list[str] = []
    # Its own session: a time-out has to end apt and dpkg below it too.
    with (
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
        ) as process,
        _killed_after(process, _TIMEOUT_S),
    ):
        for line in process.stdout or ():
            last = [*last[1 - _LINES_KEPT :], line.rstrip()]
            if line.startswith("I: "):
                progress(line[3:].rstrip())
        status = process.wait()
    if status:
        raise BuildError("the template's packages could not be installed", detail="\n".join(last))


@contextlib.contextmanager
def _killed_after(process: subprocess.Popen[str], timeout_s: float) -> Iterator[None]:
    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(timeout_s, kill)
    timer.start()
    try:
        yield
    except BaseException:
        kill()
        raise
    finally:
        timer.cancel()


def _add_files(recipe: Recipe, target: Path) -> None:
    for path, text in recipe.files.items():
        place = target / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(0o644)
    # gVisor mounts a memory file system over an empty /tmp; with a directory in it, /tmp stays on the machine's disk.
    sockets = target / "tmp/.X11-unix"
    sockets.mkdir()
    sockets.chmod(0o1777)
    # Each machine gets its own from its agent; an empty file is what tools expect until then.
    (target / "etc/machine-id").write_text("")


def _add_user(recipe: Recipe, target: Path) -> None:
    _in_target(
        target, "useradd", "--uid", str(_USER_ID), "--user-group", "--create-home", "--shell", "/bin/bash", recipe.user
    )
    for directory in recipe.directories:
        place = target / directory.lstrip("/")
        place.mkdir(parents=True, exist_ok=True)
        os.chown(place, _USER_ID, _USER_ID)


def _add_certificates(target: Path) -> None:
    certificates = sorted(_HOST_CERTIFICATES.rglob("*.crt"))
    if not certificates:
        return
    place = target / _GUEST_CERTIFICATES
    place.mkdir(parents=True, exist_ok=True)
    for certificate in certificates:
        shutil.copyfile(certificate, place / certificate.name)
    _in_target(target, "update-ca-certificates")


def _in_target(target: Path, *command: str) -> None:
    try:
        subprocess.run(
            [programs.find("chroot") or "chroot", str(target), *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "TMPDIR": tempfile.gettempdir()},
        )
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{command[0]} failed in the template", detail=error.stderr[-2000:]) from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took too long in the template") from error
