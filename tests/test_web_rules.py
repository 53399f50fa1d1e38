"""Which URLs and addresses are open, names, headers, redirects, signatures."""

from __future__ import annotations

import base64
import fcntl
import gc
import hashlib
import inspect
import ipaddress
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import attrs
import hypothesis.strategies as st
import pytest
from hypothesis import example, given
from publicsuffixlist import PublicSuffixList
from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore, maybeDeferred
from twisted.internet.error import DNSLookupError
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers

import genvm_manager
from genvm_manager import (
    CALLER_LOOKUPS,
    INLINE_DIGEST_BYTES,
    NAME_THREADS,
    WEB_HEAD_MAX_BYTES,
    AnyObject,
    Caller,
    CheckedEndpoint,
    ChromiumRenderer,
    ConfigError,
    InvalidRequest,
    Names,
    PageVisit,
    RequestFailure,
    RequestSigner,
    SocksGate,
    Target,
    Traffic,
    UrlRules,
    WebClient,
    WebdriverClient,
    WebRequest,
    WebService,
    address_is_public,
    canonical_host,
    collapse_text,
    last_headers,
    open_addresses,
    read_headers,
    read_web_settings,
    remove_profiles,
    signature_base,
)

from .support import PATIENCE, ThreadlessReactor, exit_reason, http_client, outcome

RULES = UrlRules()
SUFFIXES = PublicSuffixList(only_icann=True, accept_unknown=False)


def cause_of(url: str, rules: UrlRules = RULES) -> str:
    with pytest.raises(RequestFailure) as caught:
        rules.check(url)
    assert not caught.value.fatal
    return caught.value.causes[0]


# --- URLs ---


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "//example.com/",
        "/path",
        "http:example.com",
        "http:/example.com",
        "https:///path",
        "https://",
        "https://exa mple.com/",
        "https://example.com/\x01a",
        "https://example.com/\x7fa",
        "https://example.com\\@evil.org/",
        "https://evil.org\\.example.com/",
        "https://user:pass@example.com/",
        "https://user@example.com/",
        "https://example.com:0/",
        "https://example.com:65536/",
        "https://example.com:http/",
        "https://example.com:-1/",
        "https://example.com:٤٤٣/",
        "https://exa%6dple.com/",
        "https://example..com/",
        "https://.example.com/",
        "https://-example.com/",
        "https://example-.com/",
        "https://exa$mple.com/",
        "https://[::1/",
        "https://[::1]x/",
        "https://[fe80::1%25eth0]/",
        "https://256.256.256.256/",
        "https://1.2.3.4.5/",
        "https://example.1/",
        "https://xn--a.com/",
        "https://" + "a" * 64 + ".com/",
        "https://" + "a." * 130 + "com/",
        "https://example.com/" + "a" * 9000,
        "https://example.com/\ud800",
    ],
)
def test_malformed(url: str) -> None:
    assert cause_of(url) == "MALFORMED_URL"


@pytest.mark.parametrize(
    "url", ["ftp://example.com/", "file:///etc/passwd", "data:text/plain,x", "javascript:x", "ws:x"]
)
def test_schemes(url: str) -> None:
    assert cause_of(url) == "SCHEMA_FORBIDDEN"


