"""What the plane is told: sandboxes with their ports and tokens, and API keys.

Every record carries a version `v`, microseconds since the epoch taken from the database row: an older record never
replaces a newer one, so pushes may arrive in any order. Times are Unix seconds, None for "does not expire".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class ShareRule:
    """A share of one port. path: below which it opens. hash: see `previews.tokens.hash_token`."""

    id: str
    hash: str
    expires_at: float | None
    path: str = "/"


@dataclass(frozen=True, slots=True)
class TokenRule:
    """A token for the whole sandbox, or for one port of it."""

    hash: str
    expires_at: float | None
    port: int | None = None
    path: str = "/"


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """What pages of other sites may do with a preview. None leaves it to the server in the sandbox.

    allowed_origins: whose scripts may read it, `*` for all.  allow_credentials: also with cookies and keys.
    frame_ancestors: who may show it in a frame, as Content-Security-Policy spells it; empty for nobody.
    """

    allowed_origins: Sequence[str] | None = None
    allow_credentials: bool = False
    frame_ancestors: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class PortRoute:
    """A port opened as a preview. A port without a route is private."""

    preview_id: str
    visibility: Literal["public", "private"]
    shares: Sequence[ShareRule] = ()
    policy: PolicyRule | None = None


@dataclass(frozen=True, slots=True)
class SandboxRoute:
    """A sandbox as the plane sees it.

    owner: workspace id.  address: where its ports are reached; while it is frozen or hibernated, where they were.
    auto_resume: whether a request for a frozen or hibernated sandbox asks for it to be woken.
    """

    v: int
    id: str
    slug: str
    owner: str
    address: str
    state: Literal["running", "starting", "frozen", "hibernated"] = "running"
    ports: Mapping[int, PortRoute] = field(default_factory=dict)
    tokens: Sequence[TokenRule] = ()
    auto_resume: bool = True

    def message(self) -> dict[str, Any]:
        """The control message that puts it."""
        return {
            "t": "sandbox",
            "v": self.v,
            "id": self.id,
            "slug": self.slug,
            "owner": self.owner,
            "address": self.address,
            "state": self.state,
            "auto_resume": self.auto_resume,
            "ports": {str(port): _port_record(route) for port, route in self.ports.items()},
            "tokens": [_token_record(token) for token in self.tokens],
        }


@dataclass(frozen=True, slots=True)
class KeyRoute:
    """An API key that opens its workspace's private previews."""

    v: int
    hash: str
    owner: str
    expires_at: float | None

    def message(self) -> dict[str, Any]:
        """The control message that puts it."""
        return {"t": "key", "v": self.v, "hash": self.hash, "owner": self.owner, "expires_at": self.expires_at}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything there is, as of version `v`: what is older and not listed no longer exists."""

    v: int
    sandboxes: Sequence[SandboxRoute]
    keys: Sequence[KeyRoute]


def _port_record(route: PortRoute) -> dict[str, Any]:
    shares = [
        {"id": share.id, "hash": share.hash, "expires_at": share.expires_at, "path": share.path}
        for share in route.shares
    ]
    record: dict[str, Any] = {"preview_id": route.preview_id, "visibility": route.visibility, "shares": shares}
    if route.policy is not None:
        record["policy"] = asdict(route.policy)
    return record


def _token_record(token: TokenRule) -> dict[str, Any]:
    record: dict[str, Any] = {"hash": token.hash, "expires_at": token.expires_at, "path": token.path}
    if token.port is not None:
        record["port"] = token.port
    return record
