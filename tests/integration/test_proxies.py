"""Section 2.13: proxies that the environment names, with real ones, and who uses them."""

from __future__ import annotations

import json
import os
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from genvm_manager import Proxy, ProxyError, find_chromium, proxy_for

from .conftest import Start
from .fake_providers import KEY, answer_of
from .test_llm_check import prompt
from .web_support import ProxyServer, WebModule, WebServer, causes

PASSWORD, ESCAPED = "p@ss/w0rd", "p%40ss%2Fw0rd"
USER = f"me:{PASSWORD}"
#: ``unknown.test`` is known to the proxy alone.
NAMES = {"trusted.test": ["127.0.0.1"], "inside.test": ["10.0.0.1"]}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def proxy() -> Iterator[ProxyServer]:
    made = ProxyServer(USER)
    yield made
    made.close()


@pytest.fixture(params=["http", "https"])
def web(
    request: pytest.FixtureRequest, authority: tuple[Path, ssl.SSLContext]
) -> Iterator[WebServer]:
    made = WebServer(authority[1] if request.param == "https" else None)
    made.url = f"{request.param}://secure.test:{made.port}"
    yield made
    made.close()


def variables(proxy: WebServer, **others: str) -> dict[str, str]:
    place = f"http://me:{ESCAPED}@127.0.0.1:{proxy.port}"
    return {"HTTP_PROXY": place, "HTTPS_PROXY": place, **others}


def no_secret_in(text: str) -> None:
    for secret in (PASSWORD, ESCAPED, "bWU6cEBzcy93MHJk"):
        assert secret not in text


# --- what the environment says ---


@pytest.mark.parametrize(
    ("environment", "url", "port"),
    [
        ({}, ("http", "h", 80), None),
        ({"HTTP_PROXY": "http://p:1"}, ("http", "h", 80), 1),
        ({"HTTP_PROXY": "p:1"}, ("http", "h", 80), 1),
        ({"HTTP_PROXY": "http://p"}, ("http", "h", 80), 80),
        ({"HTTP_PROXY": "http://p:1"}, ("https", "h", 443), None),
        ({"HTTPS_PROXY": "http://p:1", "https_proxy": "http://p:2"}, ("https", "h", 443), 2),
        ({"ALL_PROXY": "https://p", "HTTP_PROXY": "http://p:2"}, ("https", "h", 443), 443),
        ({"all_proxy": "http://p:1", "HTTP_PROXY": "http://p:2"}, ("http", "h", 80), 2),
    ],
)
def test_which_proxy(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: Any, port: int | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = proxy_for(*url)
    assert (found and found.port) == port
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "x, h")
        assert proxy_for(*url) is None
        monkeypatch.delenv(name)


def test_a_variable_of_any_bytes_is_an_unusable_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environb, b"HTTPS_PROXY", b"http://u:p\xff@h:1")
    with pytest.raises(ProxyError):
        proxy_for("https", "h", 443)


