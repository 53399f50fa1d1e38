"""Sections 3.9 and 3.10: pages rendered by a real Chromium, and what is left of it: nothing."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import signal
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from genvm_manager import (
    VIEWPORT_HEIGHT,
    VIEWPORT_WIDTH,
    find_chromium,
)

from .conftest import Start
from .executor_client import Client
from .support import WAIT, Daemon, alive, children_of, command_of, eventually, kill, report, timed
from .web_support import HELLO, Exchange, WebModule, WebServer, causes, render

pytestmark = [
    pytest.mark.skipif(
        find_chromium() is None and "GENVM_REQUIRE_CHROMIUM" not in os.environ,
        reason="no Chromium is installed (Debian's package: chromium)",
    ),
]
NAMES = {"inside.test": ["127.0.0.1"], "private.test": ["10.0.0.1"]}


@pytest.fixture(scope="module")
def shared_folder() -> Iterator[Path]:
    """A folder for temporary files; its name is short, as socket paths are limited."""
    with tempfile.TemporaryDirectory(prefix="gw-") as made:
        yield Path(made)


@pytest.fixture
def folder(shared_folder: Path) -> Iterator[Path]:
    """The modules' folder for temporary files, which each test leaves empty."""
    yield shared_folder
    eventually(lambda: not left_in(shared_folder), what="no folder is left")


def begin(folder: Path, path: str = os.environ["PATH"], **config: Any) -> WebModule:
    made = WebModule(
        {
            "always_allow_hosts": ["127.0.0.1"],
            "extra_tld": ["test"],
            "webdriver_host": "chromium",
            "render_timeout": "100s",
            **config,
        },
        names=NAMES,
        environment={"TMPDIR": str(folder), "PATH": path},
    )
    try:
        made.event("ready")
    except BaseException:
        made.close()
        raise
    return made


@pytest.fixture(scope="module")
def shared_module(shared_folder: Path) -> Iterator[WebModule]:
    made = begin(shared_folder)
    yield made
    made.close()


@pytest.fixture
def module(shared_module: WebModule, folder: Path) -> Iterator[WebModule]:
    """The process of the file; each test must leave it without a page."""
    yield shared_module
    nothing_left(shared_module, folder)


class Hasty(NamedTuple):
    """A process that gives a page few seconds, and how many."""

    module: WebModule
    seconds: float


@pytest.fixture(scope="module")
def shared_hasty(shared_module: WebModule, shared_folder: Path) -> Iterator[Hasty]:
    """Some times as long as a plain page takes, however busy the machine is."""
    web = WebServer()
    begun = time.monotonic()
    assert "Ok" in shared_module.render(web.page("/", "plain"))
    seconds = max(4.0, 4 * (time.monotonic() - begun))
    web.close()
    made = begin(shared_folder, render_timeout=f"{seconds:.1f}s")
    yield Hasty(made, seconds)
    made.close()


@pytest.fixture
def hasty(shared_hasty: Hasty, folder: Path) -> Iterator[Hasty]:
    """That process; each test must leave it without a page."""
    yield shared_hasty
    nothing_left(shared_hasty.module, folder)


@pytest.fixture
def own_module(folder: Path) -> Iterator[WebModule]:
    """A process of its own, for a test that ends it or counts what it has done."""
    made = begin(folder)
    yield made
    made.close()


@pytest.fixture
def web() -> Iterator[WebServer]:
    made = WebServer()
    yield made
    made.close()


def left_in(folder: Path) -> list[str]:
    return os.listdir(folder)


def family(pid: int) -> list[int]:
    """Return all descendants of a process."""
    found = []
    for child in children_of(pid):
        found += [child, *family(child)]
    return [pid for pid in found if alive(pid)]


def chromiums_of(pid: int) -> list[int]:
    """Return the browsers of a module, without the helpers that detach themselves from one."""
    return [child for child in children_of(pid) if "crashpad" not in command_of(child)]


def nothing_left(module: WebModule, folder: Path) -> None:
    eventually(lambda: not family(module.process.pid), what="no process is left")
    eventually(lambda: not left_in(folder), what="no folder is left")


class Gate:
    """A page that is held back until it is let go; counts who waits."""

    def __init__(self, web: WebServer, path: str) -> None:
        self.held = threading.Semaphore(0)
        self.go = threading.Event()
        web.answers[path] = self._answer

    def _answer(self, exchange: Exchange) -> None:
        self.held.release()
        assert self.go.wait(WAIT)
        exchange.reply(b"<p>at last", b"Content-Type: text/html")


