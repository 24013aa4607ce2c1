"""Every setting of the server in one table.

A setting comes from, in this order: a command-line flag of `sandgate serve`, the environment (`SANDGATE_<NAME>`), the
TOML file named by `SANDGATE_CONFIG` (keys in lower case), the default below. docs/settings.md is printed from the same
table by `python -m gateway.settings`; a test notices when it is out of date.
"""

from __future__ import annotations

import functools
import grp
import hashlib
import os
import pwd
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from ipaddress import IPv4Address, IPv4Network, ip_network
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

_SOCKET_PATH_BYTES_MAX = 107

#: The longest name in the run directory is "/hostd.sock".
_RUN_DIR_BYTES_MAX = _SOCKET_PATH_BYTES_MAX - len("/hostd.sock")

#: The workspace that the first key belongs to.
FIRST_WORKSPACE = "default"

_HTTPS_PORT = 443

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


class SettingsError(Exception):
    """A setting has an impossible value; the message names it and says what would be possible."""


@dataclass(frozen=True, slots=True)
class Row:
    """What the table says about a setting besides its name, type and default."""

    meaning: str
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The server's settings. Durations are seconds, sizes bytes unless the name says otherwise."""

    home: Annotated[Path, Row("Data directory: database, credentials, journal, sockets.")] = Path(".sandgate")
    cache: Annotated[Path, Row("Where built templates are kept between runs.")] = Path("/var/cache/sandgate")
    listen: Annotated[
        str,
        Row(
            "Addresses of the public listener, comma-separated. `0.0.0.0:8080` opens it to the network;"
            " `unix:/path` is a Unix socket, for a proxy on this host."
        ),
    ] = "127.0.0.1:8080"
    tls_listen: Annotated[
        str,
        Row("Addresses of the public listener for https, such as `0.0.0.0:443`; empty: none. Needs a directory."),
    ] = ""
    listen_socket_mode: Annotated[str, Row("Permission bits of its Unix sockets, in octal.")] = "660"
    listen_socket_owner: Annotated[
        str, Row("Whom its Unix sockets belong to: `user`, `user:group` or `:group`; empty: the server's own.")
    ] = ""
    tls_dir: Annotated[
        str, Row("Directory of PEM pairs `NAME.crt` and `NAME.key`, read again when they change (docs/previews.md).")
    ] = ""
    https_redirect: Annotated[bool, Row("Redirect requests of the public listener to https.")] = False
    admin_listen: Annotated[str, Row("Address of /metrics, /healthz and /readyz. Keep it private.")] = "127.0.0.1:9090"
    domain: Annotated[str, Row("Previews live at `<port>-<slug>.sandbox.<domain>`.")] = "localhost"
    api_origins: Annotated[
        str, Row("Origins whose pages may call the API from a browser, comma-separated, or `*`; empty: none.")
    ] = ""
    public_url: Annotated[
        str,
        Row(
            "Origin clients use, when a proxy stands in front; empty: made from `SANDGATE_LISTEN`, or from"
            " `SANDGATE_DOMAIN` and `SANDGATE_TLS_LISTEN`."
        ),
    ] = ""
    database_url: Annotated[str, Row("SQLAlchemy URL; empty: SQLite in the data directory.")] = ""
    workers: Annotated[int, Row("API worker processes; 0: one per core, at most 2.", least=0, most=256)] = 0
    region: Annotated[str, Row("Region reported for sandboxes of this server.")] = "local"
    log_level: Annotated[str, Row("Least severe log lines written.", choices=("debug", "info", "warning", "error"))] = (
        "info"
    )
    log_format: Annotated[
        str, Row("`json`: one object per line; `text`: for a terminal.", choices=("json", "text"))
    ] = "json"
    log_to: Annotated[
        str,
        Row(
            "`files`: logs/ in the data directory, rolled over; `stderr`: the supervisor's.",
            choices=("files", "stderr"),
        ),
    ] = "files"
    access_log: Annotated[bool, Row("Write one log line per API request.")] = True

    request_timeout_s: Annotated[float, Row("Time an API request may take unless its route sets another.", least=1)] = (
        60.0
    )
    exec_timeout_max_s: Annotated[float, Row("Longest timeout a command may ask for.", least=1)] = 3600.0
    json_body_bytes_max: Annotated[
        int, Row("Largest body that is read as a whole: a file of 10 MiB in base64, and some more.", least=1024)
    ] = 16 * 1024**2
    upload_bytes_max: Annotated[int, Row("Largest streamed upload.", least=1024)] = 2 * 1024**3
    rate_limit_per_minute: Annotated[int, Row("Requests a workspace may make per minute; 0: no limit.", least=0)] = 300
    auth_failures_per_minute: Annotated[
        int, Row("Refused keys per client address and minute before it has to wait; 0: no limit.", least=0)
    ] = 30
    idempotency_ttl_s: Annotated[float, Row("How long an answer is kept for its idempotency key.", least=1)] = 86_400.0
    idempotency_wait_s: Annotated[
        float, Row("How long a second request waits for the first with its idempotency key.", least=0)
    ] = 25.0
    idempotency_answer_bytes_max: Annotated[
        int, Row("Largest answer kept for replay; the key of a larger one is refused afterwards.", least=1024)
    ] = 8 * 1024**2

    trusted_proxies: Annotated[
        str,
        Row(
            "Addresses and networks of proxies in front whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed,"
            " comma-separated; `unix`: whoever connects to a Unix socket."
        ),
    ] = ""
    plane_workers: Annotated[int, Row("Threads of the plane; 0: one per core.", least=0, most=256)] = 0
    plane_connections_max: Annotated[int, Row("Client connections in all.", least=1)] = 20_000
    plane_client_connections_max: Annotated[
        int, Row("Client connections from one address, unless it is a trusted proxy's.", least=1)
    ] = 4_000
    plane_sandbox_connections_max: Annotated[
        int, Row("Requests and open WebSockets to one sandbox at a time.", least=1)
    ] = 1_000
    plane_head_bytes_max: Annotated[int, Row("Largest header of a request.", least=1024, most=131_072)] = 65_536
    plane_head_fields_max: Annotated[int, Row("Most header fields of a request.", least=8, most=256)] = 128
    plane_body_bytes_max: Annotated[
        int, Row("Largest body of a request to a preview; 0: any. The API has limits of its own.", least=0)
    ] = 0
    plane_head_timeout_s: Annotated[float, Row("Time a request's header may take to arrive.", least=0.25)] = 15.0
    plane_idle_timeout_s: Annotated[float, Row("Time between two requests on a connection.", least=0.25)] = 75.0
    plane_body_timeout_s: Annotated[float, Row("Time without a byte of a request's body.", least=0.25)] = 60.0
    plane_send_timeout_s: Annotated[
        float, Row("Time a reader may take none of the bytes that wait for it; then its connection ends.", least=0.25)
    ] = 60.0
    plane_client_bytes_per_s_min: Annotated[
        int,
        Row(
            "Least pace of a client while a response, or the plane, waits for it; 0: any."
            " Idle streams and WebSockets have none.",
            least=0,
        ),
    ] = 240
    plane_client_rate_window_s: Annotated[
        float, Row("Time of such waiting that is judged at once; a line may be worse for a while.", least=1)
    ] = 60.0
    plane_connect_timeout_s: Annotated[float, Row("Time for a connection to a sandbox.", least=0.25)] = 5.0
    plane_response_timeout_s: Annotated[
        float, Row("Time a sandbox's server may take until the header of its response.", least=0.25)
    ] = 300.0
    plane_stream_timeout_s: Annotated[float, Row("Time without a byte in a response or a WebSocket.", least=0.25)] = (
        3600.0
    )
    plane_stream_heartbeat_s: Annotated[
        float, Row("Time without an event until a comment is sent on an event stream.", least=0.5)
    ] = 15.0
    plane_stream_events_max: Annotated[
        int, Row("Events that may wait for one client of an event stream; with more it loses its stream.", least=1)
    ] = 1_000
    plane_wake_waiting_max: Annotated[int, Row("Requests that wait for one sandbox to wake up.", least=0)] = 256
    plane_wake_timeout_s: Annotated[float, Row("Time a request waits for its sandbox to wake up.", least=0.25)] = 30.0
    plane_access_log: Annotated[
        str, Row("File for a JSON line per request, previews included; `-`: the plane's log in logs/; empty: none.")
    ] = ""
    plane_access_log_share: Annotated[
        float, Row("Share of the requests that it notes; those that fail are always noted.", least=0, most=1)
    ] = 1.0
    plane_metric_sandboxes_max: Annotated[
        int, Row("Sandboxes with metrics of their own, the busiest ones; all others share one.", least=0, most=1000)
    ] = 20
    plane_hand_over_timeout_s: Annotated[
        float, Row("Time open WebSockets and requests get to end in a plane that has been replaced.", least=0)
    ] = 3600.0

    driver: Annotated[
        str, Row("What runs machines; `fake` starts none and is for tests.", choices=("gvisor", "fake"))
    ] = "gvisor"
    default_template: Annotated[str, Row("Template of a sandbox that names none: a name or alias.")] = "default"
    sandbox_cpu_count: Annotated[float, Row("Cores of a sandbox that asks for none.", least=0.1)] = 1.0
    sandbox_cpu_count_max: Annotated[float, Row("Most cores a sandbox may ask for.", least=0.1)] = 8.0
    sandbox_memory_mib: Annotated[int, Row("Memory of a sandbox that asks for none.", least=64)] = 1024
    sandbox_memory_mib_max: Annotated[int, Row("Most memory a sandbox may ask for.", least=64)] = 16_384
    sandbox_disk_mib: Annotated[int, Row("Disk of a sandbox that asks for none.", least=16)] = 3072
    sandbox_disk_mib_max: Annotated[int, Row("Most disk a sandbox may ask for.", least=16)] = 32_768
    sandbox_timeout_s: Annotated[float, Row("Life of a sandbox that asks for none.", least=1)] = 300.0
    sandbox_timeout_max_s: Annotated[float, Row("Longest life a sandbox may ask for.", least=1)] = 86_400.0
    sandbox_idle_timeout_s: Annotated[
        float | None,
        Row("Time without activity after which a sandbox that asks for none is idle; or `never`.", least=1),
    ] = None
    sandbox_idle_action: Annotated[
        str, Row("What becomes of an idle sandbox that asks for nothing else.", choices=("destroy", "pause", "keep"))
    ] = "destroy"
    sandboxes_per_workspace: Annotated[int, Row("Living sandboxes a workspace may have.", least=1)] = 100
    forks_max: Annotated[int, Row("Copies one fork may make.", least=1, most=1000)] = 100
    snapshots_per_workspace: Annotated[int, Row("Snapshots a workspace may have.", least=1)] = 100
    snapshot_bytes_max: Annotated[int, Row("Largest memory and files a snapshot may have.", least=1024)] = 8 * 1024**3
    templates_per_workspace: Annotated[int, Row("Templates a workspace may have built.", least=1)] = 50
    builds_at_once: Annotated[int, Row("Template builds an API worker runs at a time; others wait.", least=1)] = 1
    build_timeout_s: Annotated[float, Row("Time a template build may take.", least=1)] = 1800.0
    build_log_bytes_max: Annotated[int, Row("What is kept of a build's log; the rest is dropped.", least=1024)] = (
        4 * 1024**2
    )
    machines_max: Annotated[int, Row("Sandboxes this host runs at once, of all workspaces.", least=1)] = 500
    memory_reserve_mib: Annotated[
        int, Row("Memory that must stay available on the host for another sandbox to be started.", least=0)
    ] = 512
    disk_reserve_mib: Annotated[
        int, Row("Disk that must stay available on the host for another sandbox to be started.", least=0)
    ] = 2048
    pool_size: Annotated[int, Row("Network links and disks kept ready for the next sandboxes.", least=0, most=256)] = 4
    pool_ready: Annotated[
        int, Row("Sandboxes of the default shape kept booted and frozen, ready to be handed out.", least=0, most=1000)
    ] = 2
    pool_ready_max: Annotated[
        int, Row("Most kept ready per shape while many are asked for; 0: none of any.", least=0, most=1000)
    ] = 16
    pool_shells: Annotated[
        int, Row("Shells kept for restores and forks: created, with nothing running in them.", least=0, most=1000)
    ] = 5
    pool_shells_max: Annotated[
        int, Row("Most shells per shape while many are asked for; 0: none of any.", least=0, most=1000)
    ] = 24
    pool_thawed: Annotated[
        int, Row("Of the ready ones, so many per shape are not frozen; each uses 2 % of a core.", least=0, most=1000)
    ] = 0
    pool_memory_share: Annotated[
        float, Row("Share of the host's memory that all of these may take.", least=0, most=1)
    ] = 0.25
    backing_mib: Annotated[
        int,
        Row(
            "Memory kept backed by the hypervisor for saves, restores and starts, where that helps; at most a 16th of"
            " the host's; 0: none.",
            least=0,
        ),
    ] = 1024
    reclaim_after_s: Annotated[
        float, Row("How long a sandbox is frozen before its memory is given back; its next wake takes longer.", least=0)
    ] = 10.0
    hibernate_after_s: Annotated[
        float, Row("How long a sandbox is frozen before it is written to disk, unless it says otherwise.", least=0)
    ] = 600.0
    hibernate_below_mib: Annotated[
        int, Row("Free memory below which frozen sandboxes are written to disk, the longest frozen first.", least=0)
    ] = 1024
    wake_timeout_s: Annotated[float, Row("How long waking a sandbox may take on its host.", least=1)] = 30.0
    images_mib_max: Annotated[
        int, Row("What snapshots and sandboxes written to disk may take of it, together.", least=1)
    ] = 65_536
    pack_after_s: Annotated[
        float, Row("How long nobody has needed a snapshot before it is compressed; it is unpacked by itself.", least=0)
    ] = 3600.0
    address_range: Annotated[
        str, Row("IPv4 network sandboxes get their addresses from; each instance on a host takes a /19 of it.")
    ] = "198.18.0.0/15"
    egress_allow: Annotated[
        str, Row("Private networks sandboxes may reach all the same, e.g. `10.1.0.0/16, 192.168.7.9/32`.")
    ] = ""
    resolvers: Annotated[str, Row("Name servers for sandboxes, comma-separated; empty: those of the host.")] = ""
    rcu_expedited: Annotated[
        bool, Row("Have the host's kernel end its RCU grace periods at once, for good: starts take half the time.")
    ] = True
    drain_timeout_s: Annotated[float, Row("Time open requests get to end when the server stops.", least=0)] = 5.0
    ready_timeout_s: Annotated[float, Row("Time a part of the server may take to start.", least=1)] = 60.0

    @property
    def run_dir(self) -> Path:
        """Where the sockets are: below `home`, or a short path made from it when that would be too long to bind."""
        path = self.home.absolute() / "run"
        if len(os.fsencode(path)) <= _RUN_DIR_BYTES_MAX:
            return path
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        return Path(f"/run/sandgate-{digest}") if os.geteuid() == 0 else Path(f"/tmp/sandgate-{digest}")  # noqa: S108

    @property
    def hostd_socket(self) -> Path:
        return self.run_dir / "hostd.sock"

    @property
    def api_socket(self) -> Path:
        return self.run_dir / "api.sock"

    @property
    def plane_socket(self) -> Path:
        return self.run_dir / "plane.sock"

    @property
    def orders_socket(self) -> Path:
        return self.run_dir / "super.sock"

    @property
    def lmdb_dir(self) -> Path:
        return self.home / "lmdb"

    @property
    def credentials_file(self) -> Path:
        return self.home / "credentials.json"

    @property
    def effective_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home.absolute() / 'sandgate.db'}"

    @property
    def effective_workers(self) -> int:
        return self.workers or min(len(os.sched_getaffinity(0)), 2)

    @property
    def listeners(self) -> tuple[str, ...]:
        """The settings that hold addresses to listen on."""
        return ("listen", "admin_listen", *(("tls_listen",) if self.tls_listen else ()))

    @property
    def origin(self) -> str:
        """Where clients find the server, without a trailing slash."""
        if self.public_url:
            return self.public_url.rstrip("/")
        if self.tls_listen:
            # By name: certificates are seldom made out to addresses.
            port = split_address(_of_network(self.tls_listen)[0])[1]
            return f"https://{self.domain}" + ("" if port == _HTTPS_PORT else f":{port}")
        host, port = split_address(_of_network(self.listen)[0])
        reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
        return f"http://{reachable}:{port}"

    @property
    def https_port(self) -> int:
        """Where clients find https: the port of the origin if that is https."""
        origin = urlsplit(self.origin)
        return origin.port or _HTTPS_PORT

    @property
    def api_base_url(self) -> str:
        """What a MIOSA client is given as its base URL."""
        return f"{self.origin}/api/v1"

    @property
    def listen_socket_ids(self) -> tuple[int | None, int | None]:
        """User and group of the public Unix sockets; None: the server's own. Raises KeyError for an unknown name."""
        user, _, group = self.listen_socket_owner.partition(":")
        return pwd.getpwnam(user).pw_uid if user else None, grp.getgrnam(group).gr_gid if group else None

    def environment(self) -> dict[str, str]:
        """The same settings as environment variables, for the server's child processes."""
        return {env_name(name): "never" if value is None else str(value) for name, value in asdict(self).items()}


