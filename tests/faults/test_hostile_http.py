"""Clients that want to harm the manager: it goes on for the others, and does not grow."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from genvm_manager import REFUSED_SECONDS

from ..integration.conftest import Start
from ..integration.support import (
    WAIT,
    Daemon,
    Root,
    eventually,
    memory_of,
    received,
    report,
    run_body,
    timed,
    watched,
)
from ..soak.manager import descriptors_of
from .support import times, troubles

MIB = 1 << 20
GET = b"GET /permits HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /genvm/run HTTP/1.1\r\nHost: localhost\r\n"


@contextlib.contextmanager
def unharmed(daemon: Daemon, memory: int = 64 * MIB) -> Iterator[None]:
    """See that afterwards the manager works, has no more descriptors, and little more memory."""
    before, size = descriptors_of(daemon.pid), memory_of(daemon.pid, "VmRSS")
    yield
    eventually(lambda: not descriptors_of(daemon.pid) - before, what="no descriptor is left")
    grown = memory_of(daemon.pid, "VmRSS") - size
    report(f"{grown / MIB:.1f} MiB more")
    assert grown < memory
    assert daemon.result(daemon.run("exit 0"))["exit_code"] == 0
    assert troubles(daemon) == []


@pytest.fixture
def daemon(start: Start) -> Daemon:
    """A manager that has done everything once."""
    made = start()
    made.result(made.run("exit 0"))
    return made


def test_two_thousand_connections_that_do_nothing(daemon: Daemon) -> None:
    with unharmed(daemon), contextlib.ExitStack() as peers:
        for number in range(2000):
            peer = peers.enter_context(daemon.connect())
            if number % 4 == 1:
                peer.sendall(GET[: number % len(GET)])
            elif number % 4 == 2:
                peer.sendall(POST + b"Content-Length: 1000\r\n\r\n" + b"x" * (number % 1000))
            elif number % 4 == 3:
                peer.sendall(GET)  # answered, and kept open
        runs = [daemon.run("exit 0") for _ in range(5)]
        watched(daemon, "2000 connections", lambda: [daemon.result(one) for one in runs])


TOKEN = {"Authorization": "Bearer correct-horse-battery-staple"}


@pytest.fixture
def guarded(root: Root, start: Start, tmp_path: Path) -> Daemon:
    """A manager with a token and 400 descriptors."""
    root.add_shell()
    file = tmp_path / "token"
    file.write_text(TOKEN["Authorization"].split()[1])
    file.chmod(0o600)
    daemon = start("--auth-token-file", str(file))
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (400, 400))
    return daemon


def strangers(daemon: Daemon, count: int, data: bytes) -> Iterator[socket.socket]:
    """Yield connections from another address of this machine, with what was sent on each."""
    host, _, port = daemon.address.rpartition(":")
    for _ in range(count):
        peer = socket.create_connection((host, int(port)), WAIT, source_address=("127.0.0.2", 0))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            peer.sendall(data)
        yield peer


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GET[:-2],
        POST + b"Content-Length: 65536\r\n\r\n" + b"x" * 65_000,
        POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 1000,
    ],
    ids=["nothing", "a part of a head", "a body", "a body in chunks"],
)
def test_clients_without_the_token_take_nothing_away(guarded: Daemon, data: bytes) -> None:
    """They have half of the connections at most, and not for long; a body they cannot send."""
    before = memory_of(guarded.pid, "VmRSS")
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(peer) for peer in strangers(guarded, 600, data)]
        for _ in range(3):
            started = guarded.request("POST", "/genvm/run", run_body("exit 3"), TOKEN)
            assert started.status == 200, started.raw
            path = f"/genvm/{started.json['id']}?wait=60s"
            assert guarded.request("GET", path, None, TOKEN).json["status"]["exit_code"] == 3
        timed("three runs beside 600 strangers", time.monotonic() - begin, 4.0)
        assert memory_of(guarded.pid, "VmRSS") - before < 16 * MIB
        found = [received(peer)[:12] for peer in peers]
    timed("600 strangers are gone", time.monotonic() - begin, 10.0)
    assert {*found} == ({b"", b"HTTP/1.1 401"} if data.startswith(POST) else {b""})
    told = [r for r in guarded.records if "no room for more connections" in r["message"]]
    assert [r["message"] for r in told if "150 from 127.0.0.2, of at most 300" in r["message"]]
    assert len(told) <= 1 + (time.monotonic() - begin) / REFUSED_SECONDS
    assert troubles(guarded) == []


def test_who_has_the_token_may_take_a_minute(guarded: Daemon) -> None:
    head = POST.replace(b"genvm/run", b"permits") + b"Authorization: %b\r\n"
    head += b"Content-Length: 14\r\n\r\n"
    with guarded.connect() as slow, guarded.connect() as late:
        slow.sendall(head % TOKEN["Authorization"].encode())
        assert received(late) == b""  # 5 s
        slow.sendall(b'{"permits": 7}')
        assert received(slow, 12).startswith(b"HTTP/1.1 200")


def test_heads_that_come_byte_by_byte(daemon: Daemon) -> None:
    """Slow-loris: a header line now and then, for as long as it is let."""
    done = threading.Event()

    def trickle(peers: list[socket.socket]) -> None:
        number = 0
        while not done.wait(0.2):
            number += 1
            for peer in peers:
                with contextlib.suppress(OSError):
                    peer.sendall(b"X-%d: y\r\n" % number)

    with unharmed(daemon), contextlib.ExitStack() as stack:
        peers = [stack.enter_context(daemon.connect()) for _ in range(300)]
        for peer in peers:
            peer.sendall(GET[:-2])
        thread = threading.Thread(target=trickle, args=(peers,))
        thread.start()
        try:
            runs = [daemon.run("sleep 0.5", "exit 0") for _ in range(times(5, 100))]
            watched(daemon, "300 slow heads", lambda: [daemon.result(one) for one in runs])
        finally:
            done.set()
            thread.join()


def test_requests_that_are_cut_at_every_byte(daemon: Daemon) -> None:
    body = json.dumps(run_body("exit 0")).encode()
    whole = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with unharmed(daemon):
        for at in range(0, len(whole), times(7, 1)):
            with daemon.connect() as peer:
                peer.sendall(whole[:at])
        eventually(daemon.idle)
    # The two before and after were read.
    assert daemon.get("/status")["executions"] == {}, "a cut request started something"


def test_many_requests_in_one_packet(daemon: Daemon) -> None:
    """All are answered, in their order."""
    count = times(500, 5000)
    last = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with unharmed(daemon), daemon.connect() as peer:
        peer.sendall(GET * count + last)
        answer = received(peer)
    assert answer.count(b"HTTP/1.1 200 OK") == count
    assert answer.rpartition(b"HTTP/1.1 ")[2].startswith(b"404")


def test_requests_whose_answers_nobody_reads(daemon: Daemon) -> None:
    """The manager stops to read, instead of keeping the answers."""
    with unharmed(daemon), contextlib.ExitStack() as stack:
        for _ in range(20):
            peer = stack.enter_context(daemon.connect(0.2))
            with contextlib.suppress(TimeoutError):
                for _ in range(100):
                    peer.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        watched(daemon, "20 who do not read", lambda: daemon.result(daemon.run("exit 0")))


@pytest.mark.parametrize(
    "piece",
    [b"X: " + b"y" * 60_000 + b"\r\n", b"X: y\r\n" * 10_000, b"y" * 65_536],
    ids=["long headers", "many headers", "one endless line"],
)
def test_heads_without_end(daemon: Daemon, piece: bytes) -> None:
    with unharmed(daemon), daemon.connect() as peer:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            peer.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\n")
            for _ in range(times(500, 5000)):
                peer.sendall(piece)
        assert received(peer, 12)[:12] in (b"", b"HTTP/1.1 400")


def test_a_body_in_chunks_of_one_byte(daemon: Daemon) -> None:
    body = json.dumps(run_body("exit 3")).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    with unharmed(daemon), daemon.connect() as peer:
        peer.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        assert received(peer, 12).startswith(b"HTTP/1.1 200")


def test_requests_that_are_changed_by_chance(daemon: Daemon, root: Root) -> None:
    """Each is answered or refused in JSON, or the connection is closed; none starts a process."""
    rng = random.Random(9)
    body = b'{"permits": true}'
    good = b"POST /permits HTTP/1.1\r\nHost: localhost\r\nContent-Length: 17\r\n\r\n" + body
    with unharmed(daemon):
        for _ in range(times(300, 5000)):
            data = bytearray(good)
            for _ in range(rng.randint(1, 6)):
                at = rng.randrange(len(data))
                change = rng.choice(("set", "cut", "put", "double"))
                if change == "set":
                    data[at] = rng.randrange(256)
                elif change == "cut":
                    del data[at : at + rng.randint(1, 20)]
                elif change == "put":
                    data[at:at] = rng.randbytes(rng.randint(1, 20))
                else:
                    data[at:at] = data[at : at + rng.randint(1, 60)]
                data = data or bytearray(b"\n")
            with daemon.connect() as peer:
                peer.sendall(bytes(data))
                peer.shutdown(socket.SHUT_WR)
                answer = received(peer)
            assert answer in (b"", b"HTTP/1.1 100 Continue\r\n\r\n") or (
                answer.startswith(b"HTTP/1.1 ") and b"application/json" in answer
            ), (bytes(data), answer)
    assert daemon.permits()["in_use"] == 0
