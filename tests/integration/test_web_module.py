"""Sections 3.6 to 3.11: the Web module's process, real web servers, a webdriver and a signer."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from genvm_manager import CALLER_LOOKUPS, RENDER_MAX_BYTES, SIGNATURE_MAX_BYTES

from .module_support import call
from .support import WAIT, Root, eventually, memory_of, report, sockets_of, timed
from .web_support import Exchange, WebModule, WebServer, causes, render, request

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
INSIDE = {
    "loopback.test": ["127.0.0.1"],
    "private.test": ["10.0.0.1"],
    "metadata.test": ["169.254.169.254"],
    "six.test": ["::1"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "zero.test": ["0.0.0.0"],
    "all.test": ["10.0.0.1", "::1", "127.0.0.1"],
}
NAMES = {**INSIDE, "secure.test": ["127.0.0.1"], "trusted.test": ["127.0.0.1"]}
TRUSTED = ["127.0.0.1", "secure.test", "trusted.test"]


@pytest.fixture
def web() -> Iterator[WebServer]:
    made = WebServer()
    yield made
    made.close()


@pytest.fixture(scope="module")
def module(authority: tuple[Path, ssl.SSLContext]) -> Iterator[WebModule]:
    made = WebModule(
        {"always_allow_hosts": TRUSTED, "extra_tld": ["test"], "timeout": "100s"},
        names=NAMES,
        environment={"SSL_CERT_FILE": str(authority[0])},
    )
    made.event("ready")
    yield made
    made.close()


@pytest.fixture
def start(authority: tuple[Path, ssl.SSLContext]) -> Iterator[Callable[..., WebModule]]:
    started: list[WebModule] = []

    def begin(**config: Any) -> WebModule:
        whole = {"always_allow_hosts": TRUSTED, "extra_tld": ["test"], **config}
        environment = {"SSL_CERT_FILE": str(authority[0])}
        started.append(WebModule(whole, names=NAMES, environment=environment))
        started[-1].event("ready")
        return started[-1]

    yield begin
    for made in started:
        made.close()


Start = Callable[..., WebModule]


def response(answer: Any) -> Any:
    return answer["Ok"]["response"]


def reason(answer: Any) -> str:
    return str(answer["UserError"]["ctx"]["reason"])


# --- requests ---


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "DELETE", "OPTIONS", "PATCH", "PUT"])
def test_methods_and_binary_bodies(module: WebModule, web: WebServer, method: str) -> None:
    web.answers["/p"] = lambda e: e.reply(e.body + b"\0", b"X-B: \xff\x80", status=b"201 Made")
    body = None if method in ("GET", "HEAD") else bytes(range(256)) * 100
    answer = response(
        module.get(f"{web.url}/p?q=%00", method=method, body=body, headers={"X-A": b"\xfe"})
    )
    (seen,) = web.requests
    assert (seen.method, seen.path, seen.body) == (method, "/p?q=%00", body or b"")
    assert seen.headers["x-a"] == b"\xfe"
    assert seen.headers["host"] == f"127.0.0.1:{web.port}".encode()
    assert "cookie" not in seen.headers
    assert answer["status"] == 201
    assert answer["headers"]["x-b"] == b"\xff\x80"
    assert answer["body"] == (b"" if method == "HEAD" else (body or b"") + b"\0")


@pytest.mark.parametrize("status", [100, 204, 304, 400, 404, 418, 500, 503, 599])
def test_any_status_is_an_answer(module: WebModule, web: WebServer, status: int) -> None:
    def answer(exchange: Exchange) -> None:
        if status == 100:
            exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        empty = status in (204, 304)
        exchange.reply(
            b"" if empty else b"body", status=b"%d X" % (status if status > 100 else 200)
        )

    web.answers["/"] = answer
    got = response(module.get(web.url))
    assert got["status"] == (status if status > 100 else 200)


def test_duplicate_headers(module: WebModule, web: WebServer) -> None:
    web.answers["/"] = lambda e: e.reply(
        b"", b"Vary: A", b"vary: B", b"Set-Cookie: a=1", b"Set-Cookie: b=2"
    )
    headers = response(module.get(web.url))["headers"]
    assert headers["vary"] == b"B"
    assert headers["set-cookie"] == b"b=2"
    response(module.get(web.url))
    assert "cookie" not in web.requests[1].headers


@pytest.mark.parametrize(
    ("method", "sent", "length"),
    [
        ("GET", b"200 OK\r\nContent-Length: 4\r\n\r\nbody", b"4"),
        ("GET", b"200 OK\r\nContent-Length: 0\r\n\r\n", b"0"),
        ("HEAD", b"200 OK\r\nContent-Length: 99\r\n\r\n", b"99"),
        ("HEAD", b"200 OK\r\n\r\n", None),
        ("GET", b"204 None\r\n\r\n", None),
        ("GET", b"200 OK\r\n\r\nbody", None),
        ("GET", b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", None),
    ],
)
def test_content_length(
    module: WebModule, web: WebServer, method: str, sent: bytes, length: bytes | None
) -> None:
    web.answers["/"] = lambda e: e.send(b"HTTP/1.1 " + sent)
    headers = response(module.get(web.url, method=method))["headers"]
    assert headers.get("content-length") == length


def test_urls_as_browsers_read_them(module: WebModule, web: WebServer) -> None:
    web.answers["*"] = lambda e: e.reply(b"ok")
    web.answers["/r"] = lambda e: e.reply(b"", b"Location: ../x/../y z", status=b"302 X")
    for url in (f" {web.url}/a/../b c?d e#f", f"{web.url}/r"):
        assert response(module.get(url))["body"] == b"ok"
    assert [seen.path for seen in web.requests] == ["/b%20c?d%20e", "/r", "/y%20z"]


def test_headers_that_are_ours(module: WebModule, web: WebServer) -> None:
    given = {
        "Host": b"evil.com",
        "Content-Length": b"1",
        "Transfer-Encoding": b"chunked",
        "Connection": b"upgrade",
        "Upgrade": b"h2c",
        "Cookie": b"mine=1",
        "User-Agent": b"contract",
    }
    web.answers["/"] = lambda e: e.reply(b"ok")
    assert response(module.get(web.url, method="POST", body=b"abc", headers=given))
    (seen,) = web.requests
    assert seen.headers["host"] == f"127.0.0.1:{web.port}".encode()
    assert seen.body == b"abc"
    assert "transfer-encoding" not in seen.headers
    assert "upgrade" not in seen.headers
    assert seen.headers["cookie"] == b"mine=1"
    assert seen.headers["user-agent"] == b"contract"
    assert causes(module.get(web.url, headers={"a": b"b\r\nc: d"})) == ["INVALID_HEADER"]
    assert len(web.requests) == 1


def test_chunked(module: WebModule, web: WebServer) -> None:
    web.answers["/"] = lambda e: e.send(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nTrailer: x\r\n\r\n"
    )
    assert response(module.get(web.url))["body"] == b"abcde"


def test_a_body_that_ends_with_the_connection(module: WebModule, web: WebServer) -> None:
    web.answers["/"] = lambda e: e.send(b"HTTP/1.0 200 OK\r\n\r\nto the end")
    assert response(module.get(web.url))["body"] == b"to the end"


def test_gzip(module: WebModule, web: WebServer) -> None:
    packed = gzip.compress(b"first ") + gzip.compress(b"second " * 1000)
    web.answers["/"] = lambda e: e.reply(packed, b"Content-Encoding: gzip")
    got = response(module.get(web.url))
    assert got["body"] == b"first " + b"second " * 1000
    assert "content-encoding" not in got["headers"]
    assert "content-length" not in got["headers"]
    assert web.requests[0].headers["accept-encoding"] == b"gzip"
    # Who asks for an encoding gets what the server sends.
    raw = response(module.get(web.url, headers={"Accept-Encoding": b"gzip"}))
    assert raw["body"] == packed
    assert raw["headers"]["content-encoding"] == b"gzip"


@pytest.mark.parametrize(
    "data",
    [b"no gzip", gzip.compress(b"x" * 9999, mtime=0)[:-9], b"\x1f\x8b\x08"],
    ids=["no gzip", "cut", "only the beginning"],
)
def test_broken_gzip(module: WebModule, web: WebServer, data: bytes) -> None:
    web.answers["/"] = lambda e: e.reply(data, b"Content-Encoding: gzip")
    answer = module.get(web.url)
    assert causes(answer) == ["READING_BODY"]
    assert "gzip" in reason(answer)


def test_gzip_bomb(module: WebModule, web: WebServer) -> None:
    bomb = gzip.compress(bytes(256 << 20), 9)
    before = memory_of(module.process.pid)
    web.answers["/"] = lambda e: e.reply(bomb, b"Content-Encoding: gzip")
    answer = module.get(web.url)
    assert causes(answer) == ["READING_BODY"]
    assert "longer than 10485760 bytes" in reason(answer)
    grown = (memory_of(module.process.pid) - before) >> 20
    report(f"a bomb of {len(bomb)} bytes for 256 MiB: the module grows by {grown} MiB")
    assert grown < 128


def test_bodies_up_to_the_limit(module: WebModule, web: WebServer) -> None:
    web.answers["/fits"] = lambda e: e.reply(bytes(10 << 20))
    web.answers["/more"] = lambda e: e.reply(bytes((10 << 20) + 1))
    assert len(response(module.get(f"{web.url}/fits"))["body"]) == 10 << 20
    assert causes(module.get(f"{web.url}/more")) == ["READING_BODY"]


def test_an_endless_body(module: WebModule, web: WebServer) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            exchange.send(bytes(1 << 16))

    web.answers["/"] = answer
    begin = time.monotonic()
    assert causes(module.get(web.url)) == ["READING_BODY"]
    timed("an endless body is an error", time.monotonic() - begin, 1.0)


def test_endless_headers(module: WebModule, web: WebServer) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.send(b"HTTP/1.1 200 OK\r\n")
        while True:
            exchange.send(b"X: " + b"y" * 1000 + b"\r\n")

    web.answers["/"] = answer
    got = module.get(web.url)
    assert causes(got) == ["SENDING_REQUEST"]
    assert reason(got) == "more than 131072 bytes were received"


def test_headers_of_many_kinds(module: WebModule, web: WebServer) -> None:
    """A body follows at once, and is not counted with them."""
    names = [b"x-%d: %s" % (number, b"y" * 90) for number in range(600)]
    web.answers["/"] = lambda e: e.reply(bytes(1 << 20), *names)
    got = response(module.get(web.url))
    assert len(got["headers"]) == 600 + 1  # Content-Length
    assert len(got["body"]) == 1 << 20


@pytest.mark.parametrize(("size", "is_read"), [(64 << 10, True), (66 << 10, False)])
def test_long_header_lines(module: WebModule, web: WebServer, size: int, is_read: bool) -> None:
    line = b"X-Long: ".ljust(size - 2, b"y")
    web.answers["/"] = lambda e: e.reply(b"body", line, b"X-Next: z")
    got = module.get(web.url)
    if not is_read:
        assert causes(got) == ["SENDING_REQUEST"]
        return
    assert response(got)["headers"]["x-long"] == line[8:]
    assert response(got)["headers"]["x-next"] == b"z"
    assert response(got)["body"] == b"body"


@pytest.mark.parametrize("kind", ["slow body", "no answer", "slow head"])
def test_time(start: Start, web: WebServer, kind: str) -> None:
    gone = threading.Event()

    def answer(exchange: Exchange) -> None:
        if kind == "slow body":
            exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        try:
            while kind != "no answer":
                exchange.send(b"X")
                time.sleep(0.05)
            exchange.peer.settimeout(WAIT)
            assert exchange.peer.recv(1) == b""
        finally:
            gone.set()

    web.answers["/"] = answer
    module = start(timeout="1s")
    begin = time.monotonic()
    assert causes(module.get(web.url)) == ["TIMEOUT"]
    seconds = time.monotonic() - begin
    assert seconds > 0.9
    timed(f"{kind} with a limit of 1 s", seconds, 1.0)
    assert gone.wait(WAIT)


def counted(module: WebModule) -> Counter[str]:
    """Return how many requests failed, by cause."""
    return Counter(module.client().ask("GetStats")["Ok"]["requests"]["errors"])


def test_a_client_that_vanishes_cancels_its_request(module: WebModule, web: WebServer) -> None:
    held, gone = threading.Event(), threading.Event()

    def answer(exchange: Exchange) -> None:
        held.set()
        exchange.peer.settimeout(WAIT)
        with contextlib.suppress(ConnectionResetError):
            assert exchange.peer.recv(1) == b""
        gone.set()

    web.answers["/"] = answer
    before = counted(module)
    client = module.client()
    client.send(request(web.url))
    assert held.wait(WAIT)
    client.close()
    assert gone.wait(WAIT)
    eventually(lambda: counted(module) != before, what="it is counted")
    assert counted(module) - before == {"CANCELLED": 1}


def test_a_server_that_keeps_its_connections(
    start: Start, authority: tuple[Path, ssl.SSLContext]
) -> None:
    """The end of TLS needs two, and so does a body: who does not take part is left."""
    modules = module, hasty = start(timeout="100s"), start(timeout="1s")
    secure = WebServer(authority[1])
    over = threading.Event()

    def hold(exchange: Exchange) -> None:
        exchange.reply(b"ok")
        over.wait(WAIT)

    def stall(exchange: Exchange) -> None:
        exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok")
        over.wait(WAIT)

    secure.answers["/"] = hold
    secure.answers["/stall"] = stall
    impolite = socket.create_server(("127.0.0.1", 0))
    place = "http://{}:{}".format(*impolite.getsockname())

    def sockets() -> list[int]:
        return [sockets_of(one.process.pid) for one in modules]

    before = sockets()
    try:
        with impolite:
            client = module.client()
            client.send(request(place, method="POST", body=bytes(30 << 20)))
            peer = impolite.accept()[0]
            peer.recv(1)  # of what follows, it reads nothing
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            assert response(client.receive())["body"] == b"ok"
            client.close()
            base = f"https://secure.test:{secure.port}"
            assert response(module.get(base))["body"] == b"ok"
            assert causes(hasty.get(f"{base}/stall")) == ["TIMEOUT"]
            eventually(lambda: sockets() == before, what="all are closed")
            peer.close()
    finally:
        over.set()
        secure.close()


def test_no_server(module: WebModule) -> None:
    answer = module.get("http://127.0.0.1:1/")
    assert causes(answer) == ["SENDING_REQUEST"]
    assert "refused" in reason(answer)
    assert causes(module.get("https://nowhere.test/")) == ["SENDING_REQUEST"]


def test_a_server_that_is_none(module: WebModule, web: WebServer) -> None:
    web.answers["/"] = lambda e: e.send(b"SSH-2.0-x\r\n\r\n")
    assert causes(module.get(web.url)) == ["SENDING_REQUEST"]


# --- redirects ---


def chain(web: WebServer, count: int) -> str:
    """Have a path that redirects so many times; returns its URL."""

    def answer(exchange: Exchange) -> None:
        left = int(exchange.path.removeprefix("/hop"))
        if left:
            exchange.reply(b"moved", b"Location: /hop%d" % (left - 1), status=b"302 Found")
        else:
            exchange.reply(b"there")

    web.answers["*"] = answer
    return f"{web.url}/hop{count}"


def test_ten_redirects_pass(module: WebModule, web: WebServer) -> None:
    assert response(module.get(chain(web, 10)))["body"] == b"there"
    assert len(web.requests) == 11


def test_eleven_redirects_fail(module: WebModule, web: WebServer) -> None:
    assert causes(module.get(chain(web, 11))) == ["TOO_MANY_REDIRECTS"]
    assert len(web.requests) == 11


@pytest.mark.parametrize(
    ("location", "cause"),
    [
        *((f"http://{name}/", "ADDRESS_FORBIDDEN") for name in INSIDE),
        ("http://2130706433/", None),
        ("http://0177.1/", None),
        ("http://127.0.0.2/", "TLD_FORBIDDEN"),
        ("http://2130706434/", "TLD_FORBIDDEN"),
        ("http://0177.0.0.2/", "TLD_FORBIDDEN"),
        ("http://[::1]/", "TLD_FORBIDDEN"),
        ("http://localhost/", "TLD_FORBIDDEN"),
        ("http://private.test:8080/", "PORT_FORBIDDEN"),
        ("file:///etc/passwd", "SCHEMA_FORBIDDEN"),
        ("gopher://example.com/", "SCHEMA_FORBIDDEN"),
        ("http://a b/", "MALFORMED_URL"),
    ],
)
def test_every_hop_is_checked(
    module: WebModule, web: WebServer, location: str, cause: str | None
) -> None:
    web.answers["/"] = lambda e: e.reply(
        b"", b"Location: " + location.encode(), status=b"301 Moved"
    )
    if cause is None:  # an odd spelling of what is allowed: the rules pass, nobody listens
        assert causes(module.get(web.url)) == ["SENDING_REQUEST"]
    else:
        assert causes(module.get(web.url)) == [cause]


@pytest.mark.parametrize("name", INSIDE)
def test_names_that_lead_inside(module: WebModule, name: str) -> None:
    assert causes(module.get(f"http://{name}/")) == ["ADDRESS_FORBIDDEN"]
    assert causes(module.get(f"https://{name}/")) == ["ADDRESS_FORBIDDEN"]


def test_names_are_absolute(web: WebServer) -> None:
    """The search list of the machine does not apply, unless the operator named the host."""
    names = {"search.test": ["127.0.0.1"], "private.test": ["10.0.0.1"]}
    module = WebModule({"always_allow_hosts": ["listed.test"], "extra_tld": ["test"]}, names=names)
    web.page("/", "found")
    try:
        module.event("ready")
        assert causes(module.get("http://unknown.test/")) == ["SENDING_REQUEST"]
        assert causes(module.get("http://private.test/")) == ["ADDRESS_FORBIDDEN"]
        assert response(module.get(f"http://listed.test:{web.port}/"))["body"] == b"found"
    finally:
        module.close()


_IN_A_NETWORK_OF_ITS_OWN = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c"]
_WITH_FILES_OF_ITS_OWN = ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c"]


def can_have(command: list[str], step: str) -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*command, step], capture_output=True, check=False).returncode == 0


def can_have_a_network() -> bool:
    return can_have(_IN_A_NETWORK_OF_ITS_OWN, "ip link")


def can_have_a_resolver() -> bool:
    step = "ip link && for f in resolv nsswitch; do mount --bind /etc/$f.conf /etc/$f.conf; done"
    return can_have(_WITH_FILES_OF_ITS_OWN, f"set -e; {step}")


@pytest.mark.skipif(not can_have_a_network(), reason="network namespaces are not allowed here")
def test_public_addresses_of_this_machine() -> None:
    addresses = {"four.test": "93.184.216.34", "six.test": "2606:4700::1111"}
    steps = "ip link set lo up && ip addr add $1 dev lo && ip addr add $2 dev lo && shift 2"
    module = WebModule(
        {"extra_tld": ["test"]},
        names={name: [text] for name, text in addresses.items()},
        prefix=[*_IN_A_NETWORK_OF_ITS_OWN, f'{steps} && exec "$@"', "sh", *addresses.values()],
    )
    try:
        module.event("ready")
        for name in addresses:
            assert causes(module.get(f"http://{name}/")) == ["ADDRESS_FORBIDDEN"]
    finally:
        module.close()


#: Opens a name server's socket in the network that it runs in, hands it out, and goes on.
_HAND_OUT = """
import os, socket, sys
names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
names.bind(("127.0.0.1", 53))
with socket.socket(socket.AF_UNIX) as out:
    out.connect(sys.argv[1])
    socket.send_fds(out, [b"x"], [names.fileno()])
