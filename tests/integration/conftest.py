"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .support import Daemon, Root, eventually

Start = Callable[..., Daemon]


@pytest.fixture
def root() -> Iterator[Root]:
    """A GenVM root with the practice executor."""
    made = Root()
    made.practice()
    yield made
    made.close()


@pytest.fixture
def start(root: Root) -> Iterator[Start]:
    """Start a daemon for ``root``, with the flags and options of ``Daemon.serve``."""
    started: list[Daemon] = []

    def begin(*flags: str, **options: Any) -> Daemon:
        daemon = Daemon.serve(root, *flags, **options)
        started.append(daemon)
        return daemon

    yield begin
    for daemon in started:
        daemon.close()


@pytest.fixture(scope="module")
def shared_root() -> Iterator[Root]:
    """A GenVM root with the practice executor and the shell, for all tests of a module."""
    made = Root()
    made.practice()
    made.add_shell()
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared_daemon(shared_root: Root) -> Iterator[Daemon]:
    """A daemon with 8 permits for all tests of a module."""
    daemon = Daemon.serve(shared_root, "--permits", "8")
    yield daemon
    daemon.close()


@pytest.fixture
def daemon(shared_daemon: Daemon) -> Iterator[Daemon]:
    """The daemon of the module; each test must leave it as it was: idle, with 8 permits."""
    yield shared_daemon
    try:
        assert shared_daemon.get("/status")["draining"] is False
        eventually(lambda: shared_daemon.permits() == IDLE, what="the daemon is idle again")
        eventually(lambda: not shared_daemon.descendants(), what="no process is left")
    finally:
        # A test that failed half-way must not make the next one fail.
        for genvm_id, entry in shared_daemon.get("/status")["executions"].items():
            if entry["state"] != "finished":
                shared_daemon.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=0")
        shared_daemon.post("/permits", {"permits": 8})
        shared_daemon.post("/undrain")


IDLE = {"permits": 8, "available": 8, "in_use": 0, "waiting": 0}
