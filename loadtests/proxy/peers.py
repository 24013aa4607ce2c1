"""The proxies: the plane and those it is compared with, each with the settings that suit it best.

All route by the Host header from the same table and keep connections to the origin. None writes an access log. The
plane alone checks a token and counts per request. Where the settings come from: docs/performance.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from loadtests.proxy import control
from loadtests.proxy.loadgen import ROOT, Origin
from loadtests.proxy.processes import cores, free_port, listening, running

PLANE = ROOT / "native" / "bin" / "sandgate-plane"
_NCHAN = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")
#: Records pushed at once.
_BATCH = 500


@dataclass(frozen=True, slots=True)
class Site:
    """What a proxy is to serve. Routes are host names without a port; certificate and key only for TLS."""

    directory: Path
    origin: Origin
    slugs: Sequence[str]
    certificate: Path | None = None
    key: Path | None = None

    def host(self, slug: str) -> str:
        """The host of a sandbox's preview; its port is the origin's."""
        return f"{self.origin.http}-{slug}.sandbox.localhost"

    @property
    def hosts(self) -> list[str]:
        return [self.host(slug) for slug in self.slugs]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A running proxy. pid none: no process is measured. control, api: the plane's sockets."""

    port: int
    pid: int | None
    control: Path | None = None
    api: Path | None = None


Start = Callable[[Site], AbstractAsyncContextManager[Endpoint]]


def plane(program: Path = PLANE) -> Start:
    """The plane with one worker."""

    @contextlib.asynccontextmanager
    async def start(site: Site) -> AsyncIterator[Endpoint]:
        port, directory = free_port(), site.directory
        sockets = {"control": directory / f"plane-{port}.sock", "api": directory / f"api-{port}.sock"}
        listen: list[str | os.PathLike[str]] = ["--listen", f"127.0.0.1:{port}"]
        if site.certificate is not None:
            listen = ["--listen", "127.0.0.1:0", "--tls-listen", f"127.0.0.1:{port}"]
            listen += ["--tls-dir", site.certificate.parent]
        command = (
            program,
            *listen,
            *("--api-socket", sockets["api"], "--control-socket", sockets["control"]),
            *("--workers", "1", "--die-with-parent"),
            *("--connections-max", "40000", "--client-connections-max", "40000"),
            *("--sandbox-connections-max", "40000"),
        )
        log = directory / f"plane-{port}.log"
        async with running(command, core=cores()[0], log=log) as process:
            await listening(port, process, log)
            async with control.connected(sockets["control"]) as api:
                for at in range(0, len(site.slugs), _BATCH):
                    await api.push([control.sandbox_record(slug) for slug in site.slugs[at : at + _BATCH]])
            yield Endpoint(port, process.pid, sockets["control"], sockets["api"])

    return start


def nginx(*, buffer_kib: int = 128) -> Start:
    """nginx with one worker, buffers of so much, a keep-alive pool towards the origin, and nchan if it is there."""

    @contextlib.asynccontextmanager
    async def start(site: Site) -> AsyncIterator[Endpoint]:
        port = free_port()
        config = site.directory / f"nginx-{port}.conf"
        config.write_text(_nginx_config(site, port, buffer_kib))
        log = site.directory / f"nginx-{port}.log"
        command = ("nginx", "-p", site.directory, "-c", config, "-e", log)
        async with running(command, core=cores()[0], log=log) as process:
            await listening(port, process, log)
            yield Endpoint(port, process.pid)

    return start