@pytest.mark.parametrize("port", [1, 22, 81, 8080, 8443, 65535])
def test_ports(port: int) -> None:
    assert cause_of(f"https://example.com:{port}/") == "PORT_FORBIDDEN"
    # The port is looked at before the name.
    assert cause_of(f"http://localhost:{port}/") == "PORT_FORBIDDEN"


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "com",
        "example.local",
        "example.internal",
        "example.onion",
        "127.0.0.1",
        "8.8.8.8",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[2606:4700::1111]",
        "１２７.0.0.1",  # noqa: RUF001  # wide digits are meant
        "example.com.localhost",
    ],
)
def test_top_level_domains(host: str) -> None:
    assert cause_of(f"https://{host}/") == "TLD_FORBIDDEN"


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("https://example.com", "https://example.com/"),
        ("HTTPS://EXAMPLE.COM:443/A?b#c", "https://example.com/A?b"),
        ("http://example.com:443/", "http://example.com:443/"),
        ("https://example.com.", "https://example.com/"),
        ("https://a_b.example.co.uk/?", "https://a_b.example.co.uk/?"),
        (
            "https://bücher.example.de/ü?ß=ü",
            "https://xn--bcher-kva.example.de/%C3%BC?%C3%9F=%C3%BC",
        ),
        ("https://пример.рф/", "https://xn--e1afmkfd.xn--p1ai/"),
        ("https://xn--e1afmkfd.xn--p1ai/", "https://xn--e1afmkfd.xn--p1ai/"),
        ("https://example。com/", "https://example.com/"),
        ("https://example.com/%41?x=%20&y=a+b", "https://example.com/%41?x=%20&y=a+b"),
        ("https://example.com?q", "https://example.com/?q"),
        ("https://example.com/a@b:c//d", "https://example.com/a@b:c//d"),
        (" \x00\thttps://example.com/a b?c d \n", "https://example.com/a%20b?c%20d"),
        ("https://exa\nmp\tle.com/\r\n", "https://example.com/"),
        ("https://example.com/a/../b", "https://example.com/b"),
        ("https://example.com/a/./b/.", "https://example.com/a/b/"),
        ("https://example.com/a/b/..", "https://example.com/a/"),
        ("https://example.com/../../a", "https://example.com/a"),
        ("https://example.com/a/%2E%2e/b%2f../.%2e/c?d/../e", "https://example.com/c?d/../e"),
        ("https://example.com/a//../b/...", "https://example.com/a/b/..."),
        ("https://example.com?/../a", "https://example.com/?/../a"),
    ],
)
def test_what_passes(url: str, normal: str) -> None:
    assert RULES.check(url).url == normal


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("https://example.com#/route", "https://example.com/#/route"),
        ("https://example.com/?a#/b c?d=é#f", "https://example.com/?a#/b%20c?d=%C3%A9#f"),
        ("https://example.com/#", "https://example.com/"),
    ],
)
def test_fragments(url: str, place: str) -> None:
    target = RULES.check(url)
    assert target.place == place
    assert target.url == place.partition("#")[0]


@pytest.mark.parametrize(
    ("url", "member"),
    [
        ("ftp://example.com/", {"schema": "ftp"}),
        ("https://example.com:8080/", {"port": 8080}),
        ("https://a.example.internal/", {"tld": "internal"}),
        ("https://localhost/", {"tld": "localhost"}),
        ("https://127.1/", {"tld": "127.0.0.1"}),
    ],
)
def test_what_was_wrong_stands_in_the_context(url: str, member: dict[str, Any]) -> None:
    with pytest.raises(RequestFailure) as caught:
        RULES.check(url)
    context = caught.value.context
    assert {k: v for k, v in context.items() if k not in ("url", "reason")} == member
    assert context["url"] == url


def test_always_allowed_hosts_come_before_ports_and_domains() -> None:
    rules = UrlRules(["LocalHost", "127.0.0.1", "::1", "bücher.test"])
    for url in (
        "http://localhost:8080/",
        "http://127.1:1234/",
        "http://2130706433/",
        "http://[0::1]:99/",
        "http://xn--bcher-kva.test/",
    ):
        assert rules.check(url).trusted
    assert cause_of("ftp://localhost/", rules) == "SCHEMA_FORBIDDEN"
    assert cause_of("http://127.0.0.2/", rules) == "TLD_FORBIDDEN"
    assert not rules.check("https://example.com/").trusted


def test_extra_domains_in_both_forms() -> None:
    rules = UrlRules((), ["test", ".пример"])
    assert rules.check("https://a.test/").host == "a.test"
    assert rules.check("https://a.пример/").host == "a.xn--e1afmkfd"
    assert cause_of("https://test/", rules) == "TLD_FORBIDDEN"


PUBLIC = (
    *("a.com", "a.co.uk", "co.uk", "www.ck", "a.b.ck", "a.co.za", "a.museum", "a.arpa", "a.zw"),
    *("a.github.io", "a.xn--p1ai", "a.xn--fiqs8s"),
)


