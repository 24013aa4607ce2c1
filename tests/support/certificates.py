"""A certificate authority of the tests' own, and the directory that the plane reads."""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path

import trustme


class Authority:
    """Issues certificates into a directory and makes clients that trust them."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self._ca = trustme.CA()

    def issue(self, pair: str, *names: str) -> str:
        """Write PAIR.crt and PAIR.key for these host names; returns the certificate's fingerprint."""
        issued = self._ca.issue_cert(*names)
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        self.write(f"{pair}.key", issued.private_key_pem.bytes())
        self.write(f"{pair}.crt", chain)
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())).hexdigest()

    def write(self, name: str, content: bytes) -> None:
        """Replace a file in one step."""
        scratch = self.directory / f"{name}.new"
        scratch.write_bytes(content)
        scratch.replace(self.directory / name)

    def context(self, *protocols: str) -> ssl.SSLContext:
        """A client that trusts this authority and offers these protocols."""
        context = ssl.create_default_context()
        self._ca.configure_trust(context)
        if protocols:
            context.set_alpn_protocols(list(protocols))
        return context

    @property
    def flags(self) -> tuple[str, ...]:
        """What the plane needs to be told."""
        return ("--tls-listen", "127.0.0.1:0", "--tls-dir", str(self.directory))


def fingerprint(connection: ssl.SSLObject) -> str:
    """Of the certificate that the other side has shown."""
    certificate = connection.getpeercert(binary_form=True)
    assert certificate is not None
    return hashlib.sha256(certificate).hexdigest()
