"""What a template is made of.

A recipe is data: the same recipe always has the same digest, and a built template is found by it. Change anything here
and the next start builds anew, beside the old one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import orjson

#: Part of every digest; raise it when `build` makes something else from the same recipe.
_BUILDER_VERSION = 2


@dataclass(frozen=True, slots=True)
class Recipe:
    """A Debian root file system.

    packages: names in the suite's main component.  files: contents by absolute path, mode 0644.
    user: the unprivileged account with uid 1000 whose home is `/home/<user>`; it owns `directories`.
    aliases: other names the template answers to.
    """

    name: str
    description: str
    suite: str
    packages: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    user: str = "user"
    directories: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hex SHA-256 of everything that decides what is built; name, description and aliases do not."""
        content = asdict(self)
        for key in ("name", "description", "aliases"):
            del content[key]
        canonical = orjson.dumps([_BUILDER_VERSION, content], option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(canonical).hexdigest()


#: The template every host has. Debian's npm is left out: it brings several hundred packages, more than all the rest.
#: So is sudo: gVisor ignores set-user-id bits, and commands run as root when they are asked to.
DEFAULT = Recipe(
    name="miosa-sandbox",
    description="Debian 12 with Python 3.11, Node.js 18 and git",
    # An alias says which kind of template a caller meant; the description says what is really inside.
    aliases=("default", "python", "python-3.12", "node", "react-vite", "static"),
    suite="bookworm",
    packages=(
        "bash",
        "ca-certificates",
        "coreutils",
        "curl",
        "git",
        "iproute2",
        "nodejs",
        "procps",
        "python3",
        "python3-pip",
        "python3-venv",
        "tzdata",
    ),
    directories=("/workspace",),
    files={
        # A call to pip outside a virtual environment is the common case in a sandbox, and harms nobody there.
        "/etc/pip.conf": "[global]\nbreak-system-packages = true\ndisable-pip-version-check = true\n",
        "/etc/profile.d/python.sh": "alias python=python3\n",
    },
)

CATALOGUE = (DEFAULT,)