names.close()
os.execvp(sys.argv[2], sys.argv[2:])
"""


class NameServer:
    """A name server that answers nobody before it is told to: no name exists."""

    def __init__(self, path: Path) -> None:
        self.asked: list[str] = []
        self._denied: set[str] = set()
        self._queries: list[tuple[str, bytes, Any]] = []
        self._changed = threading.Condition()
        self._handed_out = socket.socket(socket.AF_UNIX)
        self._handed_out.bind(str(path))
        self._handed_out.listen()
        self._handed_out.settimeout(WAIT)

    def start(self) -> None:
        with self._handed_out, self._handed_out.accept()[0] as peer:
            (descriptor,) = socket.recv_fds(peer, 1, 1)[1]
        self._socket = socket.socket(fileno=descriptor)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            data, peer = self._socket.recvfrom(1 << 16)
            if not data:
                return
            labels, place = [], 12
            while size := data[place]:
                labels.append(data[place + 1 : place + 1 + size].decode())
                place += 1 + size
            name = ".".join(labels)
            with self._changed:
                if name not in self.asked:
                    self.asked.append(name)
                self._queries.append((name, data[: place + 5], peer))
                self._answer()
                self._changed.notify_all()

    def _answer(self) -> None:
        for name, query, peer in self._queries:
            if name in self._denied:
                head = query[:2] + b"\x81\x83\0\1\0\0\0\0\0\0"
                self._socket.sendto(head + query[12:], peer)
        self._queries = [query for query in self._queries if query[0] not in self._denied]

    def deny(self, *names: str) -> None:
        with self._changed:
            self._denied.update(names)
            self._answer()

    def wait_for(self, count: int) -> list[str]:
        """Return the names that it was asked for, once they are that many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.asked) >= count, WAIT), self.asked
            return list(self.asked)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it is not connected, but who reads wakes up
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(WAIT)
        self._socket.close()


