"""Errors of the preview layer.

    PreviewError
    ├── HostError          a host name that cannot be parsed or made
    └── PlaneError         the plane did not take a push

What visitors of a preview are told is the plane's own and listed in docs/previews.md.
"""

from __future__ import annotations

from typing import Literal

Source = Literal["caller", "us", "sandbox", "host"]


class PreviewError(Exception):
    """Root of this package's errors. `message` is fit for strangers."""

    source: Source = "us"
    retryable = False

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class HostError(PreviewError):
    """A host name breaks the grammar. Codes: empty, too_long, bad_name, bad_port."""

    source: Source = "caller"


class PlaneError(PreviewError):
    """The plane did not acknowledge in time (`plane_unavailable`) or refused the record (`plane_refused`)."""

    source: Source = "us"

    @property
    def is_unavailable(self) -> bool:
        """Whether the record may still come into force: it is sent again once the plane is back."""
        return self.code == "plane_unavailable"
