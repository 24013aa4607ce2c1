"""The documents tell the truth: every error code, setting and link, and no address or path of the author's machine."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway import settings
from gateway.dialects.miosa import reference
from gateway.errors import CODES
from gateway.observability import metrics

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

#: Package indexes. Their addresses come from the machine's own configuration, never from this tree.
#: Split so that this file passes its own test.
INDEX_HOSTS = (
    "py" + "pi.org",
    "python" + "hosted.org",
    "npm" + "js.org",
    "npm" + "js.com",
    "deb." + "debian.org",
    "crates" + ".io/",
    "index.crates" + ".io",
    "repo.maven" + ".apache.org",
)
MACHINE_PATHS = re.compile(r"(?<![\w.$}])/(?:root/\.\w|work" + r"/main|home/(?!user\b)\w+/)")


def tracked_texts() -> Iterator[tuple[str, str]]:
    """Name and content of every text file that belongs to the project."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            if b"\0" not in data:
                yield name, data.decode()


def anchors(document: Path) -> set[str]:
    """The anchors that a Markdown renderer gives to the headings of a document."""
    headings = re.findall(r"^#{1,6} +(.+?) *#*$", document.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (document.parent / name).resolve() if name else document
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)

    assert broken == []


def test_every_error_code_is_documented() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\w+) \| (yes|no) \| (.+?) \|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE
    )

    assert rows == [
        (name, code.source, "yes" if code.retryable else "no", code.meaning) for name, code in CODES.items()
    ]


def test_every_failure_of_a_preview_is_documented() -> None:
    source = (ROOT / "native/crates/plane/src/failure.rs").read_text()
    codes = re.findall(r'row\(\s*"(\w+)",\s*\d{3},', source)
    document = (ROOT / "docs/previews.md").read_text()

    assert len(codes) > 10
    assert [code for code in codes if f"`{code}`" not in document] == []


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("docs/settings.md", settings.as_markdown),
        ("docs/metrics.md", metrics.as_markdown),
        ("docs/api.md", reference.as_markdown),
    ],
)
def test_printed_documents_are_current(name: str, printed: Callable[[], str]) -> None:
    assert (ROOT / name).read_text() == printed(), "run `make docs`"


def test_no_package_index_is_named() -> None:
    found = [
        (name, host)
        for name, text in tracked_texts()
        # cargo writes the name of the default index into its lock file by itself.
        if name != "native/Cargo.lock"
        for host in INDEX_HOSTS
        if host in text
    ]

    assert found == []


def test_no_path_of_a_particular_machine_is_named() -> None:
    found = [(name, match.group()) for name, text in tracked_texts() for match in MACHINE_PATHS.finditer(text)]

    assert found == []