@pytest.mark.skipif(not can_have_a_resolver(), reason="namespaces are not allowed here")
def test_a_name_server_that_is_silent(tmp_path: Path) -> None:
    """It delays who asks for its names, and nobody else."""
    server = NameServer(tmp_path / "names")
    resolver, switch = tmp_path / "resolv.conf", tmp_path / "nsswitch.conf"
    resolver.write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:3\n")
    switch.write_text("hosts: files dns\n")
    steps = "mount --bind $1 /etc/resolv.conf && mount --bind $2 /etc/nsswitch.conf"
    steps += ' && ip link set lo up && shift 2 && exec "$@"'
    hand_out = [sys.executable, "-ISc", _HAND_OUT, str(tmp_path / "names")]
    module = WebModule(
        {"timeout": "600s"},
        prefix=[*_WITH_FILES_OF_ITS_OWN, steps, "sh", str(resolver), str(switch), *hand_out],
    )
    try:
        server.start()
        module.event("ready")
        names = [f"slow{number}.example.com" for number in range(40)]
        slow = {name: module.connect({"cookie": "slow", "host_data": {}}) for name in names}
        for name, client in slow.items():
            client.send(request(f"http://{name}/"))
        stats = module.client()

        def counts() -> Any:
            return stats.ask("GetStats")["Ok"]["requests"]

        eventually(lambda: counts()["requests"] == len(names), what="all are being worked on")
        looked_up = server.wait_for(CALLER_LOOKUPS)
        # Neither another's lookup nor its large message waits for those.
        server.deny("other.example.com")
        begin = time.monotonic()
        body = bytes(4 << 20)
        answer = module.get("http://other.example.com/", method="POST", body=body)
        report(f"a name beside {len(names)} slow ones: {time.monotonic() - begin:.3f} s")
        assert causes(answer) == ["SENDING_REQUEST"]
        assert "other.example.com has no address" in reason(answer)
        assert server.asked[CALLER_LOOKUPS:] == ["other.example.com"]
        # Of those who stand in line, all but one give up.
        *leaving, staying = [name for name in names if name not in looked_up]
        for name in leaving:
            slow[name].close()
        eventually(
            lambda: counts()["errors"].get("CANCELLED") == len(leaving), what="they are gone"
        )
        server.deny(looked_up[0])
        assert causes(slow[looked_up[0]].receive()) == ["SENDING_REQUEST"]
        assert server.wait_for(CALLER_LOOKUPS + 2)[-1] == staying
        server.deny(staying)
        assert causes(slow[staying].receive()) == ["SENDING_REQUEST"]
        # The end does not wait for lookups that hang.
        assert module.process.stdin is not None
        module.process.stdin.close()
        assert module.wait() == 0
        server.close()
    finally:
        module.close()


