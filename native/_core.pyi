from typing import Literal

__all__ = ["HostError", "parse_host"]

class HostError(ValueError): ...

def parse_host(
    header: str, domains: list[str]
) -> tuple[Literal["api", "preview", "reserved"], int | None, str | None, str | None]: ...