# --- the way out ---


def test_nobody_else_uses_the_proxy_of_a_page(module: WebModule, web: WebServer) -> None:
    """It has hosts that are allowed, and would serve any process of this machine."""
    gate = Gate(web, "/held")
    page = web.page("/page", f"<img src='{web.url}/held'><p>whole")
    client = module.client()
    client.send(render(page))
    assert gate.held.acquire(timeout=WAIT)
    (browser,) = chromiums_of(module.process.pid)
    flag = next(word for word in command_of(browser).split() if "--proxy-server=" in word)
    port = int(flag.rpartition(":")[2])
    target = b"\x05\x01\x00\x01\x7f\x00\x00\x01" + web.port.to_bytes(2, "big")
    # More than it would serve of its own; many at once, since the page has no more than a minute.
    for _ in range(6):
        with contextlib.ExitStack() as closing:
            strangers = [
                closing.enter_context(socket.create_connection(("127.0.0.1", port), 30))
                for _ in range(50)
            ]
            for stranger in strangers:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    stranger.sendall(b"\x05\x01\x00" + target)
                    stranger.sendall(b"GET /stranger HTTP/1.1\r\nHost: x\r\n\r\n")
            for stranger in strangers:
                with contextlib.suppress(ConnectionResetError):
                    assert stranger.recv(100) == b""
    gate.go.set()
    assert client.receive() == {"Ok": {"text": "whole"}}
    assert "/stranger" not in [seen.path for seen in web.requests]


# --- pages ---


def test_text_that_a_script_builds_later(
    own_module: WebModule, web: WebServer, folder: Path
) -> None:
    def page(path: str, milliseconds: int) -> str:
        return web.page(
            path,
            "<h1> A   title </h1>\n\n\n<p>One&nbsp;&nbsp; two<br><br><br>three</p>"
            f"<script>setTimeout(() => document.body.append('built'), {milliseconds})</script>",
        )

    began = time.monotonic()
    answer = own_module.render(page("/soon", 100), wait_after_loaded="1500ms")
    report(f"a page, 1.5 s of waiting included: {time.monotonic() - began:.1f} s")
    assert answer == {"Ok": {"text": "A title\nOne two\nthree\nbuilt"}}
    # Nobody waits for a script longer than was asked for.
    answer = own_module.render(page("/late", 60_000))
    assert answer == {"Ok": {"text": "A title\nOne two\nthree"}}
    nothing_left(own_module, folder)
    stats = own_module.client().ask("GetStats")["Ok"]["renders"]
    assert stats["requests"] == 2
    assert stats["errors"] == {}
    assert stats["bytes_received"] > 200


def test_html_screenshot_and_cookies(module: WebModule, web: WebServer, folder: Path) -> None:
    def answer(exchange: Exchange) -> None:
        page = b"<body style='background:#f00'><p id=a>x</p><script>a.textContent='ynot'</script>"
        exchange.reply(page, b"Content-Type: text/html", b"Set-Cookie: a=b; Max-Age=9999")

    web.answers["/"] = answer
    html = module.render(web.url, mode="html")["Ok"]["text"]
    assert html.startswith("<html>")
    assert '<p id="a">ynot</p>' in html
    image = module.render(web.url, mode="screenshot")["Ok"]["image"]
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert image[12:16] == b"IHDR"
    size = (int.from_bytes(image[16:20]), int.from_bytes(image[20:24]))
    assert size == (VIEWPORT_WIDTH, VIEWPORT_HEIGHT) == (960, 540)
    pages = [seen for seen in web.requests if seen.path == "/"]
    assert len(pages) == 2
    assert all("cookie" not in seen.headers for seen in pages)
    nothing_left(module, folder)


def test_statuses_dialogs_and_no_server(module: WebModule, web: WebServer) -> None:
    missing = web.page("/missing", "<p>not  here</p>", b"404 Not Found")
    assert module.render(missing) == {
        "UserError": {
            "causes": ["WEBPAGE_LOAD_FAILED"],
            "ctx": {"url": missing, "status": 404, "body": "not here"},
        }
    }
    empty = web.page("/empty", "", b"500 X")
    assert module.render(empty)["UserError"]["ctx"]["status"] == 500
    talks = web.page("/talks", "<script>alert(1); document.write(confirm(2))</script>")
    assert module.render(talks) == {"Ok": {"text": "false"}}
    answer = module.render("http://127.0.0.1:1/")
    assert causes(answer) == ["WEBPAGE_LOAD_FAILED"]
    assert answer["UserError"]["ctx"]["status"] == 0


