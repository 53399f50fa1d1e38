"""What the tests of the Web module share: its process, and web servers in threads."""

from __future__ import annotations

import base64
import contextlib
import json
import select
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast
from urllib.parse import urlsplit

from genvm_manager import own_command

from .executor_client import Client
from .module_support import ModuleProcess
from .support import WAIT

HELLO = {"cookie": "w1", "host_data": {"node_address": "0xaa", "tx_id": "0xbb", "zone": "eu"}}


#: What stands before the code of a module that is to know names that no name server knows; the
#: real resolver answers for others.
_WITH_NAMES = """
import json, socket, sys, time
table, real = json.loads(sys.argv.pop(1)), socket.getaddrinfo
def getaddrinfo(host, port, *rest, **options):
    name = str(host).removesuffix(".")
    if not name.endswith(".test"):
        return real(host, port, *rest, **options)
    if not str(host).endswith(".") and "search.test" in table:  # as a search list would have it
        name = "search.test"
    if name == "silent.test":  # no name server answers
        time.sleep(10)
    if name not in table:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")
    return [
        (socket.AF_INET6, 1, 6, "", (ip, port, 0, 0)) if ":" in ip
        else (socket.AF_INET, 1, 6, "", (ip, port))
        for ip in table[name]
    ]
socket.getaddrinfo = getaddrinfo
"""


class WebModule(ModuleProcess):
    """``genvm_manager.py module-process web``, with the manager's ends of its pipes.

    ``names`` holds the addresses of names under ``.test``; ``search.test`` is what names that are
    not absolute lead to. ``prefix`` is a command that starts the process.
    """

    def __init__(
        self,
        config: object,
        *,
        names: Mapping[str, list[str]] | None = None,
        environment: Mapping[str, str] | None = None,
        log_level: str = "debug",
        prefix: Sequence[str] = (),
    ) -> None:
        command = own_command("module-process", "web")
        code = command.index("-c") + 1
        command[code] = _WITH_NAMES + command[code]
        command.insert(code + 1, json.dumps(dict(names or {})))
        super().__init__(
            config, command=[*prefix, *command], environment=environment, log_level=log_level
        )

    def client(self) -> Client:
        """Return a client that has said hello."""
        return self.connect(HELLO)

    def get(self, url: str, **changes: Any) -> Any:
        """Make one request over a connection of its own."""
        client = self.client()
        try:
            return client.ask(request(url, **changes))
        finally:
            client.close()

    def render(self, url: str, **changes: Any) -> Any:
        """Render one page over a connection of its own."""
        client = self.client()
        client.socket.settimeout(2 * WAIT)
        try:
            return client.ask(render(url, **changes))
        finally:
            client.close()


def request(url: str, **changes: Any) -> dict[str, Any]:
    """Return a ``Request``."""
    given: dict[str, Any] = {
        "method": "GET",
        "url": url,
        "headers": {},
        "body": None,
        "sign": False,
    }
    return {"Request": {**given, **changes}}


def render(url: str, **changes: Any) -> dict[str, Any]:
    """Return a ``Render``."""
    return {"Render": {"mode": "text", "url": url, "wait_after_loaded": "0ms", **changes}}


def causes(answer: Any) -> list[str]:
    """Return the causes of an error that a contract can catch."""
    return cast(list[str], answer["UserError"]["causes"])


# --- web servers ---


class Exchange:
    """A request as it came, and the way to answer it."""

    def __init__(self, peer: socket.socket, head: bytes, body: bytes) -> None:
        line, _, rest = head.partition(b"\r\n")
        self.peer = peer
        self.method, self.path, _ = line.decode("latin-1").split(" ")
        self.lines = [row.partition(b":") for row in rest.split(b"\r\n") if row]
        self.headers = {k.decode().lower(): v.strip() for k, _, v in self.lines}
        self.body = body

    def send(self, data: bytes) -> None:
        """Send bytes as they are; the client may be gone."""
        self.peer.sendall(data)

    def reply(self, body: bytes, *headers: bytes, status: bytes = b"200 OK") -> None:
        """Send a whole response."""
        lines = [b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *headers]
        self.send(b"\r\n".join([*lines, b"", b""]) + (b"" if self.method == "HEAD" else body))


Answer = Callable[[Exchange], object]


class _Handler(socketserver.BaseRequestHandler):
    web: ClassVar[WebServer]

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            data = bytearray()
            while (end := data.find(b"\r\n\r\n")) < 0:
                piece = self.request.recv(1 << 16)
                if not piece:
                    return
                data += piece
            head, body = bytes(data[:end]), bytearray(data[end + 4 :])
            size = next(
                (
                    int(row.partition(b":")[2])
                    for row in head.split(b"\r\n")
                    if row.lower().startswith(b"content-length:")
                ),
                0,
            )
            while len(body) < size:
                body += self.request.recv(1 << 16)
            exchange = Exchange(self.request, head, bytes(body))
            self.web.requests.append(exchange)
            path = exchange.path.partition("?")[0]
            answer = self.web.answers.get(path, self.web.answers.get("*"))
            if answer is None:
                exchange.reply(b"nothing here", status=b"404 Not Found")
            else:
                answer(exchange)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64


class WebServer:
    """A web server on loopback: what it answers stands in ``answers``, by path."""

    def __init__(self, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[Exchange] = []
        handler = type("Handler", (_Handler,), {"web": self})
        self._server = _Server((host, 0), handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.url = f"{'https' if tls else 'http'}://{host}:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()

    def page(self, path: str, html: str, status: bytes = b"200 OK") -> str:
        """Have a page at a path; returns its URL."""
        data = html.encode()
        kind = b"Content-Type: text/html; charset=utf-8"
        self.answers[path] = lambda exchange: exchange.reply(data, kind, status=status)
        return self.url + path


# --- a proxy ---


class ProxyServer(WebServer):
    """An HTTP proxy on loopback, by ``CONNECT`` and by whole URLs; every name leads to loopback.

    ``credentials`` are what it demands, and repeats to whoever lacks them or is not let through.
    """

    def __init__(self, credentials: str = "", *, refuses: bytes = b"") -> None:
        super().__init__()
        self.answers["*"] = self._answer
        self._refuses = refuses
        self._demanded = b"Basic " + base64.b64encode(credentials.encode()) if credentials else b""

    def _answer(self, exchange: Exchange) -> None:
        given = exchange.headers.get("proxy-authorization", b"")
        if given != self._demanded or self._refuses:
            status = self._refuses or b"407 Proxy Authentication Required"
            exchange.reply(b"you said: " + given + base64.b64decode(given[6:]), status=status)
            return
        is_tunnel = exchange.method == "CONNECT"
        parts = urlsplit(f"//{exchange.path}" if is_tunnel else exchange.path)
        with socket.create_connection(("127.0.0.1", parts.port or 80)) as far:
            if is_tunnel:
                exchange.send(b"HTTP/1.1 200 Connected\r\n\r\n")
            else:
                path = parts._replace(scheme="", netloc="").geturl() or "/"
                lines = [f"{exchange.method} {path} HTTP/1.1".encode(), b"Connection: close"]
                own = (b"connection", b"proxy-authorization")
                lines += [k + b":" + v for k, _, v in exchange.lines if k.lower() not in own]
                far.sendall(b"\r\n".join([*lines, b"", exchange.body]))
            both = [exchange.peer, far]
            while True:
                for source in select.select(both, [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    both[1 - both.index(source)].sendall(data)
