"""A target that answers handshakes as an engine does, and gives the test every lane, to answer as it likes."""

from __future__ import annotations

import queue
import socket
from types import TracebackType
from typing import Any

import numpy as np

from mooncache.descriptor import Descriptor, RemoteRegion
from mooncache.discovery.listener import Listener
from mooncache.discovery.messages import Reply, Request
from mooncache.discovery.record import to_json
from mooncache.providers.stream.lane import FRAMES_VERSION
from tests.helpers import LIMIT


class FakeTarget:
    """One region of `nbytes`, at an address where this process has memory of its own."""

    KEY = 77

    def __init__(self, nbytes: int = 1 << 20, **changes: Any) -> None:
        self.memory = np.zeros(nbytes, np.uint8)
        self.base = int(self.memory.ctypes.data)
        self.changes = changes  # of what it says of itself
        self._lanes: queue.Queue[socket.socket] = queue.Queue()
        self._listener = Listener("127.0.0.1:0", secret=None, insecure=False, name="fake", serve=self._serve)
        self.address, self.unix = self._listener.address, self._listener.unix
        self._made: list[socket.socket] = []

    def _serve(self, request: Request) -> Reply:
        if request.purpose == "describe":
            region = RemoteRegion(self.base, self.memory.nbytes, (self.KEY,), 3)
            record = to_json(Descriptor("fake", 5, self.address, "tcp", (region,), {"lanes": FRAMES_VERSION}))
            return Reply({**record, **self.changes})
        return Reply({}, then=self._take)

    def _take(self, sock: socket.socket) -> None:
        sock.settimeout(LIMIT)
        self._made.append(sock)
        self._lanes.put(sock)

    def lane(self) -> socket.socket:
        """The next lane that an engine opens."""
        return self._lanes.get(timeout=LIMIT)

    def __enter__(self) -> FakeTarget:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        for sock in self._made:
            sock.close()