@functools.cache
def table() -> dict[str, tuple[Any, Row]]:
    """Every setting's type and row, by name, in the order of the documentation."""
    hints = typing.get_type_hints(Settings, include_extras=True)
    return {name: typing.get_args(hint) for name, hint in hints.items()}


def env_name(name: str) -> str:
    """The environment variable of a setting."""
    return f"SANDGATE_{name.upper()}"


def socket_path(address: str) -> Path | None:
    """The path of `unix:/path`; None for an address of the network. Raises ValueError if it cannot be bound."""
    scheme, colon, path = address.partition(":")
    if scheme != "unix" or not colon:
        return None
    if not path.startswith("/") or len(os.fsencode(path)) > _SOCKET_PATH_BYTES_MAX:
        raise ValueError(f"{address!r} is not unix: and an absolute path of at most {_SOCKET_PATH_BYTES_MAX} bytes")
    return Path(path)


def _of_network(addresses: str) -> list[str]:
    return [address for address in words(addresses) if socket_path(address) is None]


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` in its parts. Raises ValueError if it is neither."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ValueError(f"{address!r} is not host:port")
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1], int(port)
    if ":" in host:
        raise ValueError(f"{address!r}: an IPv6 address goes in brackets")
    return host, int(port)


def load(environ: Mapping[str, str], overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read the settings.

    overrides: settings by name, from the command line; they win.
    Raises SettingsError for a value that cannot be, an unknown key in the TOML file, or a file that cannot be read.
    """
    flags = {} if overrides is None else overrides
    from_file = _read_toml(environ.get("SANDGATE_CONFIG", ""))
    values: dict[str, Any] = {}
    for name, (kind, row) in table().items():
        if flags.get(name) is not None:
            values[name] = _parse(kind, row, flags[name], f"--{name.replace('_', '-')}")
        elif env_name(name) in environ:
            values[name] = _parse(kind, row, environ[env_name(name)], env_name(name))
        elif name in from_file:
            values[name] = _parse(kind, row, from_file[name], f"SANDGATE_CONFIG: {name}")
    if unknown := from_file.keys() - table().keys():
        raise SettingsError(f"SANDGATE_CONFIG: no such setting: {', '.join(sorted(unknown))}")
    settings = Settings(**values)
    settings = replace(settings, home=settings.home.absolute(), cache=settings.cache.absolute())
    _check_together(settings)
    return settings


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """`SANDGATE_*` variables that name no setting: most likely misspelt."""
    known = {env_name(name) for name in table()} | {"SANDGATE_CONFIG"}
    return sorted(name for name in environ if name.startswith("SANDGATE_") and name not in known)


def make_private_dir(path: Path) -> None:
    """Make a directory only its owner can enter; one that exists is narrowed."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


def _read_toml(path: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"SANDGATE_CONFIG={path}: {error}") from error


def _parse(kind: Any, row: Row, raw: Any, source: str) -> Any:
    text = str(raw).strip()
    try:
        value = _convert(kind, text)
    except ValueError as error:
        raise SettingsError(f"{source}={text}: {error}") from None
    if row.choices and value not in row.choices:
        raise SettingsError(f"{source}={text}: must be one of {', '.join(row.choices)}")
    # Written so that NaN fails too.
    if row.least is not None and value is not None and not value >= row.least:
        raise SettingsError(f"{source}={text}: must be at least {row.least}")
    if row.most is not None and value is not None and not value <= row.most:
        raise SettingsError(f"{source}={text}: must be at most {row.most}")
    return value


def _convert(kind: Any, text: str) -> Any:
    if isinstance(kind, types.UnionType):  # the only one in the table: a type or None
        return None if text.lower() in {"", "never"} else _convert(typing.get_args(kind)[0], text)
    if kind is bool:
        if text.lower() not in _TRUE | _FALSE:
            raise ValueError("must be true or false")
        return text.lower() in _TRUE
    if kind in {int, float}:
        try:
            return kind(text)
        except ValueError:
            raise ValueError("must be a whole number" if kind is int else "must be a number") from None
    return kind(text)


def _check_together(settings: Settings) -> None:
    _check_listeners(settings)
    _check_networks(settings)
    _check_origins(settings)
    _check_tls(settings)
    for name in ("cpu_count", "memory_mib", "disk_mib"):
        if getattr(settings, f"sandbox_{name}") > getattr(settings, f"sandbox_{name}_max"):
            raise SettingsError(f"{env_name(f'sandbox_{name}')} is over {env_name(f'sandbox_{name}_max')}")
    if settings.sandbox_timeout_s > settings.sandbox_timeout_max_s:
        raise SettingsError("SANDGATE_SANDBOX_TIMEOUT_S is over SANDGATE_SANDBOX_TIMEOUT_MAX_S")
    if settings.public_url and not settings.public_url.startswith(("http://", "https://")):
        raise SettingsError(f"SANDGATE_PUBLIC_URL={settings.public_url}: must start with http:// or https://")


def _check_origins(settings: Settings) -> None:
    for origin in words(settings.api_origins):
        parts = urlsplit(origin)
        if origin != "*" and (parts.scheme not in {"http", "https"} or origin != f"{parts.scheme}://{parts.netloc}"):
            raise SettingsError(f"SANDGATE_API_ORIGINS: {origin} is not an origin such as https://app.example.com")


def _check_tls(settings: Settings) -> None:
    if bool(settings.tls_listen) != bool(settings.tls_dir):
        raise SettingsError("SANDGATE_TLS_LISTEN and SANDGATE_TLS_DIR go together")
    if settings.https_redirect and not settings.origin.startswith("https://"):
        raise SettingsError("SANDGATE_HTTPS_REDIRECT needs SANDGATE_TLS_LISTEN, or SANDGATE_PUBLIC_URL with https://")


def _check_listeners(settings: Settings) -> None:
    taken: dict[str, str] = {}
    for name in settings.listeners:
        addresses = words(getattr(settings, name))
        if not addresses:
            raise SettingsError(f"{env_name(name)} is empty")
        for address in addresses:
            try:
                is_shareable = socket_path(address) is None and split_address(address)[1] == 0
            except ValueError as error:
                raise SettingsError(f"{env_name(name)}: {error}") from None
            if address in taken and not is_shareable:
                raise SettingsError(f"{env_name(name)} must differ from {env_name(taken[address])}: {address}")
            taken[address] = name
    try:
        split_address(settings.admin_listen)
    except ValueError as error:
        raise SettingsError(f"SANDGATE_ADMIN_LISTEN: {error}") from None
    if not settings.public_url and not _of_network(settings.tls_listen or settings.listen):
        raise SettingsError("SANDGATE_PUBLIC_URL is needed when clients are served by Unix sockets alone")
    _check_sockets(settings)


def _check_sockets(settings: Settings) -> None:
    try:
        mode_is_possible = 0 <= int(settings.listen_socket_mode, 8) <= 0o777
    except ValueError:
        mode_is_possible = False
    if not mode_is_possible:
        raise SettingsError(f"SANDGATE_LISTEN_SOCKET_MODE={settings.listen_socket_mode}: must be octal, such as 660")
    try:
        settings.listen_socket_ids  # noqa: B018 - raises for names that are unknown
    except KeyError as error:
        raise SettingsError(f"SANDGATE_LISTEN_SOCKET_OWNER: {error.args[0]}") from None


def _check_networks(settings: Settings) -> None:
    kinds: dict[str, Callable[[str], object]] = {
        "address_range": IPv4Network,
        "egress_allow": IPv4Network,
        "resolvers": IPv4Address,
        "trusted_proxies": lambda part: part == "unix" or ip_network(part, strict=False),
    }
    for name, kind in kinds.items():
        for part in words(getattr(settings, name)):
            try:
                kind(part)
            except ValueError as error:
                raise SettingsError(f"{env_name(name)}: {error}") from None
    if IPv4Network(settings.address_range).prefixlen > 19:
        raise SettingsError(f"{env_name('address_range')}={settings.address_range}: must be a /19 or larger")


def words(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated setting."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def as_markdown() -> str:
    """The table of docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Each setting is an environment variable. The TOML file named by `SANDGATE_CONFIG` takes the same names in",
        "lower case, without the prefix; `sandgate serve --help` lists those that have a flag. A flag wins over the",
        "environment, the environment over the file. Durations are in seconds, sizes in bytes unless the name says",
        "otherwise.",
        "",
        "| variable | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, (kind, row) in table().items():
        default = getattr(Settings(), name)
        shown = "" if default == "" else f"`{'never' if default is None else default}`"
        spelt = (
            " or ".join(row.choices) or (kind if isinstance(kind, type) else typing.get_args(kind)[0]).__name__.lower()
        )
        lines.append(f"| `{env_name(name)}` | {spelt} | {shown} | {row.meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