@pytest.mark.parametrize("host", PUBLIC)
def test_hosts_under_public_domains(host: str) -> None:
    assert RULES.check(f"https://{host}/").host == host


@given(st.text(max_size=60) | st.text(alphabet="htps:/.@[]%?#\\x0123abc", max_size=40))
@example("https://\u3002")
@example("http://[")
@example("http://0x")
@example("0.AL#")
def test_no_text_gets_past_the_rules(text: str) -> None:
    for url in (text, f"https://{text}", f"https://{text}.com/"):
        try:
            target = RULES.check(url)
        except RequestFailure as failure:
            assert failure.answer()["UserError"]
            continue
        assert target.port in (80, 443)
        assert target.host.isascii()
        assert SUFFIXES.publicsuffix(target.host) is not None
        assert target.url.isascii()
        # A page may have a fragment, which no server sees.
        assert RULES.check(target.url) == attrs.evolve(target, fragment="")


@given(st.integers(0, 2**32 - 1))
def test_all_spellings_of_an_address_are_one(value: int) -> None:
    address = ipaddress.IPv4Address(value)
    a, b, c, d = address.packed
    tail = value & 0xFFFFFF
    for spelling in (
        str(address),
        str(value),
        hex(value),
        f"0{value:o}",
        f"{a}.{tail}",
        f"{a}.{b}.{value & 0xFFFF}",
        f"0{a:o}.0x{b:x}.{c}.0{d:o}",
    ):
        assert canonical_host(spelling) == str(address)


# --- addresses ---


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.255.255.254",
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",
        "0.0.0.0",
        "0.1.2.3",
        "100.64.0.1",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "198.18.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:0:127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::808:808",
        "2002:7f00:1::",
        "2002:a00:1::1",
        "2002:808:808::1",
        "2001:0:1::1",
        "2001:db8::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd00:ec2::254",
        "fec0::1",
        "ff02::1",
        "4000::1",
        "no address",
        "",
    ],
)
def test_forbidden_addresses(address: str) -> None:
    assert not address_is_public(address)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "172.32.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"],
)
def test_public_addresses(address: str) -> None:
    assert address_is_public(address)


@given(st.integers(0, 2**32 - 1))
def test_no_address_is_public_that_the_standard_library_calls_private(value: int) -> None:
    address = ipaddress.IPv4Address(value)
    if not address.is_global or address.is_multicast or address.is_reserved:
        assert not address_is_public(str(address))
        for carrier in ("::ffff:", "64:ff9b::"):
            assert not address_is_public(f"{carrier}{address}")
        assert not address_is_public(str(ipaddress.IPv6Address(0x2002 << 112 | value << 80)))


@given(st.integers(0, 2**128 - 1))
def test_no_ipv6_address_is_public_that_the_standard_library_calls_private(value: int) -> None:
    address = ipaddress.IPv6Address(value)
    if not address.is_global:
        assert not address_is_public(str(address))


