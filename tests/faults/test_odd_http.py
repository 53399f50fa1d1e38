"""HTTP that is unusual, and what is not HTTP."""

from __future__ import annotations

import gzip
import json
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator

import pytest

from ..integration.conftest import Start
from ..integration.support import (
    WAIT,
    Daemon,
    Root,
    eventually,
    received,
    run_body,
    shell,
    sockets_of,
    timed,
)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    made = Root()
    made.practice()
    daemon = Daemon.serve(made)
    yield daemon
    daemon.close()
    made.close()


def exchange(
    daemon: Daemon, data: bytes, *, half_close: bool = False
) -> tuple[int, dict[str, object]]:
    """Return status and JSON of the answer to bytes; the connection is closed by the manager."""
    with daemon.connect() as peer:
        peer.sendall(data)
        if half_close:
            peer.shutdown(socket.SHUT_WR)
        answer = received(peer)
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


CLOSE = b"Connection: close\r\n\r\n"


@pytest.mark.parametrize("digits", [19, 5000])
def test_a_length_of_many_digits(start: Start, digits: int) -> None:
    daemon = start()
    head = b"POST /permits HTTP/1.1\r\nHost: localhost\r\nContent-Length: %s\r\n\r\n"
    status, answer = exchange(daemon, head % (b"9" * digits))
    assert (status, answer["code"]) == (400, "invalid_request")
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.text + daemon.errors


def test_an_absolute_uri(daemon: Daemon) -> None:
    address = daemon.address.encode()
    for head in (
        b"GET http://%s/permits HTTP/1.1\r\nHost: other\r\n",
        b"GET HTTP://%s/permits HTTP/1.0\r\n",
    ):
        status, answer = exchange(daemon, head % address + CLOSE)
        assert (status, answer["in_use"]) == (200, 0)
    head = b"GET http://%s?x HTTP/1.1\r\nHost: other\r\n" % address
    status, answer = exchange(daemon, head + CLOSE)
    assert (status, answer["name"]) == (200, "genvm-manager"), "its path is /"
    head = b"GET http://%s/permits HTTP/1.1\r\nHost: a\r\nHost: b\r\n" % address
    assert exchange(daemon, head + CLOSE)[0] == 400
    status, answer = exchange(
        daemon, b"GET http://evil.example/permits HTTP/1.1\r\nHost: localhost\r\n" + CLOSE
    )
    assert (status, answer["code"]) == (403, "cross_site_request")


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"GET /permits HTTP/1.1\r\n", 400),
        (b"GET /permits HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n", 400),
        (b"GET /permits HTTP/1.0\r\nHost: localhost\r\nHost: x\r\n", 400),
        (b"GET /permits HTTP/1.0\r\n", 200),
        (b"GET /permits HTTP/1.1\r\nHost: localhost\r\n", 200),
    ],
)
def test_hosts(daemon: Daemon, head: bytes, expected: int) -> None:
    status, answer = exchange(daemon, head + CLOSE)
    assert status == expected
    assert expected == 200 or "Host" in str(answer["error"])


def test_a_client_that_shuts_down_its_sending_side_gets_its_answer(daemon: Daemon) -> None:
    body = json.dumps(run_body("exit 0")).encode()
    head = b"POST /genvm/run HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    status, answer = exchange(daemon, head + body, half_close=True)
    assert status == 200, answer
    assert daemon.result(int(str(answer["id"])))["exit_code"] == 0
    status, answer = exchange(
        daemon, b"GET /permits HTTP/1.1\r\nHost: localhost\r\n\r\n", half_close=True
    )
    assert status == 200


@pytest.mark.parametrize("count", [2, 5000])
def test_all_that_came_before_a_shutdown_is_answered(daemon: Daemon, count: int) -> None:
    requests = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n" * count
    with daemon.connect() as peer:

        def send() -> None:
            peer.sendall(requests)
            peer.shutdown(socket.SHUT_WR)

        sending = threading.Thread(target=send)
        sending.start()
        assert received(peer).count(b"HTTP/1.1 200 OK") == count
        sending.join()


def test_a_client_that_leaves_the_queue_by_shutting_down_is_gone_soon(start: Start) -> None:
    daemon = start("--permits", "0")
    with daemon.connect() as peer:
        body = json.dumps(run_body("exit 0")).encode()
        head = b"POST /genvm/run HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        peer.sendall(head % len(body) + body)
        daemon.waiting(1)
        peer.shutdown(socket.SHUT_WR)
        eventually(lambda: daemon.permits()["waiting"] == 0, what="it is taken off the queue")


LARGE = 3_000_000


def ask_for(daemon: Daemon, path: str) -> socket.socket:
    """Ask for something, with little room for what comes, and send nothing more."""
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.settimeout(WAIT)
    host, _, port = daemon.address.rpartition(":")
    peer.connect((host, int(port)))
    peer.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    peer.shutdown(socket.SHUT_WR)
    return peer