def test_a_route_in_the_fragment(module: WebModule, web: WebServer) -> None:
    page = web.page("/app", "<script>document.write(location.pathname + location.hash)</script>")
    url = page.replace("/app", "/old/../app#/route/ü b")
    assert module.render(url) == {"Ok": {"text": "/app#/route/%C3%BC%20b"}}
    assert [seen.path for seen in web.requests if seen.path != "/favicon.ico"] == ["/app"]


# --- limits ---


@pytest.mark.parametrize("kind", ["body", "script"])
def test_endless_pages(hasty: Hasty, folder: Path, web: WebServer, kind: str) -> None:
    def endless(exchange: Exchange) -> None:
        exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n")
        while True:
            exchange.send(b"<p>more</p>" * 10)
            time.sleep(0.02)

    web.answers["/body"] = endless
    web.page("/script", "<script>while (true) {}</script>")
    began = time.monotonic()
    answer = hasty.module.render(f"{web.url}/{kind}")
    assert causes(answer) == ["TIMEOUT"]
    timed(f"endless {kind}", time.monotonic() - began, hasty.seconds)
    nothing_left(hasty.module, folder)


@pytest.mark.parametrize(
    ("held", "sends"),
    [
        ("<img src=/x>", "nothing"),
        ("<script src=/x></script>", "nothing"),
        ("<script src=/x></script>", "without end"),
        ("<link rel=stylesheet href=/x>", "nothing"),
        ("<iframe src=/x></iframe>", "nothing"),
    ],
)
def test_a_part_that_never_comes_does_not_cost_the_page(
    hasty: Hasty, folder: Path, web: WebServer, held: str, sends: str
) -> None:
    over = threading.Event()

    def never(exchange: Exchange) -> None:
        if sends == "nothing":
            over.wait(WAIT)
            return
        exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        while not over.wait(0.02):
            exchange.send(b"x")

    web.answers["/x"] = never
    url = web.page("/", f"<head>{held}</head><p>before{held}<p>after")
    try:
        began = time.monotonic()
        answer = hasty.module.render(url, wait_after_loaded="500ms")
        assert answer == {"Ok": {"text": "before\nafter"}}
        timed(f"{held} that sends {sends}", time.monotonic() - began, hasty.seconds + 0.5)
        if "link" in held:
            assert "image" in hasty.module.render(url, mode="screenshot")["Ok"]
        nothing_left(hasty.module, folder)
    finally:
        over.set()


SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><text y='20'>drawn</text></svg>"
PDF = (
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]"
    b"/Count 1>>endobj\n3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>endobj\n"
    b"trailer<</Root 1 0 R>>\n%%EOF\n"
)


@pytest.mark.parametrize("mode", ["text", "html", "screenshot"])
@pytest.mark.parametrize(
    ("kind", "data"),
    [("application/pdf", PDF), ("image/svg+xml", SVG), ("application/zip", b"PK\x03\x04")],
)
def test_what_is_not_a_page(
    module: WebModule, web: WebServer, kind: str, data: bytes, mode: str
) -> None:
    web.answers["/d"] = lambda e: e.reply(data, b"Content-Type: " + kind.encode())
    answer = module.render(f"{web.url}/d", mode=mode)
    if mode == "screenshot" and kind == "image/svg+xml":
        assert answer["Ok"]["image"].startswith(b"\x89PNG")
        return
    assert causes(answer) == ["WEBPAGE_LOAD_FAILED"]
    assert answer["UserError"]["ctx"]["status"] == 200
    assert answer["UserError"]["ctx"]["body"] == f"{kind} is not a page: ask for it with Request"