class Resolver:
    """Looks up names: gives one list of addresses after the other."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, name: str) -> list[str]:
        self.asked.append(name)
        return self.answers.pop(0)


TARGET = Target("https", "example.com", 443)
FORBIDDEN = ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "0.0.0.0"]


def connect(reactor: Any, target: Target, resolver: Resolver) -> Deferred[Any]:
    endpoint = CheckedEndpoint(reactor, target, Traffic(100, resolver))
    return endpoint.connect(Factory.forProtocol(Protocol))


def problem_of(deferred: Deferred[Any]) -> BaseException:
    found: list[BaseException] = []

    def keep(failure: Failure) -> None:
        assert failure.value is not None
        found.append(failure.value)

    deferred.addErrback(keep)
    assert found
    return found[0]


@pytest.mark.parametrize("address", FORBIDDEN)
def test_names_that_lead_inside(address: str) -> None:
    reactor: Any = MemoryReactorClock()
    error = problem_of(connect(reactor, TARGET, Resolver([address])))
    assert isinstance(error, RequestFailure)
    assert error.causes == ("ADDRESS_FORBIDDEN",)
    assert not error.fatal
    assert reactor.tcpClients == []


def test_the_address_checked_is_the_address_connected_to() -> None:
    # The second answer, which leads inside, is never asked for.
    reactor: Any = MemoryReactorClock()
    resolver = Resolver(["93.184.216.34"], ["127.0.0.1"])
    connect(reactor, TARGET, resolver)
    assert [client[:2] for client in reactor.tcpClients] == [("93.184.216.34", 443)]
    assert resolver.asked == ["example.com."]
    # And a second connection is checked anew.
    assert isinstance(problem_of(connect(reactor, TARGET, resolver)), RequestFailure)
    assert len(reactor.tcpClients) == 1


def test_only_the_open_addresses_of_a_name_are_tried() -> None:
    resolver = Resolver(["10.0.0.1", "2606:4700::1111", "1.1.1.1", "::1"])
    found: list[Any] = []
    Deferred.fromCoroutine(open_addresses(resolver, TARGET)).addCallback(found.append)
    assert found == [["2606:4700::1111", "1.1.1.1"]]


def test_trusted_hosts_may_be_anywhere() -> None:
    reactor: Any = MemoryReactorClock()
    connect(reactor, Target("http", "localhost", 8080, trusted=True), Resolver(["127.0.0.1"]))
    assert reactor.tcpClients[0][:2] == ("127.0.0.1", 8080)


def test_a_name_without_addresses() -> None:
    reactor: Any = MemoryReactorClock()
    assert isinstance(problem_of(connect(reactor, TARGET, Resolver([]))), DNSLookupError)


def test_bytes_are_counted() -> None:
    traffic = Traffic(10, Resolver())
    assert traffic.take(10)
    assert not traffic.take(1)
    assert traffic.received == 11


# --- names ---


class Threads:
    """A reactor and its pool: each call in a thread, known by its argument, waits for a word."""

    def __init__(self) -> None:
        self.running: dict[Any, Callable[[], object]] = {}

    def getThreadPool(self) -> Threads:
        return self

    def callInThreadWithCallback(self, done: Any, function: Any) -> None:
        (name,) = inspect.getclosurevars(function).nonlocals["arguments"]

        def finish() -> None:
            try:
                result = function()
            except Exception:
                done(False, Failure())
            else:
                done(True, result)

        self.running[name] = finish

    def callFromThread(self, function: Any, *given: Any) -> None:
        function(*given)

    def run(self, reactor: object, seconds: None, work: Any, name: str) -> Deferred[Any]:
        """See ``SpareThreads``."""
        done: Deferred[Any] = Deferred()
        self.running[name] = lambda: maybeDeferred(work, name).chainDeferred(done)
        return done

    def answer(self, name: object) -> None:
        self.running.pop(name)()


def address_of(name: str) -> list[str]:
    if name == "broken":
        raise OSError("no resolver")
    return [f"address of {name}"]


@pytest.fixture
def threads() -> Threads:
    return Threads()


@pytest.fixture
def names(threads: Threads) -> Names:
    return Names(threads, cast(Any, threads), address_of)


def ask(names: Names, caller: object, *wanted: str) -> list[Deferred[Any]]:
    look_up = names.look_up_for(caller)
    return [Deferred.fromCoroutine(cast(Any, look_up(name))) for name in wanted]


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def cancelled(lookup: Deferred[Any]) -> bool:
    lookup.cancel()
    return isinstance(problem_of(lookup), CancelledError)


def test_a_caller_has_few_lookups_at_once(names: Names, threads: Threads) -> None:
    many = numbered("a", NAME_THREADS * 2)
    lookups = ask(names, "one", *many)
    assert list(threads.running) == many[:CALLER_LOOKUPS]
    # The rest stands in a line of its own, and nobody else behind it.
    (other,) = ask(names, "two", "b")
    threads.answer("b")
    assert other.result == ["address of b"]
    for position, name in enumerate(many):
        assert list(threads.running) == many[position : position + CALLER_LOOKUPS]
        threads.answer(name)
    assert [lookup.result for lookup in lookups] == [[f"address of {name}"] for name in many]


def test_who_leaves_the_line_is_not_looked_up(names: Names, threads: Threads) -> None:
    first, *_, waiting, last = ask(names, "one", *numbered("a", CALLER_LOOKUPS + 2))
    assert cancelled(waiting)
    # A thread cannot be cancelled: it goes on, and counts, also for the caller's next request.
    assert cancelled(first)
    ask(names, "one", "next")
    assert list(threads.running) == numbered("a", CALLER_LOOKUPS)
    threads.answer("a0")
    assert list(threads.running)[-1] == f"a{CALLER_LOOKUPS + 1}"
    threads.answer("a1")
    assert list(threads.running)[-1] == "next"
    threads.answer(f"a{CALLER_LOOKUPS + 1}")
    assert last.result == [f"address of a{CALLER_LOOKUPS + 1}"]


def test_all_threads_are_taken(names: Names, threads: Threads) -> None:
    for caller in range(NAME_THREADS // CALLER_LOOKUPS):
        ask(names, caller, *numbered(f"{caller}-", CALLER_LOOKUPS + 1))
    taken = list(threads.running)
    assert len(taken) == NAME_THREADS
    given_up = ask(names, "late", *numbered("x", CALLER_LOOKUPS))
    ask(names, "late", "mine")
    ask(names, "later", "yours")
    assert list(threads.running) == taken
    # Who gives up leaves both lines: the one for threads, and the caller's own.
    assert all(map(cancelled, given_up))
    for name, following in (("0-0", "yours"), ("0-1", "mine"), ("1-0", "0-4"), ("1-1", "1-4")):
        threads.answer(name)
        assert list(threads.running)[-1] == following


def test_a_resolver_that_fails(names: Names, threads: Threads) -> None:
    for _ in range(NAME_THREADS + 1):
        (lookup,) = ask(names, "one", "broken")
        threads.answer("broken")
        assert isinstance(problem_of(lookup), OSError)


def test_callers_are_forgotten(names: Names, threads: Threads) -> None:
    caller = Threads()  # anything that can be referred to weakly
    reference = weakref.ref(caller)
    (lookup,) = ask(names, caller, "a")
    lookup.cancel()
    problem_of(lookup)
    del caller
    gc.collect()
    assert reference() is not None
    threads.answer("a")
    del lookup
    gc.collect()
    assert reference() is None


_HANGING = """
import threading
from genvm_manager import Names
from twisted.internet import reactor
from twisted.internet.defer import Deferred

