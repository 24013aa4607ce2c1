from typing import Literal

class HostError(ValueError): ...

def parse_host(
    header: str, domains: list[str]
) -> tuple[Literal["api", "preview", "reserved"], int | None, str | None, str | None]: ...
