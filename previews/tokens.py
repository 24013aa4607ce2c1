"""Tokens that open private previews. Only their hashes are kept and pushed to the plane."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Literal

#: The plane tells its own tokens from an application's parameters by these.
PREFIXES: dict[Literal["share", "browser"], str] = {"share": "miosa_pv_", "browser": "mp_"}
#: Query parameters in which the plane looks for a token.
QUERY_PARAMETERS: dict[Literal["share", "browser"], str] = {"share": "preview_token", "browser": "mt"}
#: How much of a token is shown later, to tell it from others.
PREFIX_CHARS = 12

_RANDOM_BYTES = 24


@dataclass(frozen=True, slots=True)
class Token:
    """A fresh token. `secret` is handed out once; `prefix` and `hash` are kept."""

    secret: str
    prefix: str
    hash: str


def make_token(kind: Literal["share", "browser"]) -> Token:
    """Make a token with 192 random bits, safe in URLs, cookies and headers."""
    secret = PREFIXES[kind] + secrets.token_urlsafe(_RANDOM_BYTES)
    return Token(secret, secret[:PREFIX_CHARS], hash_token(secret))


def hash_token(secret: str) -> str:
    """The hex SHA-256 under which the plane knows a token or an API key."""
    return hashlib.sha256(secret.encode()).hexdigest()
