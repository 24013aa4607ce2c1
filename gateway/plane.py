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
        *("--listen", settings.listen),
        *("--admin-listen", settings.admin_listen),
        *("--api-socket", settings.api_socket),
        *("--control-socket", settings.plane_socket),
        *("--hostd-socket", settings.hostd_socket),
        *("--domain", settings.domain),
        *("--drain-timeout-s", str(settings.drain_timeout_s)),
    ]
    if settings.tls_listen:
        argv += ["--tls-listen", settings.tls_listen, "--tls-dir", settings.tls_dir]
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
