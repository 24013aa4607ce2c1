"""Settings: where they come from, what is refused, and the paths made from them."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.settings import (
    Settings,
    SettingsError,
    env_name,
    load,
    make_private_dir,
    split_address,
    table,
    unknown_variables,
)


def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    config = tmp_path / "sandgate.toml"
    config.write_text('domain = "file"\nregion = "file"\nworkers = 3\naccess_log = false\n')
    environ = {"SANDGATE_CONFIG": str(config), "SANDGATE_DOMAIN": "env", "SANDGATE_REGION": "env"}
    settings = load(environ, {"domain": "flag", "region": None})

    assert (settings.domain, settings.region, settings.workers) == ("flag", "env", 3)
    assert settings.access_log is False
    assert settings.log_level == Settings().log_level


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("WORKERS", "two", "must be a whole number"),
        ("WORKERS", "1.5", "must be a whole number"),
        ("WORKERS", "-1", "must be at least 0"),
        ("WORKERS", "257", "must be at most 256"),
        ("REQUEST_TIMEOUT_S", "nan", "must be at least 1"),
        ("REQUEST_TIMEOUT_S", "soon", "must be a number"),
        ("ACCESS_LOG", "maybe", "must be true or false"),
        ("LOG_LEVEL", "loud", "must be one of debug, info, warning, error"),
        ("LISTEN", "8080", "is not host:port"),
        ("LISTEN", "127.0.0.1:65536", "is not host:port"),
        ("LISTEN", "::1:8080", "goes in brackets"),
        ("ADMIN_LISTEN", "127.0.0.1:8080", "must differ"),
        ("TLS_LISTEN", "0.0.0.0:443", "go together"),
        ("TLS_LISTEN", "443", "is not host:port"),
        ("HTTPS_REDIRECT", "true", "needs SANDGATE_TLS_LISTEN"),
        ("PUBLIC_URL", "example.com", "must start with http"),
        ("TRUSTED_PROXIES", "10.0.0.0/8, proxy.example", "does not appear to be"),
        ("PLANE_HEAD_FIELDS_MAX", "257", "must be at most 256"),
        ("API_ORIGINS", "app.example", "is not an origin"),
        ("API_ORIGINS", "*, https://app.example/", "is not an origin"),
        ("SANDBOX_MEMORY_MIB", "99999", "is over SANDGATE_SANDBOX_MEMORY_MIB_MAX"),
        ("SANDBOX_TIMEOUT_S", "1e9", "is over"),
        ("CONFIG", "/does/not/exist.toml", "No such file"),
    ],
)
def test_impossible_value_is_refused_by_name(name: str, value: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=f"SANDGATE_{name}.*{complaint}"):
        load({f"SANDGATE_{name}": value})


@pytest.mark.parametrize(
    ("more", "origin", "port"),
    [
        ({"SANDGATE_TLS_LISTEN": "0.0.0.0:443"}, "https://box.test", 443),
        ({"SANDGATE_TLS_LISTEN": "[::]:8443"}, "https://box.test:8443", 8443),
        (
            {"SANDGATE_TLS_LISTEN": "[::]:8443", "SANDGATE_PUBLIC_URL": "https://api.box.test"},
            "https://api.box.test",
            443,
        ),
    ],
)
def test_with_tls_clients_are_sent_to_https(more: dict[str, str], origin: str, port: int) -> None:
    environ = {"SANDGATE_DOMAIN": "box.test", "SANDGATE_TLS_DIR": "/tls", "SANDGATE_HTTPS_REDIRECT": "yes", **more}
    settings = load(environ)

    assert settings.origin == origin
    assert settings.https_port == port
    assert settings.api_base_url == f"{origin}/api/v1"
    assert load(settings.environment()) == settings


def test_listeners_differ() -> None:
    with pytest.raises(SettingsError, match="SANDGATE_TLS_LISTEN must differ"):
        load({"SANDGATE_TLS_LISTEN": "127.0.0.1:8080", "SANDGATE_TLS_DIR": "/tls"})


def test_unknown_key_in_the_file_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "sandgate.toml"
    config.write_text('listne = "0.0.0.0:80"\n')
    with pytest.raises(SettingsError, match="no such setting: listne"):
        load({"SANDGATE_CONFIG": str(config)})


def test_misspelt_variable_is_found() -> None:
    assert unknown_variables({"SANDGATE_LISTNE": "x", "SANDGATE_LISTEN": "y", "PATH": "z"}) == ["SANDGATE_LISTNE"]


@pytest.mark.parametrize(("text", "value"), [("never", None), ("", None), ("90", 90.0)])
def test_optional_value_may_be_never(text: str, value: float | None) -> None:
    assert load({"SANDGATE_SANDBOX_IDLE_TIMEOUT_S": text}).sandbox_idle_timeout_s == value


def test_children_get_the_same_settings_by_environment() -> None:
    settings = load({"SANDGATE_HOME": "relative", "SANDGATE_SANDBOX_IDLE_TIMEOUT_S": "5", "SANDGATE_ACCESS_LOG": "no"})

    assert load(settings.environment()) == settings
    assert settings.home.is_absolute()


@pytest.mark.parametrize(
    ("listen", "public_url", "origin"),
    [
        ("127.0.0.1:8080", "", "http://127.0.0.1:8080"),
        ("0.0.0.0:80", "", "http://127.0.0.1:80"),
        ("unix:/run/a.sock, 127.0.0.1:80, [::1]:81", "", "http://127.0.0.1:80"),
        ("[::]:80", "", "http://[::1]:80"),
        ("[fe80::1]:80", "", "http://[fe80::1]:80"),
        ("0.0.0.0:80", "https://api.example.com/", "https://api.example.com"),
    ],
)
def test_origin_is_one_a_client_can_use(listen: str, public_url: str, origin: str) -> None:
    settings = load({"SANDGATE_LISTEN": listen, "SANDGATE_PUBLIC_URL": public_url})

    assert settings.api_base_url == f"{origin}/api/v1"


@pytest.mark.parametrize(("extra", "is_short"), [(0, False), (1, True)])
def test_run_directory_is_short_enough_to_bind(extra: int, is_short: bool) -> None:
    longest = 107 - len("/hostd.sock") - len("/run")
    home = Path("/" + "h" * (longest - 1 + extra))
    settings = Settings(home=home)

    assert (settings.run_dir != home / "run") is is_short
    assert len(str(settings.hostd_socket)) <= 107
    assert settings.run_dir == Settings(home=home).run_dir


@given(st.integers(0, 65535), st.sampled_from(["127.0.0.1", "::1", "localhost", "0.0.0.0"]))
def test_address_is_split_as_it_was_joined(port: int, host: str) -> None:
    assert split_address(f"[{host}]:{port}" if ":" in host else f"{host}:{port}") == (host, port)


def test_private_directory_is_narrowed(tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir(mode=0o755)
    for path in (wide, tmp_path / "new" / "deep"):
        make_private_dir(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_every_setting_says_what_it_means() -> None:
    assert len(table()) == len(Settings().environment())
    for name, (_, row) in table().items():
        assert row.meaning.endswith("."), env_name(name)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SANDGATE_LISTEN": "unix:a.sock,127.0.0.1:80"}, "absolute path"),
        ({"SANDGATE_LISTEN": f"unix:/{'a' * 107},127.0.0.1:80"}, "absolute path"),
        ({"SANDGATE_LISTEN": "unix:/a.sock"}, "SANDGATE_PUBLIC_URL is needed"),
        ({"SANDGATE_LISTEN": "127.0.0.1:80,127.0.0.1:80"}, "must differ"),
        ({"SANDGATE_LISTEN": "127.0.0.1:9090"}, "SANDGATE_ADMIN_LISTEN must differ from SANDGATE_LISTEN"),
        ({"SANDGATE_LISTEN": " , "}, "is empty"),
        ({"SANDGATE_ADMIN_LISTEN": "unix:/a.sock"}, "SANDGATE_ADMIN_LISTEN"),
        ({"SANDGATE_LISTEN_SOCKET_MODE": "888"}, "must be octal"),
        ({"SANDGATE_LISTEN_SOCKET_OWNER": "nobody-of-that-name"}, "nobody-of-that-name"),
    ],
)
def test_a_listener_that_cannot_be_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(environ)