def test_a_page_that_takes_too_much_memory(folder: Path, web: WebServer) -> None:
    module = begin(folder, render_memory_mib=600)
    script = "const a = []; setInterval(() => a.push(new Uint8Array(2e7).fill(1)), 10)"
    url = web.page("/", f"<p>hungry<script>{script}</script>")
    try:
        answer = module.render(url, wait_after_loaded="60s")
        assert causes(answer) == ["WEBPAGE_LOAD_FAILED"]
        assert answer["UserError"]["ctx"]["body"] in (
            "the page takes too much memory",
            "the page crashed",
        )
        nothing_left(module, folder)
    finally:
        module.close()


@pytest.mark.parametrize("kind", ["document", "fetch"])
def test_a_page_that_brings_too_much(
    own_module: WebModule, web: WebServer, folder: Path, kind: str
) -> None:
    sent = 0

    def answer(exchange: Exchange) -> None:
        nonlocal sent
        exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>begin")
        while True:
            exchange.send(b"<!--%s-->" % bytes(b"x" * ((1 << 20) - 7)))
            sent += 1 << 20

    web.answers["/document"] = answer
    web.page("/fetch", "<p>small<script>fetch('/document').then((r) => r.text())</script>")
    url = f"{web.url}/{kind}"
    assert own_module.render(url, wait_after_loaded="50s") == {
        "UserError": {
            "causes": ["WEBPAGE_LOAD_FAILED"],
            "ctx": {
                "url": url,
                "status": 200,
                "body": "the page brings more than 67108864 bytes",
            },
        }
    }
    nothing_left(own_module, folder)
    received = own_module.client().ask("GetStats")["Ok"]["renders"]["bytes_received"]
    assert 64 << 20 < received < 65 << 20
    assert sent < 80 << 20


def test_text_is_measured_in_bytes(module: WebModule, web: WebServer) -> None:
    script = "document.body.append('\\u20ac'.repeat({}))"
    fits = web.page("/fits", f"<body><script>{script.format(3 << 20)}</script>")
    assert len(module.render(fits)["Ok"]["text"]) == 3 << 20
    answer = module.render(web.page("/more", f"<body><script>{script.format(4 << 20)}</script>"))
    assert causes(answer) == ["WEBPAGE_LOAD_FAILED"]
    assert answer["UserError"]["ctx"]["body"] == "the page's text is too long"


def test_five_at_once(module: WebModule, web: WebServer, folder: Path) -> None:
    gate = Gate(web, "/gated")
    clients = [module.client() for _ in range(5)]
    for client in clients:
        client.socket.settimeout(2 * WAIT)
        client.send(render(f"{web.url}/gated"))
    for _ in range(2):
        assert gate.held.acquire(timeout=WAIT)
    # Two wait for the page; the others wait for them.
    assert not gate.held.acquire(timeout=3)
    assert len(chromiums_of(module.process.pid)) == 2
    assert len(left_in(folder)) == 2
    gate.go.set()
    for client in clients:
        assert client.receive() == {"Ok": {"text": "at last"}}
        client.close()
    nothing_left(module, folder)


# --- ends ---


def test_a_page_that_crashes(module: WebModule, web: WebServer, folder: Path) -> None:
    gate = Gate(web, "/gated")
    url = web.page("/", "<p>x<img src=/gated>")
    client = module.client()
    client.socket.settimeout(WAIT)
    client.send(render(url))
    assert gate.held.acquire(timeout=WAIT)
    for pid in family(module.process.pid):
        if "--type=renderer" in command_of(pid):
            kill(pid)
    answer = client.receive()
    assert causes(answer) == ["WEBPAGE_LOAD_FAILED"]
    assert answer["UserError"]["ctx"]["body"] == "the page crashed"
    gate.go.set()
    nothing_left(module, folder)


def test_a_chromium_that_crashes(module: WebModule, web: WebServer, folder: Path) -> None:
    gate = Gate(web, "/gated")
    client = module.client()
    client.socket.settimeout(WAIT)
    client.send(render(f"{web.url}/gated"))
    assert gate.held.acquire(timeout=WAIT)
    (chromium,) = chromiums_of(module.process.pid)
    kill(chromium)
    assert 'causes: ["RENDERER_FAILED"], fatal: true' in client.receive()["FatalError"]
    gate.go.set()
    nothing_left(module, folder)
    # The next page has another.
    assert "Ok" in client.ask(render(web.page("/next", "next")))


