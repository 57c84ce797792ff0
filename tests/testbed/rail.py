"""A cable between the two guests, with an RDMA device at each end, as the tests on the left see it."""

from __future__ import annotations

from dataclasses import dataclass

from tests.testbed.network import Link, set_link
from tests.testbed.peer import Peer


@dataclass(frozen=True)
class Rail:
    """One of them. Its ends can be pulled and plugged in again, here and there."""

    link: Link
    peer: Peer

    @property
    def device(self) -> str:
        """The RDMA device on it, of the same name at both ends."""
        return self.link.device

    @property
    def here(self) -> str:
        """IPv4 address of this end."""
        return self.link.address("left")

    @property
    def there(self) -> str:
        """IPv4 address of the other end."""
        return self.link.address("right")

    def pull_here(self) -> None:
        """Take this guest's end down."""
        set_link(self.link.name, False)

    def pull_there(self) -> None:
        """Take the other guest's end down."""
        self.peer.set_link(self.link.name, False)

    def plug_in_here(self) -> None:
        """This guest's end is up."""
        set_link(self.link.name, True)

    def plug_in_there(self) -> None:
        """The other guest's end is up."""
        self.peer.set_link(self.link.name, True)
