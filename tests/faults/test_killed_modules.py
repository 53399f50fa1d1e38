"""Modules are killed or stand still, with executors that ask them: the manager copes."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter

import pytest

from ..integration.conftest import Start
from ..integration.fake_providers import Provider
from ..integration.support import Daemon, alive, eventually, free_port, kill, report, timed
from ..integration.test_modules import (
    ends_on_sigterm,
    start_module,
    status,
    stop_module,
)
from .support import times, troubles

PATIENT = 100.0
"""Seconds for what waits for the backoff after a death."""


@pytest.fixture
def port() -> int:
    """Where the LLM module listens."""
    return free_port()


@pytest.fixture
def daemon(start: Start, port: int, provider: Provider) -> Daemon:
    """A manager with an LLM module that its executors know."""
    made = start("--permits", "8", environ={"GENVM_LLM_MODULE": f"ws://127.0.0.1:{port}"})
    start_module(made, provider.config("says:x", bind_address=f"127.0.0.1:{port}"))
    return made


def ask(daemon: Daemon) -> int:
    """Start a run that asks the LLM module; it exits with 0 if it was answered."""
    steps = "ask-llm x\nexit 0"
    data = {"node_address": "0x", "tx_id": "0x", "practice": steps}
    return daemon.run(host_data=json.dumps(data))


def running_again(daemon: Daemon, gone: int) -> int:
    """Wait until the module runs in another process, and return its pid."""

    def another() -> int | None:
        now = status(daemon)
        return now["pid"] if now["state"] == "running" and now["pid"] != gone else None

    return eventually(another, PATIENT, "the module runs again") or 0


def test_killed_under_load(daemon: Daemon) -> None:
    """Runs get an answer or an error, soon; afterwards all is as before."""
    exits: Counter[int] = Counter()
    pid = status(daemon)["pid"]
    for _ in range(times(2, 4)):
        runs = [ask(daemon) for _ in range(6)]
        kill(pid)
        runs += [ask(daemon) for _ in range(6)]
        exits += Counter(daemon.result(genvm_id)["exit_code"] for genvm_id in runs)
        pid = running_again(daemon, pid)
    report(f"exit codes of runs around a kill: {dict(exits)}")
    assert set(exits) <= {0, 1}
    assert daemon.result(ask(daemon))["exit_code"] == 0
    assert daemon.idle()
    assert troubles(daemon) == []


def test_one_that_stands_still_can_be_stopped(daemon: Daemon, provider: Provider) -> None:
    pid, address = status(daemon)["pid"], status(daemon)["address"]
    kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    assert stop_module(daemon) == "module_stopped"
    timed("the stop of a module that stands still", time.monotonic() - begin, 5.0)
    eventually(lambda: not alive(pid), what="it is killed")
    start_module(daemon, provider.config("says:x", bind_address=address))
    assert daemon.result(ask(daemon))["exit_code"] == 0
    assert troubles(daemon) == []


def test_the_end_of_the_manager_while_a_module_stands_still(daemon: Daemon) -> None:
    kill(status(daemon)["pid"], signal.SIGSTOP)
    ends_on_sigterm(daemon, "SIGTERM with a module that stands still")
