"""Somebody sets the clock while the manager runs: only the times that people read follow it.

The wall clock of the daemon and of its children is libfaketime's (Debian's package ``faketime``),
which looks into a file; their monotonic clock is the real one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest

from ..integration.support import Daemon, Root, eventually, kill, run_body

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
AHEAD, BACK = timedelta(days=1), timedelta(days=-1)

pytestmark = pytest.mark.skipif(
    LIBRARY is None and "GENVM_REQUIRE_FAKETIME" not in os.environ,
    reason="libfaketime is not installed here",
)


class WallClock:
    """The wall clock of a daemon that is started after this."""

    def __init__(self, root: Root, setenv: Callable[[str, str], None]) -> None:
        self._file = root.path / "clock"
        self._file.write_text("+0")
        setenv("LD_PRELOAD", str(LIBRARY))
        setenv("FAKETIME_TIMESTAMP_FILE", str(self._file))
        setenv("FAKETIME_NO_CACHE", "1")
        setenv("DONT_FAKE_MONOTONIC", "1")

    def set(self, daemon: Daemon, step: timedelta) -> None:
        """Let the clock differ so much from the real one, and see that the daemon goes by it."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{step.total_seconds():+.0f}")
        new.rename(self._file)

        def is_set() -> bool:
            date = parsedate_to_datetime(daemon.request("GET", "/permits").headers["date"])
            return abs(date - datetime.now(UTC) - step) < timedelta(hours=1)

        eventually(is_set, what="the clock is set")


@pytest.fixture
def clock(root: Root, monkeypatch: pytest.MonkeyPatch) -> WallClock:
    """A clock for the daemons of a test."""
    return WallClock(root, monkeypatch.setenv)


@pytest.fixture(params=["serve", "twistd"])
def daemon(root: Root, clock: WallClock, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A daemon that goes by the clock."""
    if request.param == "serve":
        started = Daemon.serve(root, "--permits", "10")  # not what memory allows
    else:
        started = Daemon.twistd(root, PERMITS="10")
        started.wait_until_listening()
    yield started
    started.close()


STEPS = pytest.mark.parametrize("step", [AHEAD, BACK], ids=["ahead", "back"])


@STEPS
def test_runs(root: Root, daemon: Daemon, clock: WallClock, step: timedelta) -> None:
    """Every wait here has a limit, and none would have ended by the wall clock for a day."""
    go, up = root.path / "go", root.path / "up"
    finished = daemon.run("print early", "exit 0")
    daemon.result(finished)
    running = daemon.run(f"wait-file {go}", "exit 0")
    poll = daemon.send("GET", f"/genvm/{running}?wait=100s")
    ending = daemon.run("sleep 600", max_execution_minutes=2 / 60)
    clock.set(daemon, step)

    assert daemon.get(f"/genvm/{running}?wait_ms=300")["status"] is None, "the end of a wait"
    assert daemon.result(ending)["cause"] == "deadline", "one from before"
    late = daemon.result(daemon.run("sleep 600", max_execution_minutes=0.3 / 60))
    assert late["cause"] == "deadline"
    ended = datetime.fromtimestamp(late["finished_at"] / 1000, UTC)
    assert abs(ended - datetime.now(UTC) - step) < timedelta(hours=1), "what people read"
    stubborn = daemon.run("ignore-sigterm", f"touch {up}", "sleep 600")
    eventually(up.exists)
    reply = daemon.request("DELETE", f"/genvm/{stubborn}?wait_timeout_ms=300")
    assert (reply.status, reply.json["code"]) == (500, "shutdown_timeout")

    assert daemon.result(finished)["stdout"] == "early\n", "seconds old, not a day"
    go.touch()
    assert poll.reply().json["status"]["cause"] == "exited"
    records = [r for r in daemon.records if r["message"] == "execution finished"]
    assert all(0 <= record["ran_s"] < 3600 for record in records)
    assert 0 <= daemon.get("/status")["uptime_s"] < 3600
    assert daemon.stop() == 0


@STEPS
def test_the_queue_and_the_end_of_retention(root: Root, clock: WallClock, step: timedelta) -> None:
    daemon = Daemon.serve(root, "--permits", "1", "--execution-retention", "2s")
    try:
        first = daemon.run("sleep 600")
        waiting = daemon.send("POST", "/genvm/run", run_body("exit 0"))
        daemon.waiting(1)
        clock.set(daemon, step)
        assert daemon.permits()["waiting"] == 1
        assert 0 <= daemon.get("/status")["queue"]["oldest_wait_ms"] < 3600_000
        daemon.request("DELETE", f"/genvm/{first}")
        waiting.reply()
        eventually(lambda: daemon.request("GET", f"/genvm/{first}").status == 404, what="expired")
    finally:
        daemon.close()


@STEPS
def test_modules(daemon: Daemon, clock: WallClock, step: timedelta) -> None:
    body = {"module_type": "llm", "config": {"bind_address": "127.0.0.1:0"}}

    def module() -> dict[str, Any]:
        return dict(daemon.get("/status")["modules"]["llm"])

    daemon.post("/module/start", {**body, "allow_empty_backends": True})
    kill(module()["pid"])
    # It is started again after 1 s, which may have passed when a busy machine gets here.
    daemon.wait_log(lambda record: record["message"] == "module died")
    clock.set(daemon, step)
    eventually(lambda: module()["restarts"] == 1 and module()["state"] == "running")
    since = datetime.fromisoformat(module()["since"])
    assert abs(since - datetime.now(UTC) - step) < timedelta(hours=1), "what people read"
    assert daemon.post("/module/stop", body) == {"result": "module_stopped"}
    assert daemon.post("/module/start", {**body, "allow_empty_backends": True})