def test_a_client_that_vanishes(own_module: WebModule, web: WebServer, folder: Path) -> None:
    gate = Gate(web, "/gated")
    client = own_module.client()
    client.send(render(f"{web.url}/gated"))
    assert gate.held.acquire(timeout=WAIT)
    assert len(family(own_module.process.pid)) > 3
    client.close()
    nothing_left(own_module, folder)
    gate.go.set()
    assert own_module.client().ask("GetStats")["Ok"]["renders"]["errors"] == {"CANCELLED": 1}


def test_the_end_of_the_module(own_module: WebModule, web: WebServer, folder: Path) -> None:
    gate = Gate(web, "/gated")
    client = own_module.client()
    client.send(render(f"{web.url}/gated"))
    assert gate.held.acquire(timeout=WAIT)
    started = family(own_module.process.pid)
    assert len(started) > 3
    assert own_module.process.stdin is not None
    own_module.process.stdin.close()  # the manager is gone
    own_module.wait()
    assert [pid for pid in started if alive(pid)] == []
    assert left_in(folder) == []
    gate.go.set()


@pytest.mark.parametrize("number", range(3))
def test_a_page_that_never_stays(module: WebModule, web: WebServer, number: int) -> None:
    """Whatever a page does, the contract can catch it."""
    script = "onload = () => setInterval(() => location.reload(), 0)"
    url = web.page("/", f"<p>x<script>{script}</script>")
    answer = module.render(url, wait_after_loaded=f"{number}s")
    assert "FatalError" not in answer


def test_a_module_without_a_manager_that_is_killed(web: WebServer, folder: Path) -> None:
    """What nobody was left to remove, the next module removes, but nothing that is in use."""
    gate = Gate(web, "/gated")
    killed, other = begin(folder), begin(folder)
    clients = [killed.client(), other.client()]
    for client in clients:
        client.send(render(f"{web.url}/gated"))
        assert gate.held.acquire(timeout=WAIT)
    both = set(left_in(folder))
    started = family(killed.process.pid)
    kill(killed.process.pid)
    killed.wait()
    # Each Chromium ends by itself when nobody has the other end of its pipe.
    eventually(lambda: not [pid for pid in started if alive(pid)], what="no process is left")
    assert set(left_in(folder)) == both
    third = begin(folder)
    (kept,) = left_in(folder)
    assert kept in both
    assert command_of(chromiums_of(other.process.pid)[0]).find(kept) > 0
    gate.go.set()
    assert clients[1].receive() == {"Ok": {"text": "at last"}}
    eventually(lambda: not left_in(folder), what="no folder is left")
    for module in (killed, other, third):
        module.close()


def below_a_manager(
    start: Start, web: WebServer, folder: Path
) -> tuple[Daemon, dict[str, Any], Client]:
    """Return a manager, its Web module's status, and a client that waits for a page."""
    daemon = start(environ={"TMPDIR": str(folder)})
    config = {
        "always_allow_hosts": ["127.0.0.1"],
        "webdriver_host": "chromium",
        "bind_address": "127.0.0.1:0",
    }
    body = {"module_type": "web", "config": config}
    assert daemon.post("/module/start", body) == {"result": "module_started"}
    module = daemon.get("/status")["modules"]["web"]
    host, _, port = module["address"].rpartition(":")
    client = Client((host, int(port)))
    client.send(HELLO)
    client.send(render(f"{web.url}/gated"))
    return daemon, module, client


@pytest.mark.parametrize("ended", ["module", "manager", "manager, killed"])
def test_the_end_of_a_module_below_its_manager(
    start: Start, web: WebServer, folder: Path, ended: str
) -> None:
    """On a busy machine too, where a Chromium that was killed takes its time to be gone."""
    gate = Gate(web, "/gated")
    daemon, module, client = below_a_manager(start, web, folder)
    assert gate.held.acquire(timeout=WAIT)
    started = family(module["pid"])
    assert len(left_in(folder)) == 1
    if ended == "module":
        kill(module["pid"])
        # No other module comes that would tidy up.
        daemon.post("/module/stop", {"module_type": "web"})
    elif ended == "manager":
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait()
    else:
        daemon.process.kill()
    eventually(lambda: not [pid for pid in started if alive(pid)], what="no process is left")
    eventually(lambda: not left_in(folder), what="no folder is left")
    gate.go.set()
    client.close()


def render_until_it_went(module: WebModule, url: str) -> Any:
    """Render a page that goes somewhere else, which takes time on a busy machine."""
    for seconds in (1, 5, 20):
        answer = module.render(url, wait_after_loaded=f"{seconds}s")
        if answer != {"Ok": {"text": "x"}}:
            break
    return answer