def test_https_and_its_redirects(
    module: WebModule, web: WebServer, authority: tuple[Path, ssl.SSLContext]
) -> None:
    secure = WebServer(authority[1])
    try:
        base = f"https://secure.test:{secure.port}"
        secure.page("/page", "over TLS")
        assert response(module.get(f"{base}/page"))["body"] == b"over TLS"
        assert secure.requests[0].headers["host"] == f"secure.test:{secure.port}".encode()
        # To http, whoever serves it.
        plain = web.page("/page", "in the open")
        to_plain = b"Location: " + plain.encode()
        secure.answers["/down"] = lambda e: e.reply(b"", to_plain, status=b"302 Found")
        assert causes(module.get(f"{base}/down")) == ["SCHEMA_FORBIDDEN"]
        assert web.requests == []
        up = f"Location: {base}/page".encode()
        web.answers["/up"] = lambda e: e.reply(b"", up, status=b"307 X")
        secrets = {"Authorization": b"secret", "Cookie": b"a=b", "X": b"y"}
        assert response(module.get(f"{web.url}/up", headers=secrets))["body"] == b"over TLS"
        seen = secure.requests[-1].headers
        assert "authorization" not in seen
        assert "cookie" not in seen
        assert seen["x"] == b"y"
        # The certificate is for another name.
        answer = module.get(f"https://trusted.test:{secure.port}/page")
        assert causes(answer) == ["SENDING_REQUEST"]
    finally:
        secure.close()


