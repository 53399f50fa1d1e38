"""The providers of the soak: those of all tests, and one that never accepts a connection."""

from __future__ import annotations

import socket
from pathlib import Path

from ..integration.fake_providers import FakeProviders

#: What the live provider answers at once.
MODEL = "success.soak"


class Backends:
    """Providers that answer, that never answer, that never accept, and that are not there."""

    def __init__(self, folder: Path) -> None:
        """Start them; certificates are put into ``folder``."""
        self._fakes = FakeProviders(folder)
        self.live = self._fakes.host()
        self.mute = self._fakes.raw("silent")
        self.closed = self._fakes.host("refused")
        deaf = socket.create_server(("127.0.0.1", 0), backlog=0)
        self._sockets = [deaf]
        for _ in range(2):  # its queue is full then, and who connects is not even told
            full = socket.socket()
            full.setblocking(False)
            full.connect_ex(deaf.getsockname())
            self._sockets.append(full)
        self.silent = "http://{}:{}".format(*deaf.getsockname())

    def close(self) -> None:
        """Close all of them."""
        self._fakes.close()
        for one in self._sockets:
            one.close()

    def hang_up(self) -> None:
        """Close the connections that were kept for further requests."""
        self._fakes.hang_up()
