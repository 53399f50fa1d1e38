"""Descriptors that are exhausted, and programs that cannot be started only now."""

from __future__ import annotations

import os
import resource
import select
import socket
import sys
from pathlib import Path

from ..integration.conftest import Start
from ..integration.support import (
    SOURCE,
    WAIT,
    Daemon,
    Root,
    eventually,
    memory_of,
    run_body,
    sockets_of,
)
from .support import troubles


def descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def descriptors_left(daemon: Daemon) -> int:
    """Return how many descriptors a daemon could still open."""
    soft, _ = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    return soft - sum(int(name) < soft for name in os.listdir(f"/proc/{daemon.pid}/fd"))


def limit_descriptors(daemon: Daemon, count: int) -> None:
    _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (count, hard))


def test_without_descriptors_a_run_is_refused_for_now(root: Root, start: Start) -> None:
    root.script("echo fine")
    daemon = start("--permits", "4")
    daemon.result(daemon.run())
    before = descriptors(daemon)
    limit_descriptors(daemon, before + 3)  # a connection and not all of the pipes
    for _ in range(10):
        reply = daemon.request("POST", "/genvm/run", run_body())
        assert (reply.status, reply.json["code"]) == (503, "resources_exhausted"), reply.raw
        assert reply.json["retryable"] is True
        assert "open files" in reply.json["error"]
    limit_descriptors(daemon, before + 200)
    assert daemon.permits()["in_use"] == 0
    assert daemon.result(daemon.run())["stdout"] == "fine\n"
    assert descriptors(daemon) <= before + 1, "none was lost"


def test_without_descriptors_clients_wait_for_their_answer(root: Root, start: Start) -> None:
    """They stand in the backlog, over TCP and over a socket file; nobody is turned away."""
    socket_path = root.path / "socket"
    daemon = start("--socket", str(socket_path))
    daemon.get("/status")
    eventually(lambda: sockets_of(daemon.pid) == 2, what="its connection is closed, ports are left")
    limit_descriptors(daemon, 1 + max(map(int, os.listdir(f"/proc/{daemon.pid}/fd"))))
    # They take what is left below the highest number; some wait with the others.
    spare = [daemon.connect() for _ in range(descriptors_left(daemon) + 2)]
    eventually(lambda: descriptors_left(daemon) == 0, what="no descriptor is left")
    local = socket.socket(socket.AF_UNIX)
    local.settimeout(WAIT)
    local.connect(str(socket_path))
    waiting = [*(daemon.connect() for _ in range(30)), local]
    for client in waiting:
        client.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert select.select(waiting, [], [], 0.5)[0] == [], "nobody is turned away"
    limit_descriptors(daemon, 300)
    for client in waiting:
        with client:
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    for client in spare:
        client.close()
    assert troubles(daemon) == []


def test_without_threads_a_request_is_refused_for_now(root: Root) -> None:
    """A thread's stack is so large here that the limit of addresses allows none."""
    root.script("echo fine")
    limit = ["prlimit", f"--stack={4 << 30}"]
    daemon = Daemon(
        [*limit, sys.executable, str(SOURCE), "serve", "--root", str(root.path), "--port", "0"]
    )
    try:
        daemon.wait_until_listening()
        size = memory_of(daemon.pid, "VmSize")
        resource.prlimit(daemon.pid, resource.RLIMIT_AS, (size + (1 << 30), -1))
        large = run_body(host_data="x" * (8 << 20))
        reply = daemon.request("POST", "/genvm/run", large)
        assert (reply.status, reply.json["code"]) == (503, "resources_exhausted"), reply.raw
        assert "thread" in reply.json["error"]
        code = b"# v0.1.0\n" + bytes(4 << 20)
        header = {"Deployment-Timestamp": "2025-06-01T00:00:00Z"}
        for _ in range(20):  # more often than there are places
            reply = daemon.request("POST", "/contract/detect-version", code, header)
            assert (reply.status, reply.json["code"]) == (503, "resources_exhausted"), reply.raw
        assert daemon.request("POST", "/manifest/reload").json["code"] == "resources_exhausted"
        assert daemon.result(daemon.run())["stdout"] == "fine\n"
        resource.prlimit(daemon.pid, resource.RLIMIT_AS, (-1, -1))
        assert daemon.request("POST", "/contract/detect-version", code, header).status == 200
        assert daemon.request("POST", "/manifest/reload").status == 200
        assert troubles(daemon) == []
    finally:
        daemon.close()


def test_a_program_that_is_being_written_can_be_started_later(root: Root, start: Start) -> None:
    program: Path = root.script("echo fine")
    program.write_bytes(Path("/bin/true").read_bytes())
    daemon = start()
    with program.open("r+b"):
        reply = daemon.request("POST", "/genvm/run", run_body())
        assert (reply.json["code"], reply.json["retryable"]) == ("resources_exhausted", True)
        assert "being written" in reply.json["error"]
    assert daemon.result(daemon.run())["exit_code"] == 0


def test_a_missing_interpreter_is_not_a_missing_version(root: Root, start: Start) -> None:
    root.script("").write_text("#!/nonexistent/interpreter\n")
    reply = start().request("POST", "/genvm/run", run_body())
    assert (reply.json["code"], reply.json["retryable"]) == ("spawn_failed", False)
    assert "interpreter" in reply.json["error"]
    assert "install this version" not in reply.json["error"]