# --- what is asked, statistics ---


@pytest.mark.parametrize(
    "asked",
    [
        {"Request": None},
        {"Request": {"method": "GET"}},
        request("https://example.com/", method="TRACE"),
        request("https://example.com/", body="text"),
        request("https://example.com/", headers=[]),
        request("https://example.com/", sign=1),
        {"Render": {"mode": "text"}},
        render("https://example.com/", mode="pdf"),
        render("https://example.com/", wait_after_loaded="soon"),
    ],
)
def test_requests_that_make_no_sense(module: WebModule, asked: Any) -> None:
    client = module.client()
    assert 'causes: ["INVALID_REQUEST"], fatal: true' in client.ask(asked)["FatalError"]
    assert "Ok" in client.ask("GetStats")
    client.close()


def test_what_is_not_configured(module: WebModule, web: WebServer) -> None:
    assert "UNKNOWN_REQUEST" in module.client().ask("Other")["FatalError"]
    answer = module.get(web.url, sign=True)
    assert causes(answer) == ["SIGNING_FAILED"]
    assert "signer_url" in reason(answer)
    assert "webdriver_host" in module.render(web.url)["FatalError"]
    assert causes(module.render("ftp://example.com/")) == ["SCHEMA_FORBIDDEN"]


def test_statistics(start: Start, web: WebServer) -> None:
    module = start()
    web.page("/a", "x" * 1000)
    module.get(f"{web.url}/a", method="POST", body=b"12345")
    module.get("https://localhost/")
    module.render("https://localhost/")
    stats = module.client().ask("GetStats")["Ok"]
    assert stats["requests"]["requests"] == 2
    assert stats["requests"]["errors"] == {"TLD_FORBIDDEN": 1}
    assert stats["requests"]["bytes_sent"] == 5
    assert 1000 < stats["requests"]["bytes_received"] < 1500
    assert stats["requests"]["latency_count"] == 2
    assert stats["renders"]["errors"] == {"TLD_FORBIDDEN": 1}