def test_who_reads_a_large_answer_slowly_and_sends_nothing_more(root: Root, start: Start) -> None:
    root.add_shell()
    daemon = start(constants={"HALF_CLOSED_SECONDS": 0.3})
    genvm_id = daemon.run(**shell(f"head -c {LARGE} /dev/zero | tr '\\0' x"))
    assert len(daemon.result(genvm_id)["stdout"]) == LARGE
    peers = [ask_for(daemon, f"/genvm/{genvm_id}") for _ in range(4)]
    slowly = time.monotonic() + 0.6  # more than HALF_CLOSED_SECONDS
    reader, *leaving = peers
    answer = bytearray()
    while piece := reader.recv(4096 if time.monotonic() < slowly else 1 << 20):
        answer += piece
        if time.monotonic() < slowly:
            time.sleep(0.01)  # a slow reader
        elif leaving:
            leaving.pop().close()  # with much unread: the manager gets a reset
    assert answer.count(b"x") >= LARGE and answer.endswith(b"}\r\n0\r\n\r\n")
    assert not leaving
    reader.close()
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.text + daemon.errors


def test_who_asks_for_much_and_never_reads_it(root: Root) -> None:
    root.add_shell()
    shorter = {"RECEIVE_SECONDS": 1.0, "HTTPChannel.abortTimeout": 1.0}
    daemon = Daemon.serve(root, constants=shorter)
    try:
        genvm_id = daemon.run(**shell(f"head -c {LARGE} /dev/zero | tr '\\0' x"))
        assert len(daemon.result(genvm_id)["stdout"]) == LARGE
        before = sockets_of(daemon.pid)
        document = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n"
        host, _, port = daemon.address.rpartition(":")
        peers = [socket.socket() for _ in range(3)]
        for peer in peers:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # or it would all fit
            peer.connect((host, int(port)))
        head = b"GET /genvm/%d HTTP/1.1\r\nHost: localhost\r\n" % genvm_id
        for peer, asked in zip(
            peers,
            (head + b"\r\n", head + CLOSE, (document + b"\r\n") * 99 + document + CLOSE),
            strict=True,
        ):
            peer.sendall(asked)
        hung_up = select.poll()
        for peer in peers:
            hung_up.register(peer, select.POLLRDHUP)  # and what is always told
            assert hung_up.poll(WAIT * 1000), "they are disconnected"
            hung_up.unregister(peer)
        eventually(lambda: sockets_of(daemon.pid) <= before, what="and closed")
        for peer in peers:
            peer.close()
        assert daemon.stop() == 0
    finally:
        daemon.close()


def test_requests_in_one_packet_and_nothing_more(daemon: Daemon) -> None:
    with daemon.connect() as peer:
        peer.sendall(b"GET /permits HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10)
        peer.shutdown(socket.SHUT_WR)
        answers = received(peer)
    assert answers.count(b"HTTP/1.1 200 OK") == 10


def test_two_hosts_and_a_body_that_waits_to_be_wanted(daemon: Daemon) -> None:
    head = b"POST /permits HTTP/1.1\r\nHost: localhost\r\nHost: b\r\nExpect: 100-continue\r\n"
    with daemon.connect() as peer:
        peer.sendall(head + b"Content-Length: 14\r\n\r\n")
        peer.shutdown(socket.SHUT_WR)
        answer = received(peer)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"100 Continue" not in answer


def test_who_follows_events_and_sends_nothing_more(start: Start) -> None:
    # No heartbeat comes meanwhile.
    daemon = start(constants={"HALF_CLOSED_SECONDS": 0.3, "HEARTBEAT_SECONDS": 600})
    with ask_for(daemon, "/events") as peer:
        seen = bytearray()
        while b": events" not in seen:
            seen += peer.recv(4096)
        peer.settimeout(0.6)  # more than HALF_CLOSED_SECONDS
        with pytest.raises(TimeoutError):
            assert peer.recv(4096)
        peer.settimeout(WAIT)
        daemon.post("/permits", {"permits": 7})
        while b"event: permits" not in seen:
            piece = peer.recv(4096)
            assert piece, "it goes on"
            seen += piece
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.text + daemon.errors


def test_a_tls_handshake_is_answered_at_once_by_the_end(daemon: Daemon) -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    begin = time.monotonic()
    with daemon.connect() as peer, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(peer, server_hostname="localhost")
    timed("a TLS handshake at the plain port", time.monotonic() - begin, 0.5)
    assert daemon.get("/permits")["in_use"] == 0


def test_compressed_bodies(daemon: Daemon) -> None:
    body = gzip.compress(json.dumps({"permits": 3}).encode())
    for headers in ({"Content-Encoding": "gzip"}, {}):
        reply = daemon.request("POST", "/permits", body, headers)
        assert (reply.status, reply.json["code"]) == (415, "unsupported_encoding")
    reply = daemon.request("POST", "/permits", {"permits": 3}, {"Content-Encoding": "identity"})
    assert reply.status == 200
