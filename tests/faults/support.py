"""What the tests of faults share, beside the support of the integration tests."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from ..integration.support import Daemon, children_of, eventually, state_of

LONG = os.environ.get("GENVM_FAULTS") == "long"
"""Whether there is time: then what repeats is repeated more often."""


def times(short: int, long: int) -> int:
    """Return how often a test repeats something."""
    return long if LONG else short


@contextlib.contextmanager
def stopped(daemon: Daemon) -> Iterator[None]:
    """Stop the manager with SIGSTOP meanwhile, as a machine does that swaps or is suspended.

    All that happens meanwhile is one batch of events for its reactor.
    """
    daemon.signal(signal.SIGSTOP)
    try:
        eventually(lambda: state_of(daemon.pid) == "T", what="stopped")
        yield
    finally:
        daemon.signal(signal.SIGCONT)


def executors(daemon: Daemon) -> list[int]:
    """Return the children of the manager that are not its guardian."""
    guardian = daemon.guardian()
    return [pid for pid in children_of(daemon.pid) if pid != guardian]


@contextlib.contextmanager
def pausing(daemon: Daemon, pause: float, between: float) -> Iterator[None]:
    """Stop the manager again and again meanwhile, so that its reactor is late."""
    done = threading.Event()

    def pause_often() -> None:
        while not done.is_set():
            with stopped(daemon):
                done.wait(pause)
            done.wait(between)

    thread = threading.Thread(target=pause_often)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def troubles(daemon: Daemon) -> list[str]:
    """Return what the log has of tracebacks and of critical events."""
    return [
        str(record.get("traceback") or record["message"])
        for record in daemon.records
        if "traceback" in record or record["level"] == "critical"
    ]