def test_a_wrong_configuration_ends_the_start() -> None:
    made = WebModule({"timeout": "soon"})
    try:
        assert made.wait() == 1
    finally:
        made.close()
    assert "timeout: expected seconds" in made.records[0]["message"]


# --- signing ---


class SignerService:
    """A signer with a real key: signs the base as ES256K does, r and s in 64 bytes."""

    def __init__(self, web: WebServer) -> None:
        self.key = ec.generate_private_key(ec.SECP256K1())
        self.asked: list[Exchange] = []
        web.answers["/sign/0xaa"] = self._sign

    def _sign(self, exchange: Exchange) -> None:
        self.asked.append(exchange)
        r, s = decode_dss_signature(self.key.sign(exchange.body, ec.ECDSA(hashes.SHA256())))
        exchange.reply(r.to_bytes(32) + s.to_bytes(32))

    def verify(self, seen: Exchange, authority: str) -> dict[str, str]:
        """Verify the signature of a request as it arrived; returns its components."""
        label, _, parameters = seen.headers["signature-input"].decode().partition("=")
        assert label == "genvm"
        names = parameters[1 : parameters.index(")")].split(" ")
        parts = urlsplit(seen.path)
        derived = {
            '"@method"': seen.method,
            '"@authority"': authority,
            '"@path"': parts.path,
            '"@query"': f"?{parts.query}",
        }
        found = {
            name: derived[name] if name in derived else seen.headers[name.strip('"')].decode()
            for name in names
        }
        lines = [f"{name}: {value}" for name, value in found.items()]
        base = "\n".join([*lines, f'"@signature-params": {parameters}']).encode()
        text = seen.headers["signature"].decode()
        assert text.startswith("genvm=:")
        assert text.endswith(":")
        raw = base64.b64decode(text[7:-1], validate=True)
        signature = encode_dss_signature(int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))
        self.key.public_key().verify(signature, base, ec.ECDSA(hashes.SHA256()))
        assert self.asked[-1].body == base
        return found


