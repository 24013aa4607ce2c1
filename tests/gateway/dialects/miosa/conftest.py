"""The whole API in one process: real phases, engine, stores and hostd; the machines behind it are fake ones."""

from __future__ import annotations

import re
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import orjson
import pytest

from gateway import endpoint
from gateway.auth import Authenticator
from gateway.dialects.miosa import MiosaDialect, openapi
from gateway.dialects.miosa.routes import FAMILIES, ROUTES
from gateway.engine import Engine
from gateway.engine.secrets import digest, make_secret
from gateway.entry import BodyLimits, Entry, Mounted
from gateway.idempotency import IdempotencyStore
from gateway.limits import Budget, Limits
from gateway.phases import Phases, Terms
from gateway.resources import ApiKey, Principal
from gateway.store import Database, keys, migrate, open_database
from gateway.undelivered import Undelivered
from tests.gateway.engine.conftest import driver, engine, pool, principal, routes, settings  # noqa: F401
from tests.previews.harness import Plane
from tests.support.asgi import StreamingTransport
from tests.support.asgi_server import serving

RATE_LIMIT = 500

_DOCUMENT = openapi.document(FAMILIES)
#: Route patterns of the document, in the order of matching.
_PATTERNS = [
    (
        route.method,
        re.compile("/api/v1" + re.sub(r"{\w+:path}", ".+", re.sub(r"{\w+}", "[^/]+", route.path))),
        _DOCUMENT["paths"][route.path.replace(":path", "")][route.method.lower()],
    )
    for route in ROUTES
]


async def check_contract(response: httpx.Response) -> None:
    """Fail unless the answer is what the OpenAPI document promises."""
    request = response.request
    operation = next(
        (one for method, path, one in _PATTERNS if method == request.method and path.fullmatch(request.url.path)), None
    )
    if operation is None or response.headers.get("content-type") != "application/json":
        return
    promised = operation["responses"].get(str(response.status_code))
    if promised is None:
        assert response.status_code >= 400 or request.url.path.endswith(("/exec", "/commands")), response.status_code
        promised = _DOCUMENT["components"]["responses"]["Error"] if response.status_code >= 400 else {}
    schema = promised.get("content", {}).get("application/json", {}).get("schema")
    if schema is not None:
        await response.aread()
        jsonschema.validate(orjson.loads(response.content), {**schema, "components": _DOCUMENT["components"]})


async def make_key(database: Database, principal: Principal, **fields: Any) -> str:  # noqa: F811
    """The secret of a new key."""
    secret = make_secret("msk_live_")
    given = {"scopes": (), "expires_at": None, "last_used_at": None, "created_at": 0.0, **fields}
    key = ApiKey(str(uuid.uuid4()), principal.workspace_id, "test", secret[:14], **given)
    await database.write(partial(keys.insert, key=key, secret_hash=digest(secret), is_test=False))
    return secret


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("database") / "sandgate.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
async def database(tmp_path: Path, empty_database: Path) -> AsyncIterator[Database]:
    database = open_database(f"sqlite:///{shutil.copy(empty_database, tmp_path / 'sandgate.db')}")
    yield database
    await database.close()


@pytest.fixture
async def key(database: Database, principal: Principal) -> str:  # noqa: F811
    return await make_key(database, principal)


@pytest.fixture
async def app(tmp_path: Path, database: Database, engine: Engine) -> AsyncIterator[Entry]:  # noqa: F811
    limits = Limits(tmp_path / "limits")
    idempotency = IdempotencyStore(tmp_path / "idempotency", ttl_s=3600, answer_bytes_max=1_000_000)
    undelivered = Undelivered(tmp_path / "undelivered", answer_bytes_max=1_000_000)
    phases = Phases(
        engine=engine,
        authenticator=Authenticator(database, limits, failures=None),
        limits=limits,
        idempotency=idempotency,
        undelivered=undelivered,
        terms=Terms(request_timeout_s=20, idempotency_wait_s=5, budget=Budget(RATE_LIMIT), is_access_logged=False),
    )
    dialect = MiosaDialect()
    mounted = Mounted(dialect, dialect.prefix, endpoint.routes(phases, dialect))
    yield Entry([mounted], own={}, limits=BodyLimits(16 * 1024**2, 2 * 1024**3))
    await phases.drain(1)
    for part in (limits, idempotency, undelivered):
        part.close()


@pytest.fixture
async def api(app: Entry, key: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a key; every JSON answer it gets is checked against the OpenAPI document."""
    async with httpx.AsyncClient(
        transport=StreamingTransport(app),
        base_url="http://api.test/api/v1",
        headers={"authorization": f"Bearer {key}", "user-agent": "test"},
        event_hooks={"response": [check_contract]},
        timeout=10,
    ) as client:
        yield client


@pytest.fixture
async def front(app: Entry, api: httpx.AsyncClient, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """The same client as `api`, with a real plane before the API: it makes the streams that the API only orders."""
    # Sockets need a short name.
    with tempfile.TemporaryDirectory(prefix="sg-") as name:
        plane = Plane(Path(name))
        async with serving(app, plane.api_socket):
            await plane.start("--hostd-socket", str(tmp_path / "hostd.sock"))
            base_url = f"http://{plane.address[0]}:{plane.address[1]}/api/v1"
            async with httpx.AsyncClient(base_url=base_url, headers=api.headers, timeout=10, trust_env=False) as client:
                yield client
            await plane.stop()


@pytest.fixture
async def sandbox(api: httpx.AsyncClient) -> str:
    """The path of a running sandbox."""
    answer = await api.post("/sandboxes", json={})
    assert answer.status_code == 201, answer.text
    return f"/sandboxes/{answer.json()['id']}"
