"""What has to be there before the server's processes start: directories, database, a key.

Everything here may be done again; what is there already is left alone.
"""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import orjson
import sqlalchemy as sa

from gateway.children import StartError
from gateway.engine.secrets import PREFIX_LENGTH, digest, make_secret
from gateway.resources import ApiKey
from gateway.settings import FIRST_WORKSPACE, Settings, make_private_dir
from gateway.store import keys, migrate, workspaces
from gateway.store.database import sqlite_engine
from native import BinaryMissing, agent_path
from vmm.templates.store import TemplateStore


@dataclass(frozen=True, slots=True)
class Credentials:
    """What credentials.json holds."""

    base_url: str
    api_key: str


def prepare(settings: Settings) -> Credentials:
    """Make what is missing. Blocks, for well below a second. Raises StartError."""
    if settings.driver == "gvisor" and os.geteuid() != 0:
        raise StartError("Running gVisor sandboxes takes root: `sudo -E sandgate serve`.")
    for directory in (settings.home, settings.run_dir, settings.lmdb_dir, settings.home / "host"):
        make_private_dir(directory)
    _forget_volatile_state(settings)
    try:
        migrate(settings.effective_database_url)
    except ValueError as error:
        raise StartError(f"SANDGATE_DATABASE_URL: {error}") from error
    return ensure_credentials(settings)


def missing_templates(settings: Settings) -> list[str]:
    """Names of templates that have not been built yet."""
    try:
        return [recipe.name for recipe in TemplateStore(settings.cache, agent_path()).missing()]
    except BinaryMissing as error:
        raise StartError(str(error)) from error


def ensure_credentials(settings: Settings) -> Credentials:
    """The key in credentials.json; a new one, in a workspace of its own, if that file or its key is gone."""
    database = Path(sa.make_url(settings.effective_database_url).database or "")
    engine = sqlite_engine(database)
    try:
        with engine.begin() as connection:
            secret = _known_secret(settings.credentials_file)
            if secret is None or keys.get_by_hash(connection, digest(secret)) is None:
                secret = _make_key(connection)
            credentials = Credentials(settings.api_base_url, secret)
            # Before the commit: a key that exists and that nobody knows is worse than a file that is written again.
            _write_private(settings.credentials_file, credentials)
    finally:
        engine.dispose()
    return credentials


def _make_key(connection: sa.Connection) -> str:
    secret = make_secret("msk_live_")
    key = ApiKey(
        id=str(uuid.uuid4()),
        workspace_id=workspaces.ensure(connection, FIRST_WORKSPACE),
        name="first key",
        prefix=secret[:PREFIX_LENGTH],
        scopes=(),
        created_at=time.time(),
        expires_at=None,
        last_used_at=None,
    )
    keys.insert(connection, key, secret_hash=digest(secret), is_test=False)
    return secret


def _known_secret(path: Path) -> str | None:
    try:
        secret = orjson.loads(path.read_bytes())["api_key"]
    except (FileNotFoundError, orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return secret if isinstance(secret, str) else None


def _write_private(path: Path, credentials: Credentials) -> None:
    text = orjson.dumps(credentials, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    draft = path.with_suffix(".json.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)


def _forget_volatile_state(settings: Settings) -> None:
    """Rate limits and the like are not flushed to disk: after a power cut their files may be torn."""
    for name in ("limits", "undelivered"):
        for path in (settings.lmdb_dir / name).glob("*.mdb"):
            path.unlink()
