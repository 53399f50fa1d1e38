"""Descriptors that are exhausted, and programs that cannot be started only now."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from ..integration.conftest import Start
from ..integration.support import Daemon, Root, run_body


def descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


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