hangs = threading.Semaphore(0)
names = Names(reactor, resolve=lambda name: (hangs.release(), threading.Event().wait()))
for name in "ab":
    Deferred.fromCoroutine(names.look_up_for(name)(name))
for _ in range(2):
    assert hangs.acquire(timeout=60)
print("the end")
"""


def test_a_lookup_that_hangs_keeps_nothing_from_ending() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _HANGING],
        capture_output=True,
        check=True,
        timeout=2 * PATIENCE,
        text=True,
    )
    assert ended.stdout == "the end\n"


# --- headers and redirects ---


def test_headers_of_contracts() -> None:
    given_headers: Any = {
        "Accept": b" text/html ",
        "HOST": b"evil",
        "Content-Length": b"9",
        "x": "t",
    }
    assert read_headers(given_headers) == {"accept": b"text/html", "x": b"t"}
    assert read_headers(None) == {}
    for name, value in (
        ("a b", b"x"),
        ("a\r\n", b"x"),
        ("", b""),
        ("x", b"a\r\nb: c"),
        ("x", b"\0"),
    ):
        with pytest.raises(RequestFailure) as caught:
            read_headers({name: value})
        assert caught.value.causes == ("INVALID_HEADER",)
    with pytest.raises(RequestFailure, match="INVALID_REQUEST"):
        read_headers({"x": 1})
    many: Any = {f"x{number}": b"" for number in range(100_000)}
    long: Any = {"x": b"y" * (WEB_HEAD_MAX_BYTES + 1)}
    for large in (many, long):
        with pytest.raises(RequestFailure, match="INVALID_HEADER") as caught:
            read_headers(large)
        assert caught.value.context["reason"] == "the headers are longer than 131072 bytes"


def test_the_last_header_of_a_name_counts() -> None:
    headers = Headers({b"X-A": [b"1", b"2"], b"Set-Cookie": [b"a=1, b", b"c=2"]})
    assert last_headers(headers) == {"x-a": b"2", "set-cookie": b"c=2"}


REQUEST = WebRequest(
    "POST",
    RULES.check("https://example.com/a"),
    {"authorization": b"s", "content-type": b"t", "x": b"y", "signature": b"z"},
    b"body",
)


@pytest.mark.parametrize(
    ("method", "status", "expected"),
    [
        ("POST", 301, "GET"),
        ("POST", 302, "GET"),
        ("POST", 303, "GET"),
        ("PUT", 303, "GET"),
        ("PUT", 302, "PUT"),
        ("HEAD", 303, "HEAD"),
        ("POST", 307, "POST"),
        ("POST", 308, "POST"),
    ],
)
def test_methods_after_redirects(method: str, status: int, expected: str) -> None:
    sent = WebRequest(method, REQUEST.target, REQUEST.headers, REQUEST.body)
    followed = sent.redirected(status, RULES.check("https://example.com/b"))
    assert followed.method == expected
    assert (followed.body is None) == (method not in ("HEAD",) and expected == "GET")
    assert ("content-type" in followed.headers) == (followed.body is not None)
    assert followed.headers["authorization"] == b"s"
    assert "signature" not in followed.headers


def test_secrets_stay_with_their_host() -> None:
    for url in ("https://other.com/", "http://example.com/", "https://example.com:80/"):
        followed = REQUEST.redirected(307, RULES.check(url))
        assert followed.headers == {"content-type": b"t", "x": b"y"}


# --- signatures ---


def test_signature_base() -> None:
    headers = {
        "genlayer-node-address": b"0xaa",
        "genlayer-tx-id": b"0xbb",
        "genlayer-salt": b"c2FsdA==",
        "content-digest": b"sha-256=:ZA==:",
        "other": b"x",
    }
    request = WebRequest("POST", RULES.check("http://example.com:443/p?q=1"), headers, b"")
    base, parameters = signature_base(request, 1700000000)
    assert parameters == (
        '("@method" "@authority" "@path" "genlayer-node-address" "genlayer-tx-id" '
        '"genlayer-salt" "content-digest" "@query");created=1700000000;alg="ES256K"'
    )
    assert base == (
        '"@method": POST\n"@authority": example.com:443\n"@path": /p\n'
        '"genlayer-node-address": 0xaa\n"genlayer-tx-id": 0xbb\n"genlayer-salt": c2FsdA==\n'
        f'"content-digest": sha-256=:ZA==:\n"@query": ?q=1\n"@signature-params": {parameters}'
    )


class UnreachableSigner:
    """The HTTP client of a signer that cannot be reached; keeps what it would have signed."""

    def __init__(self) -> None:
        self.bases: list[bytes] = []

    async def request(self, method: str, url: str, *, data: bytes, **_: object) -> None:
        self.bases.append(data)
        raise ConnectionRefusedError


@pytest.mark.parametrize("size", [INLINE_DIGEST_BYTES, INLINE_DIGEST_BYTES + 1])
def test_large_bodies_are_hashed_in_a_thread(threads: Threads, size: int) -> None:
    http, body = UnreachableSigner(), bytes(size)
    signer = RequestSigner("http://signer/", {}, http_client(http), threads)
    request = WebRequest("POST", RULES.check("https://example.com/"), {}, body)
    work = Deferred.fromCoroutine(signer.sign(request, Caller("c1", None, {})))
    assert (body in threads.running) == (size > INLINE_DIGEST_BYTES)
    for waiting in list(threads.running):
        assert http.bases == []
        threads.answer(waiting)
    assert isinstance(problem_of(work), RequestFailure)
    digest = base64.b64encode(hashlib.sha256(body).digest())
    assert b'"content-digest": sha-256=:' + digest + b":\n" in http.bases[0]


class SilentServer:
    """An HTTP client whose server never answers."""

    def request(self, method: str, url: str, **_: object) -> Deferred[Any]:
        """Return what never fires."""
        return Deferred()


@pytest.mark.parametrize("name", ["Request", "Render"])
def test_loading_takes_nothing_of_a_time_limit(name: str) -> None:
    """Neither of the signer's nor of the webdriver's, which are asked first."""
    clock, loading = MemoryReactorClock(), Deferred[None]()
    http = http_client(SilentServer(), loading)
    config = {"always_allow_hosts": ["127.0.0.1"], "timeout": 5}
    service = WebService(
        read_web_settings(AnyObject(config)),
        clock,
        http,
        WebClient(clock, RULES),
        RequestSigner("http://signer/", {}, http, clock),
        WebdriverClient(clock, http, "http://webdriver", 5.0),
        Names(clock),
    )
    payload: Any = {"method": "GET", "url": "http://127.0.0.1/", "sign": True, "mode": "text"}
    work = service.answer(name, payload, Caller("c1", None, {}))
    answer = outcome(Deferred.fromCoroutine(work))
    clock.advance(20)
    assert answer == []
    loading.callback(None)
    clock.advance(4.9)
    assert answer == []
    clock.advance(0.2)
    (failure,) = answer
    assert failure.causes == ("TIMEOUT",)


# --- text and configuration ---


def test_collapsed_text() -> None:
    assert collapse_text("  a \t\u00a0 b \r\n\n \n c\u2028d\n") == "a b\nc\nd"
    assert collapse_text(" \n ") == ""


@given(st.text())
def test_collapsing_twice_changes_nothing(text: str) -> None:
    once = collapse_text(text)
    assert collapse_text(once) == once
    assert "\n\n" not in once
    assert "  " not in once


def test_stale_profiles(tmp_path: Path) -> None:
    """What a killed module left behind goes; what a module has locked, or somebody's, stays."""
    for name in ("genvm-page-left", "genvm-page-used", "other"):
        (tmp_path / name / "genvm-manager" / "profile").mkdir(parents=True)
    (tmp_path / "genvm-page-somebody" / "home").mkdir(parents=True)
    (tmp_path / "genvm-page-file").touch()
    (tmp_path / "genvm-page-link").symlink_to(tmp_path / "other")
    kept = {"genvm-page-somebody", "genvm-page-file", "genvm-page-link", "other"}
    lock = os.open(tmp_path / "genvm-page-used", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not remove_profiles(str(tmp_path))
        assert set(os.listdir(tmp_path)) == {"genvm-page-used", *kept}
        assert os.listdir(tmp_path / "other") == ["genvm-manager"]
    finally:
        os.close(lock)
    assert remove_profiles(str(tmp_path))
    assert set(os.listdir(tmp_path)) == kept


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"always_allow_hosts": "x"}, "always_allow_hosts: expected an array"),
        ({"always_allow_hosts": ["ok.com", "a b"]}, "always_allow_hosts[1]: "),
        ({"always_allow_hosts": ["localhost:80"]}, "always_allow_hosts[0]: "),
        ({"extra_tld": ["a.b"]}, "extra_tld[0]: "),
        ({"extra_tld": [1]}, "extra_tld[0]: expected a string"),
        ({"webdriver_host": "ftp://x"}, "webdriver_host: expected a URL"),
        ({"webdriver_host": 1}, "webdriver_host: expected a string"),
        ({"signer_url": 1}, "signer_url: expected a string"),
        ({"signer_headers": {"a": 1}}, "signer_headers.a: "),
        ({"timeout": "x"}, "timeout: expected"),
        ({"timeout": 0}, "timeout: expected more than 0"),
        ({"render_timeout": "-1s"}, "render_timeout: expected"),
        ({"max_renders": 0}, "max_renders: expected an integer of at least 1"),
        ({"render_memory_mib": 1.5}, "render_memory_mib: expected an integer"),
    ],
)
def test_wrong_settings_are_named(config: dict[str, Any], problem: str) -> None:
    with pytest.raises((ConfigError, InvalidRequest)) as caught:
        read_web_settings(AnyObject(config))
    assert caught.value.message.startswith(problem)


