"""One real server for all clients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.server import ServerProcess


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    # Four users of one workspace at once need more than the usual 300 requests a minute.
    with ServerProcess(tmp_path_factory.mktemp("clients"), rate_limit_per_minute=3000) as server:
        yield server
