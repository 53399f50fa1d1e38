"""The providers of the soak."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable


class Backends:
    """Providers that answer, that never answer, that never accept, and that are not there."""

    def __init__(self) -> None:
        self._servers: list[asyncio.Server] = []
        self._sockets: list[socket.socket] = []
        self._open: set[asyncio.StreamWriter] = set()
        self.live = self.mute = self.silent = self.closed = ""

    async def start(self) -> None:
        """Open all of them."""
        self.live = await self._serve(self._answer)
        self.mute = await self._serve(self._swallow)
        deaf = socket.create_server(("127.0.0.1", 0), backlog=0)
        self._sockets.append(deaf)
        for _ in range(2):  # its queue is full then, and who connects is not even told
            full = socket.socket()
            full.setblocking(False)
            full.connect_ex(deaf.getsockname())
            self._sockets.append(full)
        self.silent = "http://{}:{}".format(*deaf.getsockname())
        bound = socket.socket()  # it never listens, and nobody else gets its port
        bound.bind(("127.0.0.1", 0))
        self._sockets.append(bound)
        self.closed = "http://{}:{}".format(*bound.getsockname())

    async def stop(self) -> None:
        """Close all of them."""
        for server in self._servers:
            server.close()
        for one in self._sockets:
            one.close()

    def hang_up(self) -> None:
        """Close the connections that were kept for further requests."""
        for writer in self._open:
            writer.close()

    async def _serve(self, handler: Callable[..., Awaitable[None]]) -> str:
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        self._servers.append(server)
        return "http://{}:{}".format(*server.sockets[0].getsockname())

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = head.partition(b"content-length:")[2].split(b"\r\n")[0]
                await reader.readexactly(int(length or 0))
                body = json.dumps({"response": "OK", "done": True}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
                writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self._open.discard(writer)
        writer.close()

    async def _swallow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while await reader.read(65536):
                pass
        writer.close()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])