# --- rules ---


@pytest.mark.parametrize(
    ("location", "cause"),
    [
        ("http://inside.test/", "ADDRESS_FORBIDDEN"),
        ("http://private.test/", "ADDRESS_FORBIDDEN"),
        ("http://127.0.0.2/", "TLD_FORBIDDEN"),
        ("http://inside.test:81/", "PORT_FORBIDDEN"),
    ],
)
def test_redirects_of_the_page(
    module: WebModule, web: WebServer, location: str, cause: str
) -> None:
    moved = b"Location: " + location.encode()
    web.answers["/"] = lambda e: e.reply(b"", moved, status=b"302 Found")
    assert causes(module.render(web.url)) == [cause]
    assert causes(module.render(location)) == [cause]


def test_redirects_from_https_to_http(
    authority: tuple[Path, ssl.SSLContext], folder: Path, tmp_path: Path, web: WebServer
) -> None:
    """Of the page; what its scripts do is a matter of Chromium, and new pages are allowed."""
    path, context = authority
    key = x509.load_pem_x509_certificate(path.read_bytes()).public_key()
    info = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    pin = base64.b64encode(hashlib.sha256(info).digest()).decode()
    # Chromium as it is, but for the certificate that it takes.
    wrapper = tmp_path / "chromium"
    flag = f"--ignore-certificate-errors-spki-list={pin}"
    wrapper.write_text(f'#!/bin/sh\nexec {find_chromium()} {flag} "$@"\n')
    wrapper.chmod(0o755)
    secure = WebServer(context)
    plain = web.page("/plain", "in the open")
    moved = f"Location: {plain}".encode()
    secure.answers["/down"] = lambda e: e.reply(b"", moved, status=b"302 Found")
    secure.answers["/twice"] = lambda e: e.reply(b"", b"Location: /down", status=b"301 X")
    up = f"Location: {secure.url}/page".encode()
    web.answers["/up"] = lambda e: e.reply(b"", up, status=b"302 Found")
    secure.page("/page", "over TLS")
    secure.page("/script", f"x<script>location = '{plain}'</script>")
    module = begin(folder, path=f"{tmp_path}:{os.environ['PATH']}")
    try:
        assert module.render(f"{secure.url}/page") == {"Ok": {"text": "over TLS"}}
        assert module.render(f"{web.url}/up") == {"Ok": {"text": "over TLS"}}
        for start in ("down", "twice"):
            assert causes(module.render(f"{secure.url}/{start}")) == ["SCHEMA_FORBIDDEN"]
        assert not [seen for seen in web.requests if seen.path == "/plain"]
        answer = render_until_it_went(module, f"{secure.url}/script")
        assert answer == {"Ok": {"text": "in the open"}}
    finally:
        module.close()
        secure.close()


@pytest.mark.parametrize(
    ("place", "cause"),
    [
        ("http://127.0.0.1:1/", "WEBPAGE_LOAD_FAILED"),
        ("http://unknown.test/", "WEBPAGE_LOAD_FAILED"),
        ("http://inside.test/", "ADDRESS_FORBIDDEN"),
        ("http://127.0.0.2/", "TLD_FORBIDDEN"),
    ],
)
@pytest.mark.parametrize("event", ["", "onload = () => "])
def test_pages_that_go_where_nothing_is(
    module: WebModule, web: WebServer, event: str, place: str, cause: str
) -> None:
    """What Chromium shows then is no answer."""
    url = web.page("/", f"<p>x<script>{event}location = '{place}'</script>")
    answer = render_until_it_went(module, url)
    assert causes(answer) == [cause]
    if cause == "WEBPAGE_LOAD_FAILED":
        expected = {"url": url, "status": 0, "body": f"it went to {place}, which cannot be loaded"}
        assert answer["UserError"]["ctx"] == expected