def test_signing(start: Start, web: WebServer) -> None:
    signers = WebServer()
    signer = SignerService(signers)
    module = start(
        signer_url=signers.url + "/sign/#{node_address}",
        signer_headers={"Authorization": "Bearer #{tx_id}", "X-Zone": "#{zone}"},
    )
    web.answers["/p"] = lambda e: e.reply(b"signed")
    forged = {"Signature": b"x", "Genlayer-Node-Address": b"0xff", "Accept": b"a"}
    begin = int(time.time())
    answer = module.get(
        f"{web.url}/p?a=1&b=%20", method="POST", body=b"data", sign=True, headers=forged
    )
    assert response(answer)["body"] == b"signed"
    (seen,) = web.requests
    found = signer.verify(seen, f"127.0.0.1:{web.port}")
    assert [name.strip('"') for name in found] == [
        "@method",
        "@authority",
        "@path",
        "genlayer-node-address",
        "genlayer-tx-id",
        "genlayer-salt",
        "content-digest",
        "@query",
    ]
    assert found['"genlayer-node-address"'] == "0xaa"
    assert found['"genlayer-tx-id"'] == "0xbb"
    assert len(base64.b64decode(found['"genlayer-salt"'])) == 32
    digest = base64.b64encode(hashlib.sha256(b"data").digest()).decode()
    assert found['"content-digest"'] == f"sha-256=:{digest}:"
    assert seen.headers["accept"] == b"a"
    made, algorithm = seen.headers["signature-input"].decode().split(";")[1:]
    assert begin <= int(made.removeprefix("created=")) <= time.time()
    assert algorithm == 'alg="ES256K"'
    asked = signer.asked[0]
    assert asked.method == "POST"
    assert asked.headers["authorization"] == b"Bearer 0xbb"
    assert asked.headers["x-zone"] == b"eu"
    # Without body and query; a new salt.
    module.get(f"{web.url}/p", sign=True)
    shorter = signer.verify(web.requests[1], f"127.0.0.1:{web.port}")
    assert '"content-digest"' not in shorter
    assert '"@query"' not in shorter
    assert shorter['"genlayer-salt"'] != found['"genlayer-salt"']
    # A large body, which is hashed in a thread.
    large = os.urandom(5 << 20)
    module.get(f"{web.url}/p", method="POST", body=large, sign=True)
    seen = web.requests.pop()
    digest = base64.b64encode(hashlib.sha256(large).digest()).decode()
    assert signer.verify(seen, f"127.0.0.1:{web.port}")['"content-digest"'] == f"sha-256=:{digest}:"
    # A redirect does not take the signature along.
    web.answers["/r"] = lambda e: e.reply(b"", b"Location: /p", status=b"302 X")
    module.get(f"{web.url}/r", sign=True)
    assert "signature" in web.requests[2].headers
    assert "signature" not in web.requests[3].headers
    signers.close()


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"signer_url": "none"}, "SIGN_URL_SEND_FAILED"),
        ({"signer_url": "http://127.0.0.1:1/"}, "SIGN_URL_SEND_FAILED"),
        ({"signer_url": "http://signer.inside.test/"}, "SIGN_URL_SEND_FAILED"),
        ({"signer_url": "URL/none"}, "SIGN_URL_BAD_STATUS"),
        ({"signer_url": "URL/long"}, "SIGN_URL_READ_FAILED"),
        ({"signer_url": "URL/broken"}, "SIGN_URL_READ_FAILED"),
        ({"signer_url": "URL/#{unknown}"}, "SIGN_URL_PATCH_FAILED"),
        ({"signer_url": "URL/", "signer_headers": {"x": "#{unknown}"}}, "SIGN_URL_PATCH_FAILED"),
    ],
)
def test_signers_that_fail(
    start: Start, web: WebServer, changes: dict[str, Any], cause: str
) -> None:
    url = changes["signer_url"].replace("URL", web.url)
    web.answers["/long"] = lambda e: e.reply(bytes(SIGNATURE_MAX_BYTES + 1))
    web.answers["/broken"] = lambda e: e.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx")
    module = start(**{**changes, "signer_url": url})
    answer = module.get(f"{web.url}/page", sign=True)
    assert causes(answer) == [cause]
    text = str(answer)
    assert str(web.port) not in text
    assert "inside" not in text
    assert not [seen for seen in web.requests if seen.path == "/page"]


