"""Clients that misbehave below the level of requests, and who may make requests at all."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Start
from .support import (
    Daemon,
    Reply,
    Root,
    eventually,
    memory_of,
    received,
    report,
    run_body,
    timed,
    watched,
)

MIB = 1 << 20
TOKEN = "correct-horse-battery-staple"


def talk(daemon: Daemon, *parts: bytes) -> Reply:
    """Send bytes on a connection of their own and return the response."""
    with daemon.connect() as peer:
        for part in parts:
            try:
                peer.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                break
        return response_on(peer)


def response_on(peer: socket.socket) -> Reply:
    """Read one response, which must be JSON."""
    with http.client.HTTPResponse(peer) as response:
        response.begin()
        body = response.read()
        headers = {name.lower(): value for name, value in response.getheaders()}
    assert headers["content-type"] == "application/json; charset=utf-8", body[:500]
    return Reply(response.status, headers, json.loads(body), body)


# --- HTTP that is not well-formed ---


DRAIN = b"POST /drain HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"POST\r\n\r\n",
        b"POST /drain\r\n\r\n",
        b"POST /drain HTTP/9.9\r\n\r\n",
        b"POST /drain FTP/1.1\r\n\r\n",
        b" POST /drain HTTP/1.1\r\n\r\n",
        DRAIN + b"no colon here\r\n\r\n",
        DRAIN + b"X : y\r\n\r\n",
        DRAIN + b": empty\r\n\r\n",
        DRAIN + b"X: a\0b\r\n\r\n",
        DRAIN + b"Content-Length: nine\r\n\r\n",
        DRAIN + b"Content-Length: -1\r\n\r\n",
        DRAIN + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        DRAIN + b"Transfer-Encoding: gzip\r\n\r\n",
        DRAIN + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        DRAIN + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        DRAIN + b"Transfer-Encoding: chunked\r\n\r\n1\r\nxy\r\n0\r\n\r\n",
        DRAIN + b"X: " + b"x" * 100_000 + b"\r\n\r\n",
        DRAIN + b"X: y\r\n" * 10_000 + b"\r\n",
        b"POST /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        bytes(range(256)) * 4 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500) + b"\r\n\r\n",
    ],
    ids=lambda data: repr(data[:70]),
)
@pytest.mark.parametrize("pipelined", [False, True])
def test_malformed_http(daemon: Daemon, request_bytes: bytes, pipelined: bool) -> None:
    """An error in JSON; neither the request is executed nor one that follows it."""
    reply = talk(daemon, request_bytes + (DRAIN + b"\r\n" if pipelined else b""))
    assert 400 <= reply.status <= 500
    assert {"error", "code", "retryable"} <= set(reply.json)
    assert reply.headers["connection"] == "close"


@pytest.mark.parametrize(
    "head",
    [b"GET /" + b"x" * 20_000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 501],
    ids=["long line", "many headers"],
)
def test_a_head_that_is_too_large_is_told_the_limits(daemon: Daemon, head: bytes) -> None:
    error = talk(daemon, head + b"\r\n\r\n").json["error"]
    assert "500 headers" in error
    assert "16384 bytes" in error


def test_malformed_http_closes_the_connection(daemon: Daemon) -> None:
    with daemon.connect() as peer:
        peer.sendall(DRAIN + b"no colon here\r\n\r\n")
        assert received(peer).count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Host: \xff\xfe", 403),
        (b"Origin: http://\xff", 403),
        (b"Authorization: Bearer \xff", 200),
        (b"Idempotency-Key: \xff\xfe", 200),
        (b"Host: ", 403),
        (b"Host: localhost\r\nHost: evil.example", 400),
        (b"Origin: ", 403),
    ],
)
def test_odd_headers(daemon: Daemon, header: bytes, status: int) -> None:
    """A header that means something here is refused; another one does no harm."""
    body = json.dumps({"level": "info"}).encode()
    host = b"" if header.startswith(b"Host") else b"Host: localhost\r\n"
    head = b"POST /log/level HTTP/1.1\r\n%s%s\r\nContent-Length: %d\r\n\r\n"
    reply = talk(daemon, head % (host, header, len(body)) + body)
    assert reply.status == status
    code = {400: "invalid_request", 403: "cross_site_request"}.get(status)
    assert reply.json.get("code") == code


def test_an_idempotency_key_that_is_not_text(daemon: Daemon) -> None:
    body = json.dumps(run_body("exit 0")).encode()
    head = b"POST /genvm/run HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: \xff\r\n"
    reply = talk(daemon, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert reply.status == 200, reply.raw
    assert daemon.result(reply.json["id"])["exit_code"] == 0


def test_two_requests_in_one_packet(daemon: Daemon) -> None:
    one = b"GET /permits HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /permits HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with daemon.connect() as peer:
        peer.sendall(one * 3 + last)
        answer = received(peer)
    assert answer.count(b"HTTP/1.1 200 OK") == 4
    assert answer.count(b'"permits":8') == 4


def test_a_request_byte_by_byte(daemon: Daemon) -> None:
    request = b"GET /permits HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with daemon.connect() as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(request)):
            peer.sendall(request[at : at + 1])
        assert response_on(peer).status == 200


def test_http_1_0(daemon: Daemon) -> None:
    assert talk(daemon, b"GET /permits HTTP/1.0\r\n\r\n").status == 200


def test_head(daemon: Daemon) -> None:
    with daemon.connect() as peer:
        peer.sendall(b"HEAD /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = received(peer)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body == b""


def test_clients_that_hang_up_at_every_moment(daemon: Daemon) -> None:
    body = json.dumps({"level": "info"}).encode()
    request = (
        b"POST /log/level HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    ) + body
    before = len([r for r in daemon.records if "traceback" in r])
    for at in range(0, len(request) + 1, 3):
        with daemon.connect() as peer:
            peer.sendall(request[:at])
    assert daemon.get("/status")["draining"] is False
    assert len([r for r in daemon.records if "traceback" in r]) == before


# --- the size of bodies ---


def test_a_body_over_the_limit_by_its_length(daemon: Daemon) -> None:
    head = b"POST /genvm/run HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    reply = talk(daemon, head % (64 * MIB + 1))
    assert (reply.status, reply.json["code"]) == (413, "body_too_large")
    assert "67108864" in reply.json["error"]


def test_a_body_over_the_limit_is_not_asked_for(daemon: Daemon) -> None:
    """A client that sends ``Expect: 100-continue`` is told before it sends anything."""
    head = (
        b"POST /genvm/run HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
        b"Content-Length: 999999999999\r\n\r\n"
    )
    with daemon.connect() as peer:
        peer.sendall(head)
        assert peer.recv(12) == b"HTTP/1.1 413"


@pytest.mark.parametrize("size", [b"Content-Length: 5000000", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue\r\n"])
def test_a_body_of_somebody_who_may_not_send_it(
    daemon: Daemon, guarded: Daemon, size: bytes, expect: bytes
) -> None:
    """The answer comes before the body, which would take room on the disk."""
    head = b"POST /genvm/run HTTP/1.1\r\n%s%s\r\nHost: %s\r\n\r\n"
    for asked, host, status in ((guarded, b"localhost", 401), (daemon, b"evil.example", 403)):
        with asked.connect() as peer:
            peer.sendall(head % (expect, size, host))
            reply = response_on(peer)
        assert reply.status == status
        assert reply.headers["connection"] == "close"
        assert ("www-authenticate" in reply.headers) == (status == 401)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_flood_of_a_body(start: Start, chunked: bool) -> None:
    """300 MB that nobody wants: refused while they arrive, and the manager does not grow."""
    daemon = start("--max-body-bytes", str(8 * MIB))
    before = daemon.peak_memory()
    piece = b"x" * MIB
    with daemon.connect() as peer:
        kind = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 314572800"
        peer.sendall(b"POST /genvm/run HTTP/1.1\r\nHost: localhost\r\n" + kind + b"\r\n\r\n")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(300):
                peer.sendall(b"%x\r\n%s\r\n" % (MIB, piece) if chunked else piece)
        reply = response_on(peer)
    assert (reply.status, reply.json["code"]) == (413, "body_too_large")
    grown = daemon.peak_memory() - before
    report(f"a body of 300 MiB (chunked: {chunked}) grows the manager by {grown / MIB:.1f} MiB")
    assert grown < 100 * MIB, "300 MiB were sent"


def test_a_body_at_the_limit(start: Start) -> None:
    daemon = start("--max-body-bytes", "1000")
    body = json.dumps({"permits": 5}).encode().ljust(1000)
    assert daemon.request("POST", "/permits", body).status == 200
    reply = daemon.request("POST", "/permits", body + b" ")
    assert (reply.status, reply.json["code"]) == (413, "body_too_large")


def test_large_bodies_do_not_hold_up_others(start: Start) -> None:
    """Four requests of 30 MB of JSON each, while others ask for the status."""
    daemon = start()
    body = json.dumps({"permits": "x", "rest": ["some text"] * 2_500_000}).encode()
    assert len(body) > 30_000_000

    def ask() -> None:
        pending = [daemon.send("POST", "/permits", body) for _ in range(4)]
        assert {one.reply().json["code"] for one in pending} == {"invalid_request"}

    watched(daemon, "JSON bodies of 30 MB", ask, least=50)


# --- slow and idle connections ---


def test_a_burst_of_connections(daemon: Daemon) -> None:
    """300 clients connect while the manager is stopped: there is room for all of them."""
    peers = []
    daemon.signal(signal.SIGSTOP)
    try:
        for _ in range(300):
            peers.append(daemon.connect())
    finally:
        daemon.signal(signal.SIGCONT)
        for peer in peers:
            peer.close()


def test_slow_loris_and_idle_connections(start: Start) -> None:
    """1500 connections that do nothing or trickle; the others do not notice."""
    daemon = start()
    before = memory_of(daemon.pid, "VmRSS")
    idle = [daemon.connect() for _ in range(1000)]
    trickling = [daemon.connect() for _ in range(500)]
    slow_body = [daemon.connect() for _ in range(50)]
    try:
        for peer in trickling:
            peer.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\n")
        for peer in slow_body:
            peer.sendall(
                b"POST /genvm/run HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000000\r\n\r\n"
            )
        for number in range(10):
            for peer in trickling:
                peer.sendall(b"X-%d: y\r\n" % number)
            for peer in slow_body:
                peer.sendall(b"x" * 1000)
        watched(daemon, "1550 bad connections", least=100)
        grown = memory_of(daemon.pid, "VmRSS") - before
        report(f"1550 idle and slow connections cost {grown / MIB:.1f} MiB")
        assert grown < 64 * MIB
        daemon.result(daemon.run("exit 0"))
    finally:
        for peer in (*idle, *trickling, *slow_body):
            peer.close()
    watched(daemon, "1550 connections that hang up", least=10)


def test_a_client_that_does_not_read_its_answer(start: Start) -> None:
    """Results of 8 MB that nobody takes are not piled up in memory."""
    daemon = start()
    genvm_id = daemon.run("spam stdout 4000000", "spam stderr 4000000", "exit 0")
    daemon.result(genvm_id)
    before = daemon.peak_memory()
    peers = [daemon.connect() for _ in range(40)]
    for peer in peers:
        peer.sendall(b"GET /genvm/%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % genvm_id)
    watched(daemon, "40 clients that do not read", least=30)
    grown = daemon.peak_memory() - before
    report(f"40 clients that do not read 8 MB each: {grown / MIB:.1f} MiB")
    assert grown < 120 * MIB, "320 MB were asked for"
    for peer in peers:
        peer.close()
    assert daemon.result(genvm_id)["exit_code"] == 0


def test_a_log_that_nobody_reads(start: Start) -> None:
    """A full pipe on stdout neither stops the manager nor keeps it from ending."""
    daemon = start("--log-level", "trace", read_log=False)
    spam = [daemon.run("spam log 1000000", "exit 0", capture_output=False) for _ in range(3)]
    for genvm_id in spam:
        # Three million bytes of log lines: on a busy machine they may take a minute.
        eventually(functools.partial(daemon.ended, genvm_id), 300.0, "it ends")
    watched(daemon, "a log that is stuck", least=30)
    begin = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    timed("the end of a manager whose log is stuck", time.monotonic() - begin, 1.0)


# --- who may make requests ---


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:3999", "127.0.0.1", "127.0.0.1:1", "127.8.9.1", "[::1]:80", "[::1]"],
)
def test_hosts_that_are_us(daemon: Daemon, host: str) -> None:
    assert daemon.request("GET", "/status", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "10.0.0.1", "localhost.evil.example", "127.0.0.1.x"]
)
def test_hosts_that_are_not_us(daemon: Daemon, host: str) -> None:
    reply = daemon.request("POST", "/env", {"key": "K", "value": "v"}, {"Host": host})
    assert (reply.status, reply.json["code"]) == (403, "cross_site_request")


def test_allowed_hosts(start: Start) -> None:
    daemon = start("--allowed-hosts", "manager.internal,other")
    for host in ("manager.internal", "Manager.Internal:3999", "other"):
        assert daemon.request("GET", "/status", headers={"Host": host}).status == 200
    assert daemon.request("GET", "/status", headers={"Host": "third"}).status == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://localhost.evil.example", "file://", "x"]
)
@pytest.mark.parametrize("path", ["/env", "/genvm/run", "/status", "/nothing"])
def test_foreign_origins(daemon: Daemon, origin: str, path: str) -> None:
    reply = daemon.request("POST", path, {"key": "K", "value": "v"}, {"Origin": origin})
    assert (reply.status, reply.json["code"]) == (403, "cross_site_request")
    assert "access-control-allow-origin" not in reply.headers


def test_our_own_origin(daemon: Daemon) -> None:
    headers = {"Origin": f"http://{daemon.address}"}
    assert daemon.request("GET", "/status", headers=headers).status == 200


def test_a_foreign_origin_on_another_port_of_this_machine(daemon: Daemon) -> None:
    reply = daemon.request("GET", "/status", headers={"Origin": "http://127.0.0.1:1"})
    assert reply.status == 403


def test_the_host_rule_does_not_matter_on_a_unix_socket(root: Root, start: Start) -> None:
    daemon = start(listen=("--socket", str(root.path / "m.sock")))
    assert daemon.request("GET", "/status", headers={"Host": "anything"}).status == 200
    reply = daemon.request("GET", "/status", headers={"Origin": "http://evil.example"})
    assert reply.status == 403


@pytest.fixture(scope="module")
def guarded(shared_root: Root) -> Iterator[Daemon]:
    """A daemon that requires a token."""
    path = shared_root.path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    flags = ("--auth-token-file", str(path), "--log-level", "trace")
    daemon = Daemon.serve(shared_root, *flags)
    yield daemon
    daemon.close()


@pytest.mark.parametrize(
    "value",
    [
        *(None, "", "Bearer", "Bearer ", "Bearer wrong", f"Bearer {TOKEN}x", f"Basic {TOKEN}"),
        *(TOKEN, f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN.upper()}", "Bearer \u00e9"),
    ],
)
def test_a_missing_or_wrong_token(guarded: Daemon, value: str | None) -> None:
    headers = {} if value is None else {"Authorization": value}
    for method, path in (("GET", "/status"), ("POST", "/genvm/run"), ("GET", "/nothing")):
        reply = guarded.request(method, path, run_body("exit 0"), headers)
        assert (reply.status, reply.json["code"]) == (401, "unauthorized")
        assert reply.headers["www-authenticate"].startswith("Bearer")
        assert TOKEN not in reply.raw.decode()


def test_the_token(guarded: Daemon) -> None:
    for scheme in ("Bearer", "bearer"):
        headers = {"Authorization": f"{scheme} {TOKEN}", "Host": "any.name.at.all"}
        reply = guarded.request("POST", "/genvm/run", run_body(f"log info {TOKEN}"), headers)
        assert reply.status == 200
        genvm_id = reply.json["id"]
        assert guarded.request("GET", f"/genvm/{genvm_id}?wait=10s", headers=headers).status == 200
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert guarded.request("POST", f"/{TOKEN}", headers=headers).status == 404
    assert guarded.request("POST", "/log/level", {"level": TOKEN}, headers).status == 500
    body = run_body(f"log info {TOKEN}", "exit 0", capture_output=False)
    genvm_id = guarded.request("POST", "/genvm/run", body, headers).json["id"]
    guarded.request("GET", f"/genvm/{genvm_id}?wait=10s", headers=headers)
    guarded.stop()
    assert TOKEN not in guarded.text + guarded.errors


def test_a_token_allows_to_listen_everywhere(root: Root, start: Start, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    daemon = start("--auth-token-file", str(tmp_path / "token"), "--host", "0.0.0.0")
    daemon.address = daemon.address.replace("0.0.0.0", "127.0.0.1")
    assert daemon.request("GET", "/status").status == 401
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert daemon.request("GET", "/status", headers=headers).status == 200


def test_an_empty_token_file_is_refused(root: Root, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(" \n")
    argv = ["--auth-token-file", str(tmp_path / "token")]
    with pytest.raises(AssertionError, match="is empty"):
        Daemon.serve(root, *argv)