def test_what_a_page_leaves_unsent(module: WebModule, web: WebServer, folder: Path) -> None:
    before = len(os.listdir(f"/proc/{module.process.pid}/fd"))
    with socket.create_server(("127.0.0.1", 0)) as impolite:  # it reads nothing
        place = "http://{}:{}/".format(*impolite.getsockname())
        script = f"fetch('{place}', {{method: 'POST', mode: 'no-cors', body: 'x'.repeat(2e7)}})"
        url = web.page("/", f"<p>x<script>{script}</script>")
        assert module.render(url, wait_after_loaded="1s") == {"Ok": {"text": "x"}}
        peer = impolite.accept()[0]
        eventually(
            lambda: len(os.listdir(f"/proc/{module.process.pid}/fd")) == before,
            what="all is closed",
        )
        peer.close()
    nothing_left(module, folder)


def test_ten_redirects_pass_and_eleven_fail(module: WebModule, web: WebServer) -> None:
    def answer(exchange: Exchange) -> None:
        left = int(exchange.path.removeprefix("/hop"))
        if left:
            exchange.reply(b"", b"Location: /hop%d" % (left - 1), status=b"302 Found")
        else:
            exchange.reply(b"there", b"Content-Type: text/html")

    for count in range(12):
        web.answers[f"/hop{count}"] = answer
    assert module.render(f"{web.url}/hop10") == {"Ok": {"text": "there"}}
    assert causes(module.render(f"{web.url}/hop11")) == ["TOO_MANY_REDIRECTS"]


def test_what_a_page_loads(module: WebModule, web: WebServer) -> None:
    """Nothing but the allowed host is reached: not by any kind of request, and not by UDP."""
    inside = WebServer(host="127.0.0.2")
    inside.page("/", "secret")
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.2", inside.port))
    datagrams.setblocking(False)
    place = f"127.0.0.2:{inside.port}"
    open_port = f"127.0.0.1:{web.port}"
    web.page("/frame", "<p>framed")
    script = f"""
        const told = [];
        const say = (name) => (x) => {{ told.push(name + (x.ok ? '+' : '-')); }};
        const tries = [];
        for (const url of ['http://{place}/', 'http://localhost:{web.port}/', 'http://[::1]/'])
            tries.push(fetch(url, {{mode: 'no-cors'}}).then(
                () => told.push('reached ' + url), say('fetch')));
        tries.push(fetch('/frame').then(say('own')));
        tries.push(new Promise((done) => {{
            const ws = new WebSocket('ws://{place}/');
            ws.onopen = () => {{ told.push('reached ws'); done(); }};
            ws.onerror = () => {{ told.push('ws-'); done(); }};
        }}));
        const rtc = new RTCPeerConnection({{iceServers: [
            {{urls: 'stun:{place}'}},
            {{urls: 'turn:{place}?transport=tcp', username: 'a', credential: 'b'}},
            {{urls: 'turn:{place}?transport=udp', username: 'a', credential: 'b'}},
        ]}});
        rtc.createDataChannel('x');
        rtc.createOffer().then((offer) => rtc.setLocalDescription(offer));
        Promise.all(tries).then(() => {{
            document.getElementById('told').textContent = told.sort().join(' ');
            fetch('/done');
        }});
    """
    url = web.page(
        "/",
        f"<p id=told></p><img src='http://{place}/image'><script src='http://{place}/js'></script>"
        f"<iframe src='http://{place}/frame'></iframe><iframe src='http://{open_port}/frame'></iframe>"
        f"<link rel=preconnect href='http://{place}/'><link rel=dns-prefetch href='//inside.test'>"
        f"<iframe src='file:///etc/passwd'></iframe><script>{script}</script><img src=/last>",
    )
    done = threading.Event()

    def last(exchange: Exchange) -> None:
        done.wait(WAIT)
        exchange.reply(b"", status=b"404 Not Found")

    web.answers["/last"] = last  # for which the page is waited for
    web.answers["/done"] = lambda exchange: done.set()
    try:
        answer = module.render(url, wait_after_loaded="2s")
        assert answer["Ok"]["text"].splitlines()[0] == "fetch- fetch- fetch- own+ ws-"
        assert inside.requests == []
        with contextlib.suppress(BlockingIOError):
            raise AssertionError(f"UDP got out: {datagrams.recv(100)!r}")
        assert len([seen for seen in web.requests if seen.path == "/frame"]) == 2
    finally:
        inside.close()
        datagrams.close()


def test_no_chromium(folder: Path) -> None:
    made = WebModule({"webdriver_host": "chromium"}, environment={"PATH": str(folder)})
    try:
        assert made.wait() == 1
    finally:
        made.close()
    assert "webdriver_host: no Chromium is installed" in made.records[0]["message"]
