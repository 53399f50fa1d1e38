"""Sections 13h and 13i: pages rendered by a real Chromium, and what is left of it: nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genvm_manager import VIEWPORT_HEIGHT, VIEWPORT_WIDTH, find_chromium

from .support import alive, children_of, command_of, eventually, kill, report, timed
from .web_support import Exchange, WebModule, WebServer, causes, render

pytestmark = [
    pytest.mark.skipif(
        find_chromium() is None and "GENVM_REQUIRE_CHROMIUM" not in os.environ,
        reason="no Chromium is installed (Debian's package: chromium)",
    ),
    pytest.mark.timeout(240),
]
NAMES = {"inside.test": ["127.0.0.1"], "private.test": ["10.0.0.1"]}


@pytest.fixture
def folder() -> Iterator[Path]:
    """The module's folder for temporary files; its name is short, as socket paths are limited."""
    with tempfile.TemporaryDirectory(prefix="gw-") as made:
        yield Path(made)


def begin(folder: Path, **config: Any) -> WebModule:
    made = WebModule(
        {
            "always_allow_hosts": ["127.0.0.1"],
            "extra_tld": ["test"],
            "webdriver_host": "chromium",
            "render_timeout": "60s",
            **config,
        },
        names=NAMES,
        environment={"TMPDIR": str(folder)},
    )
    made.event("ready")
    return made


@pytest.fixture
def module(folder: Path) -> Iterator[WebModule]:
    made = begin(folder)
    yield made
    made.close()
    eventually(lambda: not left_in(folder), what="no folder is left")


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
        assert self.go.wait(60)
        exchange.reply(b"<p>at last", b"Content-Type: text/html")


# --- pages ---


def test_text_that_a_script_builds_later(module: WebModule, web: WebServer, folder: Path) -> None:
    def page(path: str, milliseconds: int) -> str:
        return web.page(
            path,
            "<h1> A   title </h1>\n\n\n<p>One&nbsp;&nbsp; two<br><br><br>three</p>"
            f"<script>setTimeout(() => document.body.append('built'), {milliseconds})</script>",
        )

    began = time.monotonic()
    answer = module.render(page("/soon", 500), wait_after_loaded="1500ms")
    report(f"a page, 1.5 s of waiting included: {time.monotonic() - began:.1f} s")
    assert answer == {"Ok": {"text": "A title\nOne two\nthree\nbuilt"}}
    # Nobody waits for a script longer than was asked for.
    answer = module.render(page("/late", 60_000))
    assert answer == {"Ok": {"text": "A title\nOne two\nthree"}}
    nothing_left(module, folder)
    stats = module.client().ask("GetStats")["Ok"]["renders"]
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
    talks = web.page("/talks", "<script>alert(1); document.write(confirm(2))</script>")
    assert module.render(talks) == {"Ok": {"text": "false"}}
    answer = module.render("http://127.0.0.1:1/")
    assert causes(answer) == ["WEBPAGE_LOAD_FAILED"]
    assert answer["UserError"]["ctx"]["status"] == 0


# --- limits ---


@pytest.mark.parametrize("kind", ["body", "script", "subresource"])
def test_endless_pages(folder: Path, web: WebServer, kind: str) -> None:
    def endless(exchange: Exchange) -> None:
        exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n")
        while True:
            exchange.send(b"<p>more</p>" * 10)
            time.sleep(0.02)

    web.answers["/body"] = web.answers["/image"] = endless
    web.page("/script", "<script>while (true) {}</script>")
    web.page("/subresource", "<script src=/image></script>")
    module = begin(folder, render_timeout="8s")
    try:
        began = time.monotonic()
        answer = module.render(f"{web.url}/{kind}")
        assert causes(answer) == ["TIMEOUT"]
        timed(f"endless {kind} with a limit of 8 s", time.monotonic() - began, 8.0)
        nothing_left(module, folder)
    finally:
        module.close()


