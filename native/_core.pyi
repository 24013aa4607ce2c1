"""The Rust extension. Import the facades instead (`native.hosts`)."""

from typing import Literal

class HostError(ValueError):
    """The value of a Host header cannot name anything."""

def parse_host(
    header: str, domains: list[str]
) -> tuple[Literal["api", "preview", "reserved"], int | None, str | None, str | None]: ...