def test_settings() -> None:
    settings = read_web_settings(AnyObject({"webdriver_host": "http://wd:4444/"}))
    assert settings.webdriver == "http://wd:4444"
    assert (float(settings.entry.timeout), settings.entry.max_renders) == (30, 2)
    assert settings.render_timeout == 75
    assert settings.entry.signer_url == ""
    assert read_web_settings(AnyObject({"webdriver_host": ""})).webdriver == ""
    chromium = read_web_settings(AnyObject({"webdriver_host": "chromium"}))
    assert (chromium.webdriver, chromium.render_timeout) == ("chromium", 30)
    given = {"webdriver_host": "http://wd:4444/", "render_timeout": "40s"}
    assert read_web_settings(AnyObject(given)).render_timeout == 40


class LeavingBrowser:
    """Answers at once; while the page's text is read, the page goes where nothing is."""

    def __init__(self, on_event: Callable[[str, dict[str, Any]], None], _on_gone: object) -> None:
        self._on_event = on_event

    async def call(self, method: str, _session: str | None = None, **_: object) -> dict[str, Any]:
        """Return all that any of the commands is answered with."""
        if method == "Page.navigate":
            seen = {
                "type": "Document",
                "frameId": "f",
                "requestId": "r",
                "response": {"status": 200},
            }
            self._on_event("Network.responseReceived", seen)
            self._on_event("Page.loadEventFired", {})
        elif method == "Runtime.evaluate":
            frame = {"id": "f", "unreachableUrl": "http://gone.test/"}
            self._on_event("Page.frameNavigated", {"frame": frame})
        names = ("browserContextId", "targetId", "sessionId", "executionContextId")
        frame_tree = {"frame": {"id": "f"}}
        return {**dict.fromkeys(names, "x"), "frameTree": frame_tree, "result": {"value": ""}}