def test_a_page_that_loads_too_much(module: WebModule, web: WebServer, folder: Path) -> None:
    """At most 64 MiB reach a page; it is told that the rest is missing, as by a bad network."""
    piece, size = b"/" * (1 << 20), 200 << 20
    sent = 0
    over = threading.Event()

    def large(exchange: Exchange) -> None:
        nonlocal sent
        try:
            exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/javascript\r\n")
            exchange.send(b"Content-Length: %d\r\n\r\n" % size)
            while sent < size:
                exchange.send(piece)
                sent += len(piece)
        finally:
            over.set()

    web.answers["/large"] = large
    tell = "document.getElementById('told').textContent ="
    script = f"<script src=/large onload=\"{tell} 'all'\" onerror=\"{tell} 'cut'\"></script>"
    url = web.page("/", f"<p id=told></p>{script}")
    assert module.render(url) == {"Ok": {"text": "cut"}}
    assert over.wait(60)
    report(f"of {size >> 20} MiB a page got at most {sent >> 20}")
    assert 32 << 20 < sent < 128 << 20
    nothing_left(module, folder)


def test_a_page_that_takes_too_much_memory(folder: Path, web: WebServer) -> None:
    module = begin(folder, render_memory_mib=600)
    script = "const a = []; setInterval(() => a.push(new Uint8Array(2e7).fill(1)), 10)"
    url = web.page("/", f"<p>hungry<script>{script}</script>")
    try:
        began = time.monotonic()
        answer = module.render(url, wait_after_loaded="50s")
        assert time.monotonic() - began < 50, "it was killed before its time was over"
        assert causes(answer) == ["WEBPAGE_LOAD_FAILED"]
        assert answer["UserError"]["ctx"]["body"] in (
            "the page takes too much memory",
            "the page crashed",
        )
        nothing_left(module, folder)
    finally:
        module.close()


def test_five_at_once(module: WebModule, web: WebServer, folder: Path) -> None:
    gate = Gate(web, "/gated")
    clients = [module.client() for _ in range(5)]
    for client in clients:
        client.socket.settimeout(200)
        client.send(render(f"{web.url}/gated"))
    for _ in range(2):
        assert gate.held.acquire(timeout=60)
    # Two wait for the page; the others wait for them.
    assert not gate.held.acquire(timeout=3)
    assert len(children_of(module.process.pid)) == 2
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
    client.socket.settimeout(60)
    client.send(render(url))
    assert gate.held.acquire(timeout=60)
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
    client.socket.settimeout(60)
    client.send(render(f"{web.url}/gated"))
    assert gate.held.acquire(timeout=60)
    (keeper,) = children_of(module.process.pid)
    for pid in children_of(keeper):
        kill(pid)
    assert 'causes: ["RENDERER_FAILED"], fatal: true' in client.receive()["FatalError"]
    gate.go.set()
    nothing_left(module, folder)
    # The next page has another.
    assert "Ok" in client.ask(render(web.page("/next", "next")))


def test_a_client_that_vanishes(module: WebModule, web: WebServer, folder: Path) -> None:
    gate = Gate(web, "/gated")
    client = module.client()
    client.send(render(f"{web.url}/gated"))
    assert gate.held.acquire(timeout=60)
    assert len(family(module.process.pid)) > 3
    client.close()
    nothing_left(module, folder)
    gate.go.set()
    assert module.client().ask("GetStats")["Ok"]["renders"]["errors"] == {"CANCELLED": 1}


@pytest.mark.parametrize("number", [signal.SIGKILL, None])
def test_the_end_of_the_module(
    module: WebModule, web: WebServer, folder: Path, number: int | None
) -> None:
    gate = Gate(web, "/gated")
    client = module.client()
    client.send(render(f"{web.url}/gated"))
    assert gate.held.acquire(timeout=60)
    started = family(module.process.pid)
    assert len(started) > 3
    if number is not None:
        module.process.send_signal(number)
    else:  # the manager is gone
        assert module.process.stdin is not None
        module.process.stdin.close()
    module.wait()
    eventually(lambda: not [pid for pid in started if alive(pid)], what="no process is left")
    eventually(lambda: not left_in(folder), what="no folder is left")
    gate.go.set()


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
        }});
    """
    url = web.page(
        "/",
        f"<p id=told></p><img src='http://{place}/image'><script src='http://{place}/js'></script>"
        f"<iframe src='http://{place}/frame'></iframe><iframe src='http://{open_port}/frame'></iframe>"
        f"<link rel=preconnect href='http://{place}/'><link rel=dns-prefetch href='//inside.test'>"
        f"<iframe src='file:///etc/passwd'></iframe><script>{script}</script>",
    )
    try:
        answer = module.render(url, wait_after_loaded="6s")
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
