"""The plane's command line, made from the settings: a setting `plane_x` is its flag `--x`.

Not for talking to a plane: `previews.plane` does that.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from gateway.settings import Settings, words
from native import plane_path


def plane_argv(settings: Settings) -> list[str | Path]:
    """The program and its flags. Raises native.BinaryMissing."""
    argv: list[str | Path] = [
        plane_path(),
        *("--admin-listen", settings.admin_listen),
        *("--api-socket", settings.api_socket),
        *("--control-socket", settings.plane_socket),
        *("--hostd-socket", settings.hostd_socket),
        *("--domain", settings.domain),
        *("--drain-timeout-s", str(settings.drain_timeout_s)),
        *("--socket-mode", settings.listen_socket_mode),
    ]
    for address in words(settings.listen):
        argv += ["--listen", address]
    for address in words(settings.tls_listen):
        argv += ["--tls-listen", address]
    if settings.tls_dir:
        argv += ["--tls-dir", settings.tls_dir]
    for flag, number in zip(("--socket-user", "--socket-group"), settings.listen_socket_ids, strict=True):
        if number is not None:
            argv += [flag, str(number)]
    if settings.https_redirect:
        argv += ["--https-redirect", str(settings.https_port)]
    for origin in words(settings.api_origins):
        argv += ["--api-origin", origin]
    for proxy in words(settings.trusted_proxies):
        argv += ["--trusted-proxy", proxy]
    if settings.plane_workers:
        argv += ["--workers", str(settings.plane_workers)]
    for name, value in asdict(settings).items():
        if name.startswith("plane_") and name != "plane_workers" and value != "":
            argv += [f"--{name.removeprefix('plane_').replace('_', '-')}", str(value)]
    return argv