# --- a webdriver service ---


def webdriver(web: WebServer, body: bytes, *headers: bytes, status: bytes = b"200 OK") -> None:
    web.answers["/wd/render"] = lambda e: e.reply(body, *headers, status=status)


def test_webdriver(start: Start, web: WebServer) -> None:
    module = start(webdriver_host=f"{web.url}/wd/")
    webdriver(web, "gerendert ü".encode(), b"Resulting-Status: 200")
    url = "http://trusted.test:99/ü?a=b&c=d#/e f"
    answer = module.render(url, wait_after_loaded="500ms")
    assert answer == {"Ok": {"text": "gerendert ü"}}
    query = parse_qs(urlsplit(web.requests[0].path).query)
    assert query == {
        "url": ["http://trusted.test:99/%C3%BC?a=b&c=d#/e%20f"],
        "mode": ["text"],
        "waitAfterLoaded": ["0.5"],
    }
    webdriver(web, PNG, b"Resulting-Status: 304")
    assert module.render(url, mode="screenshot", wait_after_loaded="2m") == {"Ok": {"image": PNG}}
    assert parse_qs(urlsplit(web.requests[1].path).query)["waitAfterLoaded"] == ["60"]
    assert module.render("http://private.test/")["UserError"]["causes"] == ["ADDRESS_FORBIDDEN"]


def test_webdriver_and_a_name_server_that_is_silent(start: Start, web: WebServer) -> None:
    module = start(webdriver_host=f"{web.url}/wd/", render_timeout="1s")
    webdriver(web, b"late", b"Resulting-Status: 200")
    assert causes(module.render("http://silent.test/")) == ["TIMEOUT"]
    assert web.requests == []


def test_webdriver_errors(start: Start, web: WebServer) -> None:
    module = start(webdriver_host=f"{web.url}/wd")
    webdriver(web, b"not there", b"Resulting-Status: 404")
    assert module.render("http://trusted.test/p") == {
        "UserError": {
            "causes": ["WEBPAGE_LOAD_FAILED"],
            "ctx": {"url": "http://trusted.test/p", "status": 404, "body": "not there"},
        }
    }
    webdriver(web, b"broken", status=b"500 X")
    text = module.render("http://trusted.test/")["FatalError"]
    assert text.startswith(
        'ModuleError { causes: ["STATUS_NOT_OK"], fatal: true, ctx: {"url": Str('
    )
    assert '"status": Number(500.0), "body": Str("broken")' in text
    webdriver(web, b"no status")
    assert '"READING_BODY"' in module.render("http://trusted.test/")["FatalError"]
    webdriver(web, bytes(RENDER_MAX_BYTES + 1), b"Resulting-Status: 200")
    text = module.render("http://trusted.test/")["FatalError"]
    assert 'causes: ["READING_BODY"]' in text
    assert f"longer than {RENDER_MAX_BYTES} bytes" in text
    assert (
        '"SENDING_REQUEST"'
        in (start(webdriver_host="http://127.0.0.1:1").render("http://trusted.test/")["FatalError"])
    )


# --- with the practice executor ---


def test_contract_executor_module_page_host(
    start: Start, web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = start(webdriver_host=f"{web.url}/wd")
    webdriver(web, b"rendered", b"Resulting-Status: 200")
    url = web.page("/page", "as it is")
    monkeypatch.setenv("GENVM_WEB_MODULE", "ws://{}:{}".format(*module.address))
    place = Root()
    try:
        script = f'web-get {url}\nstore got "$last"\nweb-render text {url}\n'
        script += 'return ["$storage.got", "$last"]\n'
        outcome, log = call(place, script, "ws://127.0.0.1:1")
        assert outcome == ("return", ["as it is", "rendered"])
        assert "statistics" not in log
        (kind, error), _ = call(place, "web-get http://127.0.0.2/\n", "ws://127.0.0.1:1")
        assert (kind, error["message"]) == ("user_error", "TLD_FORBIDDEN")
    finally:
        place.close()
