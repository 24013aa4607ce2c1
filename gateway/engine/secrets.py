"""Making secrets that are shown once, and the digests that are kept of them."""

from __future__ import annotations

import hashlib
import os
import string

_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
#: Bytes from here on would favour the alphabet's first letters.
_UNBIASED = 256 - 256 % len(_ALPHABET)
#: 43 characters of 62: 256 bits.
_LENGTH = 43

#: How much of a secret may be shown later, to tell one from another.
PREFIX_LENGTH = 12


def make_secret(prefix: str) -> str:
    """`prefix` followed by 256 random bits in letters and digits."""
    letters: list[str] = []
    while len(letters) < _LENGTH:
        letters += [_ALPHABET[byte % len(_ALPHABET)] for byte in os.urandom(64) if byte < _UNBIASED]
    return prefix + "".join(letters[:_LENGTH])


def digest(secret: str) -> str:
    """What is stored of a secret: hex SHA-256. Its 256 bits leave nothing to guess, so no slow hash is needed."""
    return hashlib.sha256(secret.encode()).hexdigest()
