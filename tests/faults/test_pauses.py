"""The manager stands still for a while, or its reactor is late: nothing is lost or confused."""

from __future__ import annotations

import signal
import time

import pytest

from ..integration.conftest import Start
from ..integration.support import Daemon, Root, alive, eventually, shell
from .support import executors, pausing, stopped, times, troubles

OUTPUT = 50_000
"""Bytes that fit into a pipe, so that an executor can end without being read."""


def waiting_run(
    daemon: Daemon, root: Root, name: str, then: str, *, first: str = ":", **changes: object
) -> int:
    """Start a run that ends when ``let_go`` says so; return once it waits, or its time is over."""
    up, go = root.path / f"{name}.up", root.path / f"{name}.go"
    script = f"{first}; touch {up}; while ! test -e {go}; do sleep 0.02; done; {then}"
    genvm_id = daemon.run(**shell(script, **changes))
    path = f"/genvm/{genvm_id}"
    eventually(lambda: up.exists() or daemon.get(path)["status"], what="the executor runs")
    return genvm_id


def let_go(root: Root, name: str, pid: int) -> None:
    """Let a run end, and wait until its process has."""
    (root.path / f"{name}.go").touch()
    eventually(lambda: not alive(pid), what="the process has ended")


@pytest.fixture
def daemon(root: Root, start: Start) -> Daemon:
    """A manager whose executor is the shell."""
    root.add_shell()
    return start("--permits", "64")


def test_output_is_whole_however_late_the_reactor_is(daemon: Daemon) -> None:
    line = "y" * 49
    script = f"yes {line} | head -c {OUTPUT}; yes {line} | head -c {OUTPUT} >&2; echo last >&3"
    wanted = (line + "\n") * (OUTPUT // 50)
    with pausing(daemon, 0.7, 0.05):
        for _ in range(times(4, 20)):
            for genvm_id in [daemon.run(**shell(script)) for _ in range(30)]:
                status = daemon.result(genvm_id)
                assert (status["cause"], status["exit_code"]) == ("exited", 0)
                assert status["truncated"] == []
                assert status["stdout"] == status["stderr"] == wanted
                assert [record["line"] for record in status["genvm_log"]] == ["last"]
    assert troubles(daemon) == []


@pytest.mark.parametrize("captured", [True, False])
def test_an_end_comes_before_a_deadline_that_is_noticed_late(
    daemon: Daemon, root: Root, captured: bool
) -> None:
    for seconds in (2, 20):  # a busy machine may be too late for the first
        begin = time.monotonic()
        name = f"until-{seconds}"
        genvm_id = waiting_run(
            daemon,
            root,
            name,
            "exit 7",
            max_execution_minutes=seconds / 60,
            capture_output=captured,
        )
        pids = executors(daemon)
        with stopped(daemon):
            for pid in pids:
                let_go(root, name, pid)
            in_time = time.monotonic() - begin < seconds
            time.sleep(max(0, seconds + 0.2 - (time.monotonic() - begin)))
        status = daemon.result(genvm_id)
        if in_time:
            break
    assert in_time, "the machine was too busy to show anything"
    assert (status["cause"], status["exit_code"], status["signal"]) == ("exited", 7, None)


@pytest.mark.parametrize("wait_ms", [0, 30_000])
def test_an_end_comes_before_a_delete_that_is_noticed_with_it(
    daemon: Daemon, root: Root, wait_ms: int
) -> None:
    genvm_id = waiting_run(daemon, root, "a", "exit 7")
    (pid,) = executors(daemon)
    with stopped(daemon):
        asked = daemon.send("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms={wait_ms}")
        let_go(root, "a", pid)
    reply = asked.reply()
    assert (reply.status, reply.json["genvm_id"]) == (200, genvm_id), reply.json
    status = daemon.result(genvm_id)
    assert (status["cause"], status["exit_code"], status["signal"]) == ("exited", 7, None)


def test_an_end_in_time_is_no_timeout_though_it_is_noticed_late(daemon: Daemon, root: Root) -> None:
    """It ends on SIGTERM within its grace, while the manager stands still beyond it."""
    for seconds in (1.5, 15):  # a busy machine may be too late for the first
        name, got = f"until-{seconds}", root.path / f"got-{seconds}"
        genvm_id = waiting_run(daemon, root, name, "exit 4", first=f"trap 'touch {got}' TERM")
        (pid,) = executors(daemon)
        begin = time.monotonic()
        path = f"/genvm/{genvm_id}?wait_timeout_ms={seconds * 1000:.0f}"
        asked = daemon.send("DELETE", path)
        eventually(got.exists, what="SIGTERM arrives")
        with stopped(daemon):
            let_go(root, name, pid)
            in_time = time.monotonic() - begin < seconds
            time.sleep(max(0, seconds + 0.2 - (time.monotonic() - begin)))
        if in_time:
            break
        asked.reply()
    assert in_time, "the machine was too busy to show anything"
    assert asked.reply().status == 200
    status = daemon.result(genvm_id)
    assert (status["cause"], status["exit_code"], status["signal"]) == ("cancelled", 4, None)


def test_an_end_comes_before_a_shutdown_that_is_noticed_with_it(daemon: Daemon, root: Root) -> None:
    genvm_id = waiting_run(daemon, root, "a", "exit 7")
    (pid,) = executors(daemon)
    with stopped(daemon):
        daemon.signal(signal.SIGTERM)
        let_go(root, "a", pid)
    assert daemon.wait() == 0
    (end,) = [r for r in daemon.records if r["message"] == "execution finished"]
    assert (end["genvm_id"], end["cause"], end["exit_code"]) == (genvm_id, "exited", 7)


def test_a_deadline_holds_across_a_pause(root: Root, start: Start) -> None:
    """What goes on is ended right after the pause, and hears of it first.

    The pause is longer than the grace, so that no time of before can be left.
    """
    root.add_shell()
    for seconds in (0.5, 5, 20):  # a busy machine may be too late for the first
        daemon = start(constants={"DEADLINE_GRACE_SECONDS": seconds})
        begin = time.monotonic()
        genvm_id = waiting_run(
            daemon,
            root,
            f"until-{seconds}",
            "exit 9",
            first="trap 'printf told; exit 3' TERM",
            max_execution_minutes=2 * seconds / 60,
        )
        with stopped(daemon):
            time.sleep(max(0, 4 * seconds - (time.monotonic() - begin)))
        status = daemon.result(genvm_id)
        if status["stdout"]:
            break
    assert (status["cause"], status["exit_code"], status["stdout"]) == ("deadline", 3, "told")


def test_permits_and_queue_survive_pauses(daemon: Daemon) -> None:
    daemon.post("/permits", {"permits": 3})
    with pausing(daemon, 0.3, 0.1):
        pending = [daemon.run(**shell("sleep 0.1")) for _ in range(times(20, 200))]
        causes = [daemon.result(genvm_id)["cause"] for genvm_id in pending]
    assert set(causes) == {"exited"}
    assert daemon.permits() == {"permits": 3, "available": 3, "in_use": 0, "waiting": 0}
    assert troubles(daemon) == []