@pytest.mark.parametrize(
    ("excepted", "host", "port", "direct"),
    [
        ("*", "a.b", 80, True),
        ("b", "a.b", 80, True),
        (".b", "A.B", 80, True),
        ("*.b", "a.b", 80, True),
        ("b", "ab", 80, False),
        ("a.b:80", "a.b", 80, True),
        ("a.b:81", "a.b", 80, False),
        ("x 127.0.0.1,y", "127.0.0.1", 80, True),
        ("10.0.0.0/8", "10.9.8.7", 80, True),
        ("10.0.0.0/8", "11.9.8.7", 80, False),
        ("::1", "::1", 80, True),
        ("[::1]:80", "::1", 80, True),
        ("fd00::/8", "fd12::1", 80, True),
        (", ", "a.b", 80, False),
    ],
)
def test_exceptions(
    monkeypatch: pytest.MonkeyPatch, excepted: str, host: str, port: int, direct: bool
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://p:1")
    monkeypatch.setenv("NO_PROXY", excepted)
    assert (proxy_for("http", host, port) is None) == direct


@pytest.mark.parametrize("url", ["socks5://me:secret@h:1", "http://:1", "http://h:x", "http://[h"])
def test_what_is_not_a_proxy(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("ALL_PROXY", url)
    with pytest.raises(ProxyError, match="expected http://host:port") as caught:
        proxy_for("http", "h", 80)
    assert "secret" not in str(caught.value)
    assert "secret" not in repr(Proxy.of("http://me:secret@h"))


# --- providers ---


def check(start: Start, web: WebServer, environ: dict[str, str]) -> dict[str, Any]:
    """Check a provider by way of a manager; its log and the reply tell no secret."""
    answer = json.dumps(answer_of("openai-compatible", "OK")).encode()
    web.answers["/v1/chat/completions"] = lambda e: e.reply(answer)
    daemon = start("--log-level", "trace", environ=environ)
    config = {"host": web.url, "provider": "openai-compatible", "model": "m", "key": KEY}
    reply = daemon.post("/llm/check", {"configs": [config], "test_prompts": [prompt()]})
    no_secret_in(reply.text if hasattr(reply, "text") else json.dumps(reply))
    assert daemon.stop() == 0
    no_secret_in(daemon.text + daemon.errors)
    return dict(reply[0])


def test_providers(
    start: Start, web: WebServer, proxy: ProxyServer, authority: tuple[Path, ssl.SSLContext]
) -> None:
    trust = {"SSL_CERT_FILE": str(authority[0])}
    assert check(start, web, {**trust, **variables(proxy)})["available"]
    (seen,) = web.requests
    assert "proxy-authorization" not in seen.headers
    assert seen.headers["authorization"] == f"Bearer {KEY}".encode()
    (asked,) = proxy.requests
    if web.url.startswith("https"):
        assert (asked.method, asked.path) == ("CONNECT", f"secure.test:{web.port}")
        assert "authorization" not in asked.headers
    else:
        assert (asked.method, asked.path) == ("POST", f"{web.url}/v1/chat/completions")
    assert asked.headers["proxy-authorization"] == b"Basic bWU6cEBzcy93MHJk"


def test_a_connection_through_a_proxy_is_kept(
    start: Start, proxy: ProxyServer, authority: tuple[Path, ssl.SSLContext]
) -> None:
    class Provider(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps(answer_of("ollama", "OK")).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    server.socket = authority[1].wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    daemon = start(environ={"SSL_CERT_FILE": str(authority[0]), **variables(proxy)})
    host = f"https://secure.test:{server.server_port}"
    config = {"host": host, "provider": "ollama", "model": "m"}
    for _ in range(2):
        (result,) = daemon.post("/llm/check", {"configs": [config], "test_prompts": [prompt()]})
        assert result["available"]
    assert [asked.method for asked in proxy.requests] == ["CONNECT"]
    server.shutdown()
    server.server_close()


def test_exceptions_are_asked_directly(start: Start, web: WebServer, proxy: ProxyServer) -> None:
    result = check(start, web, variables(proxy, NO_PROXY="secure.test"))
    assert result["error_kind"] == "dns"  # nobody but the proxy knows the name
    assert proxy.requests == []


@pytest.mark.parametrize("refuses", ["", "502 Bad Gateway"])
def test_proxies_that_refuse(start: Start, web: WebServer, refuses: str) -> None:
    other = ProxyServer("me:other", refuses=refuses.encode())
    result = check(start, web, variables(other))
    other.close()
    assert web.requests == []
    if refuses and web.url.startswith("http:"):
        assert (result["error_kind"], result["http_status"]) == ("http", 502)
        assert "you said: Basic [redacted]" in result["error"]
        return
    assert result["error_kind"] == "connect"
    status = refuses.partition(" ")[0] or "407"
    assert f"the proxy 127.0.0.1:{other.port}: it refuses: status {status}" in result["error"]


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("http://me:p%40ss%2Fw0rd@127.0.0.1:1", "the proxy 127.0.0.1:1: "),
        ("socks5://me:p%40ss%2Fw0rd@127.0.0.1:1", "expected http://host:port"),
    ],
)
def test_proxies_that_are_none(start: Start, web: WebServer, place: str, problem: str) -> None:
    result = check(start, web, {"ALL_PROXY": place})
    assert result["error_kind"] == "connect"
    assert problem in result["error"]


# --- the Web module ---


def begin(proxy: ProxyServer, authority: tuple[Path, ssl.SSLContext], **config: Any) -> WebModule:
    hosts = ["127.0.0.1", "trusted.test", "secure.test"]
    made = WebModule(
        {"always_allow_hosts": hosts, "extra_tld": ["test"], **config},
        names=NAMES,
        environment={"SSL_CERT_FILE": str(authority[0]), **variables(proxy)},
    )
    made.event("ready")
    return made


def test_signer_and_webdriver_but_no_pages(
    proxy: ProxyServer, web: WebServer, authority: tuple[Path, ssl.SSLContext]
) -> None:
    web.answers["/sign"] = lambda e: e.reply(b"signature")
    web.answers["/wd/render"] = lambda e: e.reply(b"rendered", b"Resulting-Status: 200")
    page = WebServer()
    page.answers["/page"] = lambda e: e.reply(b"page")
    module = begin(proxy, authority, signer_url=f"{web.url}/sign", webdriver_host=f"{web.url}/wd")
    answer = module.get(f"{page.url}/page", sign=True)
    assert answer["Ok"]["response"]["body"] == b"page"
    assert module.render("http://trusted.test/") == {"Ok": {"text": "rendered"}}
    assert [seen.path.partition("?")[0] for seen in web.requests] == ["/sign", "/wd/render"]
    assert not [asked for asked in proxy.requests if str(page.port) in asked.path]
    assert proxy.requests
    module.close()
    page.close()
    no_secret_in(json.dumps(module.records))


def test_pages_where_it_is_set(
    proxy: ProxyServer, web: WebServer, authority: tuple[Path, ssl.SSLContext]
) -> None:
    web.answers["/page"] = lambda e: e.reply(b"page" * 1000)
    module = begin(proxy, authority, use_proxy=True)
    answer = module.get(f"{web.url}/page?q", method="POST", body=b"data")
    assert answer["Ok"]["response"]["body"] == b"page" * 1000
    (seen,) = web.requests
    assert (seen.method, seen.path, seen.body) == ("POST", "/page?q", b"data")
    assert "proxy-authorization" not in seen.headers
    is_tunnel = web.url.startswith("https")
    expected = f"secure.test:{web.port}" if is_tunnel else f"{web.url}/page?q"
    assert [asked.path for asked in proxy.requests] == [expected]
    # What an address can tell is still seen to, and the count of bytes is kept.
    assert causes(module.get("http://inside.test/")) == ["ADDRESS_FORBIDDEN"]
    assert causes(module.get("http://127.0.0.2/")) == ["TLD_FORBIDDEN"]
    web.answers["/page"] = lambda e: e.reply(bytes(11 << 20))
    assert causes(module.get(f"{web.url}/page")) == ["READING_BODY"]
    assert module.client().ask("GetStats")["Ok"]["requests"]["bytes_received"] > 4000
    module.close()
    no_secret_in(json.dumps(module.records))


def test_only_what_a_proxy_can_have_written_is_masked(
    proxy: ProxyServer, web: WebServer, authority: tuple[Path, ssl.SSLContext]
) -> None:
    """Else a page with many words would be told which one is the password."""
    web.answers["/missing"] = lambda e: e.reply(PASSWORD.encode(), status=b"404 Not Found")
    module = begin(proxy, authority, use_proxy=True)
    body = module.get(f"{web.url}/missing")["Ok"]["response"]["body"]
    assert body == (PASSWORD.encode() if web.url.startswith("https") else b"[redacted]")
    module.close()


@pytest.mark.parametrize("refuses", [b"", b"502 Bad Gateway"])
def test_a_proxy_that_refuses_pages(
    web: WebServer, authority: tuple[Path, ssl.SSLContext], refuses: bytes
) -> None:
    other = ProxyServer("me:other", refuses=refuses)
    module = begin(other, authority, use_proxy=True)
    answer = module.get(f"{web.url}/page")
    if refuses and web.url.startswith("http:"):
        assert answer["Ok"]["response"]["status"] == 502
        assert answer["Ok"]["response"]["body"].startswith(b"you said: Basic [redacted]")
    else:
        assert causes(answer) == ["SENDING_REQUEST"]
        assert "it refuses: status" in answer["UserError"]["ctx"]["reason"]
    module.close()
    other.close()
    no_secret_in(json.dumps(module.records) + str(answer))


@pytest.mark.skipif(
    find_chromium() is None and "GENVM_REQUIRE_CHROMIUM" not in os.environ,
    reason="no Chromium is installed (Debian's package: chromium)",
)
def test_pages_in_chromium(
    proxy: ProxyServer, tmp_path: Path, authority: tuple[Path, ssl.SSLContext]
) -> None:
    page = WebServer()
    page.page("/", "<p>seen<script src=/x.js></script>")
    page.answers["/x.js"] = lambda e: e.reply(b"document.write('+more')")
    module = begin(proxy, authority, webdriver_host="chromium", use_proxy=True)
    url = f"http://secure.test:{page.port}/"
    assert module.render(url) == {"Ok": {"text": "seen+more"}}
    assert f"secure.test:{page.port}" in {asked.path for asked in proxy.requests}
    module.close()
    page.close()