def _nginx_config(site: Site, port: int, buffer_kib: int) -> str:
    temporary = "".join(
        f"  {kind}_temp_path {site.directory}/nginx-{kind}-{port};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    routes = "".join(f"    {host} origin;\n" for host in site.hosts)
    tls = ""
    if site.certificate is not None:
        tls = f"ssl_certificate {site.certificate}; ssl_certificate_key {site.key}; ssl_protocols TLSv1.3;"
    channels = """
    location = /events { nchan_subscriber eventsource; nchan_channel_id bench; nchan_subscriber_first_message newest; }
    location = /publish { nchan_publisher; nchan_channel_id bench; nchan_message_buffer_length 100; }"""
    return f"""
{f"load_module {_NCHAN};" if _NCHAN.exists() else ""}
daemon off;
user root;
pid {site.directory}/nginx-{port}.pid;
worker_processes 1;
worker_rlimit_nofile 20000;
events {{ worker_connections 20000; }}
http {{
  access_log off;
  keepalive_timeout 75; keepalive_requests 1000000000;
{temporary}
  map_hash_max_size 262144; map_hash_bucket_size 256;
  map $http_upgrade $connection_out {{ default upgrade; '' ''; }}
  map $host $backend {{
{routes}  }}
  upstream origin {{
    server 127.0.0.1:{site.origin.http};
    keepalive 512; keepalive_requests 1000000000;
  }}
  proxy_http_version 1.1;
  proxy_buffering off; proxy_buffer_size {buffer_kib}k; proxy_buffers 8 {buffer_kib}k;
  proxy_busy_buffers_size {buffer_kib}k; proxy_read_timeout 3600;
  proxy_set_header Host $host;
  proxy_set_header Connection $connection_out;
  proxy_set_header Upgrade $http_upgrade;
  proxy_set_header X-Forwarded-For $remote_addr;
  proxy_set_header X-Forwarded-Proto $scheme;
  proxy_set_header X-Forwarded-Host $host;
  proxy_set_header X-Real-IP $remote_addr;
  server {{
    listen 127.0.0.1:{port}{" ssl" if tls else ""} backlog=16384;
    {tls}
    location / {{ proxy_pass http://$backend; }}{channels if _NCHAN.exists() else ""}
  }}
}}
"""


def haproxy() -> Start:
    """HAProxy with one thread; without `http-no-delay` it would hold small pieces of streams back."""

    @contextlib.asynccontextmanager
    async def start(site: Site) -> AsyncIterator[Endpoint]:
        port = free_port()
        routes = site.directory / f"haproxy-{port}.map"
        routes.write_text("".join(f"{host} origin\n" for host in site.hosts))
        config = site.directory / f"haproxy-{port}.cfg"
        config.write_text(f"""
global
  nbthread 1
  maxconn 8000
defaults
  mode http
  option http-no-delay
  option forwardfor
  http-reuse always
  timeout connect 5s
  timeout client 3600s
  timeout server 3600s
  timeout tunnel 3600s
frontend public
  bind 127.0.0.1:{port}
  http-request set-header X-Forwarded-Proto http
  http-request set-header X-Forwarded-Host %[req.hdr(host)]
  http-request set-header X-Real-IP %[src]
  use_backend %[req.hdr(host),field(1,:),lower,map({routes},none)]
backend none
  http-request return status 404
backend origin
  server origin 127.0.0.1:{site.origin.http}
""")
        log = site.directory / f"haproxy-{port}.log"
        async with running(("haproxy", "-db", "-q", "-f", config), core=cores()[0], log=log) as process:
            await listening(port, process, log)
            yield Endpoint(port, process.pid)

    return start


def configurable_http_proxy() -> Start:
    """JupyterHub's proxy, in Node, routing by host."""

    @contextlib.asynccontextmanager
    async def start(site: Site) -> AsyncIterator[Endpoint]:
        port, api_port = free_port(), free_port()
        command = (
            *("configurable-http-proxy", "--ip", "127.0.0.1", "--port", str(port)),
            *("--api-ip", "127.0.0.1", "--api-port", str(api_port), "--host-routing", "--log-level", "error"),
        )
        log = site.directory / f"chp-{port}.log"
        async with running(command, core=cores()[0], log=log) as process:
            await listening(port, process, log)
            await listening(api_port, process, log)
            await _put_routes(api_port, site)
            yield Endpoint(port, process.pid)

    return start


async def _put_routes(port: int, site: Site) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = f'{{"target":"http://127.0.0.1:{site.origin.http}"}}'.encode()
    for host in site.hosts:
        head = f"POST /api/routes/{host} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        if b" 201 " not in answer.splitlines()[0]:
            raise RuntimeError(f"configurable-http-proxy refused a route: {answer!r}")
        # "Transfer-Encoding: chunked" with an empty body.
        await reader.readuntil(b"0\r\n\r\n")
    writer.close()


def websockify(port_of: Callable[[Origin], int]) -> Start:
    """websockify, which speaks plain TCP to the origin's port that `port_of` names."""

    @contextlib.asynccontextmanager
    async def start(site: Site) -> AsyncIterator[Endpoint]:
        port = free_port()
        command = ("websockify", f"127.0.0.1:{port}", f"127.0.0.1:{port_of(site.origin)}")
        log = site.directory / f"websockify-{port}.log"
        async with running(command, core=cores()[0], log=log) as process:
            await listening(port, process, log)
            yield Endpoint(port, process.pid)

    return start


def direct() -> Start:
    """No proxy: what the origin and the load generator do by themselves."""

    @contextlib.asynccontextmanager
    async def start(site: Site) -> AsyncIterator[Endpoint]:
        yield Endpoint(site.origin.http, None)

    return start


@dataclass(frozen=True, slots=True)
class Tool:
    """A program that is not ours: how to install it, and how to ask for its version."""

    install: str
    version: Sequence[str]
    is_present: Callable[[], bool]


def _on_path(program: str) -> Callable[[], bool]:
    return lambda: shutil.which(program) is not None


TOOLS = {
    "nginx": Tool("apt-get install nginx", ("nginx", "-v"), _on_path("nginx")),
    "nchan": Tool(
        "apt-get install libnginx-mod-nchan",
        ("dpkg-query", "-W", "-f", "${Version}", "libnginx-mod-nchan"),
        lambda: _NCHAN.exists() and shutil.which("nginx") is not None,
    ),
    "haproxy": Tool("apt-get install haproxy", ("haproxy", "-v"), _on_path("haproxy")),
    "configurable-http-proxy": Tool(
        "npm install --global configurable-http-proxy",
        ("configurable-http-proxy", "--version"),
        _on_path("configurable-http-proxy"),
    ),
    "websockify": Tool(
        "apt-get install websockify",
        ("dpkg-query", "-W", "-f", "${Version}", "websockify"),
        _on_path("websockify"),
    ),
}


def versions() -> dict[str, str]:
    """The first line that each program says about itself; programs that are missing are left out."""
    said = {"sandgate-plane": _first_line((str(PLANE), "--version"))}
    for name, tool in TOOLS.items():
        if tool.is_present():
            said[name] = _first_line(tool.version)
    return said


def _first_line(command: Sequence[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    return (done.stdout + done.stderr).strip().partition("\n")[0]