def test_what_is_read_of_a_page_that_has_gone_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genvm_manager, "BrowserProcess", LeavingBrowser)
    reactor = MemoryReactorClock()
    gate = SocksGate(reactor, RULES, Traffic(100, lambda _: Deferred()))
    visit = PageVisit(reactor, RULES, Target("http", "page.test", 80), gate)
    answer = outcome(Deferred.fromCoroutine(visit.render("text", 1.0, 9.0)))
    reactor.advance(1.0)
    (failure,) = answer
    assert isinstance(failure, RequestFailure)
    assert "it went to http://gone.test/, which cannot be loaded" in str(failure.context)


class ShortOfThreads(ThreadlessReactor):
    """Has no thread before ``has_threads``; a process of it ends when it is killed."""

    pid, has_threads = 0, False
    browser: Any = None

    def callInThreadWithCallback(self, *given: Any, **options: Any) -> None:
        if not self.has_threads:
            raise RuntimeError("can't start new thread")
        super().callInThreadWithCallback(*given, **options)

    def spawnProcess(self, browser: Any, *_: object, **__: object) -> None:
        self.browser = browser
        browser.makeConnection(self)

    def writeToChild(self, descriptor: int, data: bytes) -> None:
        """Answer nothing."""

    def signalProcess(self, name: str) -> None:
        self.browser.processExited(exit_reason(None, 9))


def test_nothing_is_left_of_a_page_whose_memory_could_not_be_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(genvm_manager, "kill_strays", lambda *_: False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reactor = ShortOfThreads()
    renderer = ChromiumRenderer(
        reactor, RULES, "chromium", DeferredSemaphore(1), timeout=30.0, memory_mib=100
    )
    traffic = Traffic(100, Resolver())
    answer = outcome(Deferred.fromCoroutine(renderer.render(TARGET, "text", 1.0, traffic)))
    reactor.advance(1.0)
    assert answer == []
    assert len(os.listdir(tmp_path)) == 1
    reactor.has_threads = True
    reactor.signalProcess("SEGV")
    reactor.work()
    (failure,) = answer
    assert failure.causes == ("RENDERER_FAILED",)
    assert os.listdir(tmp_path) == []
