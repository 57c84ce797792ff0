"""The sockets whose end a provider wants to hear of, and the eventfd by which its workers report trouble."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable

from mooncache import forks


class Watcher:
    """Waits for trouble, and for the end of sockets. One thread waits; others may call the rest meanwhile.

    Attributes:
        trouble_fd: eventfd for workers to write to; -1 once it is closed.
        sockets: what is watched by its descriptor, and what is called at its end.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = False
        self.sockets: dict[int, tuple[socket.socket, Callable[[], None]]] = {}
        self.trouble_fd, self._epoll = -1, select.epoll()
        forks.private(self)
        try:
            self.trouble_fd = os.eventfd(0, os.EFD_CLOEXEC)
            self._epoll.register(self.trouble_fd, select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    def watch(self, sock: socket.socket, ended: Callable[[], None]) -> None:
        """Have `ended` called, once, when the peer's end of a socket closes; then that is closed here, too."""
        with self._lock:
            if self._stopped:
                sock.close()
                return
            self.sockets[sock.fileno()] = sock, ended
            self._epoll.register(sock.fileno(), select.EPOLLIN | select.EPOLLRDHUP)

    def unwatch(self, sock: socket.socket) -> None:
        """Close a socket that was watched; `ended` may be called a last time."""
        with self._lock:
            if self.sockets.pop(sock.fileno(), None) is not None:
                self._epoll.unregister(sock.fileno())
            sock.close()

    def wait(self, seconds: float | None) -> None:
        """Wait for trouble or the end of a socket, whose `ended` is called; for so long at most, or for ever."""
        for descriptor, _ in self._epoll.poll(seconds):
            if descriptor == self.trouble_fd:
                os.eventfd_read(descriptor)
            else:
                self._hung_up(descriptor)

    def _hung_up(self, descriptor: int) -> None:
        with self._lock:
            sock, ended = self.sockets.get(descriptor, (None, None))
            if sock is None or ended is None or not has_ended(sock):  # closed meanwhile, and its number another's
                return
        self.unwatch(sock)
        ended()

    def stir(self) -> None:
        """Let the thread that waits come back."""
        if self.trouble_fd >= 0:
            os.eventfd_write(self.trouble_fd, 1)

    def stop(self) -> None:
        """Watch nothing new, and let the thread that waits come back."""
        with self._lock:
            self._stopped = True
        self.stir()

    def close(self) -> None:
        """Close everything. Nobody waits any more."""
        self._epoll.close()
        descriptor, self.trouble_fd = self.trouble_fd, -1
        forks.drop([descriptor])
        for sock, _ in self.sockets.values():
            sock.close()
        self.sockets.clear()

    def disown(self) -> None:
        """Close the descriptors in a forked child; sockets do so by themselves; see `forks.Holder`."""
        self._stopped = True
        self._epoll.close()
        forks.drop([self.trouble_fd])


def has_ended(sock: socket.socket) -> bool:
    """Return whether there is anything to read from a socket over which nothing more is said: its end."""
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
