from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.discovery.servers import Server


@pytest.fixture(scope="session", params=["redis", "etcd"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(request.param, tmp_path_factory.mktemp(request.param))
    yield server
    server.kill()
