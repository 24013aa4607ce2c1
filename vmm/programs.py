"""Where the host's programs are."""

from __future__ import annotations

import os
import shutil

#: Some of them are for administrators, and a PATH made for other users lacks their directories.
_ALSO = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def find(name: str) -> str | None:
    """Path of a program, or None when it is not installed."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", os.defpath), *_ALSO)))
