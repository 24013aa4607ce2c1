"""The plane's command line."""

from __future__ import annotations

import itertools
import subprocess

import pytest

from gateway.plane import plane_argv
from gateway.settings import Settings, load

EVERYTHING = {
    "SANDGATE_PLANE_ACCESS_LOG": "-",
    "SANDGATE_PLANE_ACCESS_LOG_SHARE": "0.5",
    "SANDGATE_PLANE_WORKERS": "3",
    "SANDGATE_TRUSTED_PROXIES": "10.0.0.0/8, ::1, unix",
    "SANDGATE_LISTEN": "127.0.0.1:8080, unix:/run/a.sock",
    "SANDGATE_LISTEN_SOCKET_MODE": "0666",
    "SANDGATE_LISTEN_SOCKET_OWNER": "root:root",
    "SANDGATE_API_ORIGINS": "https://app.example, http://localhost:5173",
    "SANDGATE_TLS_LISTEN": "127.0.0.1:8443",
    "SANDGATE_TLS_DIR": "certificates",
    "SANDGATE_HTTPS_REDIRECT": "yes",
}


@pytest.mark.parametrize("settings", [Settings(), load(EVERYTHING)], ids=["defaults", "everything"])
def test_the_plane_knows_every_flag(settings: Settings) -> None:
    argv = plane_argv(settings)
    # It reads the flags in order, that one last.
    done = subprocess.run([*argv, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    refused = subprocess.run([*argv, "--no-such-flag", "--version"], capture_output=True, check=False)
    assert refused.returncode == 2


def test_settings_become_flags() -> None:
    argv = plane_argv(load(EVERYTHING))
    pairs = list(itertools.pairwise(argv))
    for pair in (
        ("--listen", "127.0.0.1:8080"),
        ("--listen", "unix:/run/a.sock"),
        ("--socket-mode", "0666"),
        ("--socket-user", "0"),
        ("--socket-group", "0"),
        ("--trusted-proxy", "unix"),
        ("--workers", "3"),
        ("--access-log-share", "0.5"),
        ("--trusted-proxy", "10.0.0.0/8"),
        ("--trusted-proxy", "::1"),
        ("--api-origin", "https://app.example"),
        ("--wake-timeout-s", "30.0"),
        ("--https-redirect", "8443"),
    ):
        assert pair in pairs
