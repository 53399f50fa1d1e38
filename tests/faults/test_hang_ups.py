"""Clients that hang up while runs go on: no run may lose anything by it.

The reactor takes a batch of events and dispatches them by the number of the descriptor. While the
daemon is stopped the test collects the events that are to be one batch: a client hangs up, others
ask for runs, and what the daemon was connecting to fails.
"""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ..integration.conftest import Start
from ..integration.support import Root, eventually, received, run_body, shell, watched
from .support import stopped

PERMITS = "64"
RUNS = 12
SOME_RUNS = 100
CHECKS = 20
KNOWN = {"out": "a known text on stdout", "err": "a known text on stderr", "log": "a known record"}
#: Checks of so many models, one every so many seconds, for so long.
MANY_CHECKS, ASKING_SECONDS, FLOOD_SECONDS = 100, 1 / 60, 6.0
SYN_SENT, ESTABLISHED = "02", "01"


def known_run() -> dict[str, Any]:
    """Return a run that writes a known text to each of its three outputs."""
    record = json.dumps({"level": "info", "message": KNOWN["log"]})
    texts = f"sleep 0.2; echo '{KNOWN['out']}'; echo '{KNOWN['err']}' >&2; echo '{record}' >&3"
    return run_body(**shell(texts))


def check_body(port: int, count: int = CHECKS) -> dict[str, Any]:
    """Return a check of so many models at one port."""
    host = f"http://127.0.0.1:{port}"
    config = {"host": host, "provider": "ollama", "model": "m", "key": ""}
    return {"configs": [config] * count, "test_prompts": [{"user_message": "OK"}]}


def complete(status: dict[str, Any]) -> None:
    """Check that a run ended well and that nothing of its output is missing."""
    assert (status["exit_code"], status["signal"], status["cause"]) == (0, None, "exited"), status
    assert status["truncated"] == []
    assert status["stdout"] == KNOWN["out"] + "\n"
    assert status["stderr"] == KNOWN["err"] + "\n"
    assert [record["message"] for record in status["genvm_log"]] == [KNOWN["log"]]


def connections(port: int, state: str) -> int:
    """Return how many connections to a port of this machine are in a state."""
    wanted = f"0100007F:{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(fields[2] == wanted and fields[3] == state for fields in map(str.split, lines))


class Target:
    """A port that a check asks: it is closed, or full so that it accepts nothing, or silent."""

    def __init__(self, kind: str) -> None:
        backlog = 0 if kind == "full" else 64
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        self.port: int = self._listener.getsockname()[1]
        self._state = SYN_SENT if kind == "full" else ESTABLISHED
        self._fillers: list[socket.socket] = []
        while kind == "full" and not connections(self.port, SYN_SENT):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", self.port))
            self._fillers.append(filler)
        self._before = connections(self.port, self._state)
        if kind == "closed":
            self._listener.close()

    def reached(self, count: int) -> None:
        """Wait until so many others are connected to it, or try to be."""
        eventually(
            lambda: connections(self.port, self._state) >= self._before + count,
            what=f"{count} connections",
        )

    def close(self) -> None:
        """Hang up on everybody, and wait until everybody has been told."""
        for filler in self._fillers:
            filler.close()
        self._listener.close()
        eventually(
            lambda: connections(self.port, SYN_SENT) + connections(self.port, ESTABLISHED) == 0,
            what="all connections have failed",
        )


@pytest.mark.parametrize("kind", ["full", "silent"])
def test_what_fails_in_the_turn_of_a_hang_up_is_nothing_to_new_runs(
    root: Root, start: Start, kind: str
) -> None:
    root.add_shell()
    daemon = start("--permits", PERMITS)
    target = Target(kind)
    runs = [daemon.connect() for _ in range(RUNS)]
    daemon.get("/status")  # those are accepted by now
    leaving = daemon.send("POST", "/llm/check", check_body(target.port))
    target.reached(CHECKS)
    body = json.dumps(known_run()).encode()
    head = f"POST /genvm/run HTTP/1.1\r\nHost: {daemon.address}\r\nContent-Length: {len(body)}\r\n"
    with stopped(daemon):
        leaving.close()
        for connection in runs:
            connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
        target.close()
    for connection in runs:
        answer = json.loads(received(connection).partition(b"\r\n\r\n")[2])
        assert answer.get("result") == "started", answer
        complete(daemon.result(answer["id"]))


@pytest.mark.parametrize("kind", ["closed", "full", "silent"])
def test_runs_beside_clients_that_hang_up(root: Root, start: Start, kind: str) -> None:
    """The same without a stopped daemon, for as long as it takes to make many runs."""
    root.add_shell()
    daemon = start("--permits", PERMITS)
    target = Target(kind)
    over = threading.Event()

    def hang_up() -> None:
        for pause in itertools.cycle((0.002, 0.01, 0.03)):
            leaving = daemon.send("POST", "/llm/check", check_body(target.port))
            done = over.wait(pause)
            leaving.close()
            daemon.get("/status")  # no faster than the daemon can bear
            if done:
                return

    def run(_: int) -> dict[str, Any]:
        return daemon.result(daemon.post("/genvm/run", known_run())["id"])

    with ThreadPoolExecutor(6) as pool:
        leaving = [pool.submit(hang_up) for _ in range(2)]
        try:
            for status in pool.map(run, range(SOME_RUNS)):
                complete(status)
        finally:
            over.set()
    for one in leaving:
        one.result()
    target.close()


def test_the_status_beside_checks_that_nobody_waits_for(root: Root, start: Start) -> None:
    """Asking what they want would take the manager many times as long as they are there."""
    daemon = start("--permits", PERMITS)
    target = Target("closed")

    def ask_and_leave() -> None:
        end = time.monotonic() + FLOOD_SECONDS
        while time.monotonic() < end:
            daemon.send("POST", "/llm/check", check_body(target.port, MANY_CHECKS)).close()
            time.sleep(ASKING_SECONDS)

    watched(daemon, "checks that nobody waits for", ask_and_leave)
    target.close()
