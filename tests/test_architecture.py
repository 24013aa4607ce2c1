"""The import rules: native ◀ vmm, previews ◀ gateway, and who alone may pick implementations and start servers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gateway", "vmm", "previews", "native", "loadtests", "tests")

#: What each package may import of ours, besides itself.
ALLOWED = {
    "native": set(),
    "vmm": {"native"},
    "previews": {"native"},
    "gateway": {"native", "vmm", "previews"},
    # Speaks over the network, as a stranger would.
    "loadtests": set(),
}

#: The module that names concrete parts; everyone else is handed them.
COMPOSITION = {"gateway/app.py", "gateway/host.py"}
CONCRETE = ("vmm.drivers.gvisor", "vmm.drivers.fake", "gateway.dialects.miosa")

#: The module that starts servers, and what one imports for it.
STARTER = "gateway/__main__.py"
SERVERS = ("granian", "gateway.supervisor", "vmm.host.server")


def sources(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if "target" not in path.parts)


def imported_modules(path: Path, text: str) -> Iterator[str]:
    """Every module that a file imports, wherever the import stands; relative ones made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def violations(package: str, path: Path, text: str) -> list[str]:
    allowed = ALLOWED[package] | {package}
    return [
        module
        for module in imported_modules(path, text)
        if module.split(".")[0] in PACKAGES and module.split(".")[0] not in allowed
    ]


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_follow_the_arrows(package: str) -> None:
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in sources(package)
        if (wrong := violations(package, path, path.read_text()))
    }

    assert found == {}


def test_a_wrong_import_is_noticed() -> None:
    path = ROOT / "vmm" / "host" / "example.py"

    assert violations("vmm", path, "from gateway.errors import CODES") == ["gateway.errors", "gateway.errors.CODES"]
    assert violations("vmm", path, "def late():\n    import previews.hosts") == ["previews.hosts"]
    assert violations("vmm", path, "from ..errors import VmmError\nfrom native import frames") == []


def importers(package: str, prefixes: tuple[str, ...]) -> set[str]:
    """The files of a package that import a module below one of the prefixes."""
    return {
        str(path.relative_to(ROOT))
        for path in sources(package)
        for module in imported_modules(path, path.read_text())
        if module.startswith(prefixes)
    }


def test_only_the_composition_names_implementations() -> None:
    named_in = {name for name in importers("gateway", CONCRETE) if not name.startswith("gateway/dialects/")}

    assert named_in == COMPOSITION


def test_only_the_main_module_starts_servers() -> None:
    assert importers("gateway", SERVERS) == {STARTER}


def test_dialects_do_not_reach_around_the_engine() -> None:
    """A dialect decodes into a command and encodes the answer; stores, hosts and planes are the engine's."""
    forbidden = ("gateway.store", "vmm", "native", "sqlalchemy", "lmdb", "previews.plane")
    assert importers("gateway/dialects", forbidden) == set()


def test_every_package_has_types_and_a_docstring() -> None:
    for package in ("gateway", "vmm", "previews", "native"):
        assert (ROOT / package / "py.typed").exists()
        missing = [
            str(path.relative_to(ROOT))
            for path in sources(package)
            if path.read_text().strip() and ast.get_docstring(ast.parse(path.read_text())) is None
        ]
        assert missing == []
