"""What tests of handshakes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mooncache.discovery.listener import Listener
from tests.discovery.handshakes import echo


@pytest.fixture
def listeners() -> Iterator[Callable[..., Listener]]:
    """Makes listeners, that answer anybody unless told otherwise, and closes them all."""
    made: list[Listener] = []

    def make(bind: str = "127.0.0.1:0", **options: Any) -> Listener:
        usual = {"secret": None, "insecure": "secret" not in options, "name": "answering", "serve": echo}
        made.append(Listener(bind, **{**usual, **options}))
        return made[-1]

    yield make
    for each in made:
        each.close()
