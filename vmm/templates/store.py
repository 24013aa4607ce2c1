"""The templates of a host: found by name, built once, kept in a cache directory that instances share.

    <cache>/templates/<recipe digest>/rootfs/…         the files
    <cache>/templates/<recipe digest>/template.json    written last; a directory without it is not a template
    <cache>/templates/<recipe digest>.lock             held while it is built

A root file system is never changed after it is published, except that an agent is added under a name made of its
digest: instances with different agents do not disturb each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from vmm.errors import MachineError
from vmm.templates.build import Progress, build
from vmm.templates.recipe import CATALOGUE, Recipe
from vmm.types import TemplateInfo

_AGENT_DIR = "usr/libexec/sandgate"
_BUILD_WAIT_S = 1200.0


@dataclass(frozen=True, slots=True)
class Template:
    """A template ready to start machines from: its files on the host and the agent's path inside."""

    info: TemplateInfo
    rootfs: Path
    agent: str


class TemplateStore:
    """Templates of a catalogue below a cache directory. Methods block; `find` and `infos` only look up memory."""

    def __init__(self, cache: Path, agent: Path, catalogue: Sequence[Recipe] = CATALOGUE) -> None:
        self._root = cache / "templates"
        self._agent = agent
        self._catalogue = catalogue
        self._ready: dict[str, Template] = {}

    def missing(self) -> list[Recipe]:
        """Recipes of the catalogue that have not been built yet."""
        return [recipe for recipe in self._catalogue if not self._is_built(recipe)]

    def load(self) -> list[TemplateInfo]:
        """Make every built template usable: adds the agent where it is missing. Returns them."""
        agent = self._agent.read_bytes()
        for recipe in self._catalogue:
            if self._is_built(recipe):
                self._ready[recipe.name] = self._open(recipe, agent)
        return self.infos()

    def infos(self) -> list[TemplateInfo]:
        """Templates that `find` knows."""
        return [template.info for template in self._ready.values()]

    def find(self, name: str) -> Template:
        """Look up by name or alias. Raises MachineError(`template_not_found`)."""
        for template in self._ready.values():
            if name == template.info.name or name in template.info.aliases:
                return template
        raise MachineError("template_not_found", f"there is no template {name!r}")

    def ensure(self, progress: Progress) -> None:
        """Build what is missing, one at a time; another process that builds the same is waited for.

        Raises BuildError, or MachineError(`driver_failed`) when another builder does not come to an end.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        for recipe in self._catalogue:
            if not self._is_built(recipe):
                with self._locked(recipe, progress):
                    if not self._is_built(recipe):
                        self._build(recipe, progress)

    def remove(self, name: str) -> bool:
        """Delete a built template; False when there was none. No machine may use it."""
        removed = False
        for recipe in self._catalogue:
            if recipe.name == name and self._is_built(recipe):
                (self._place(recipe) / "template.json").unlink()
                shutil.rmtree(self._place(recipe))
                self._ready.pop(name, None)
                removed = True
        return removed

    def _build(self, recipe: Recipe, progress: Progress) -> None:
        progress(f"building template {recipe.name}")
        started = time.monotonic()
        for leftover in self._root.glob(f"{recipe.digest}.building-*"):
            shutil.rmtree(leftover)
        work = Path(tempfile.mkdtemp(prefix=f"{recipe.digest}.building-", dir=self._root))
        try:
            work.chmod(0o755)
            build(recipe, work / "rootfs", progress)
            record = {"size_bytes": _size_bytes(work / "rootfs"), "created_at": time.time()}
            (work / "template.json").write_bytes(orjson.dumps(record))
            os.sync()
            shutil.rmtree(self._place(recipe), ignore_errors=True)
            work.rename(self._place(recipe))
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        progress(f"template {recipe.name} is ready after {time.monotonic() - started:.0f} s")

    def _open(self, recipe: Recipe, agent: bytes) -> Template:
        place = self._place(recipe)
        record = orjson.loads((place / "template.json").read_bytes())
        agent_digest = hashlib.sha256(agent).hexdigest()
        inside = f"/{_AGENT_DIR}/agent-{agent_digest[:16]}"
        _install(agent, place / "rootfs" / inside.lstrip("/"))
        info = TemplateInfo(
            name=recipe.name,
            digest=hashlib.sha256(f"{recipe.digest} {agent_digest}".encode()).hexdigest(),
            description=recipe.description,
            size_bytes=record["size_bytes"],
            created_at=record["created_at"],
            packages=recipe.packages,
            aliases=recipe.aliases,
        )
        return Template(info, place / "rootfs", inside)

    def _place(self, recipe: Recipe) -> Path:
        return self._root / recipe.digest

    def _is_built(self, recipe: Recipe) -> bool:
        return (self._place(recipe) / "template.json").is_file()

    @contextlib.contextmanager
    def _locked(self, recipe: Recipe, progress: Progress) -> Iterator[None]:
        lock = os.open(self._root / f"{recipe.digest}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + _BUILD_WAIT_S
            has_said = False
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise MachineError(
                            "driver_failed", f"another process builds {recipe.name} for too long"
                        ) from None
                    if not has_said:
                        progress(f"waiting for another process that builds template {recipe.name}")
                        has_said = True
                    time.sleep(0.5)
            yield
        finally:
            os.close(lock)


def _install(agent: bytes, place: Path) -> None:
    """Put the agent into a root file system, unless it is there; a machine sees all of it or nothing."""
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=place.parent)
    with os.fdopen(descriptor, "wb") as file:
        file.write(agent)
        os.fchmod(descriptor, 0o755)
    Path(name).rename(place)


def _size_bytes(root: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in root.rglob("*"))
