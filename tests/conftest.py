"""How all tests are run: by several workers, and some of them while no other test runs.

Most tests wait for processes, so there are more workers than cores. Each file is run by one worker,
in its own order, since its tests may share a daemon.
"""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A machine that is slow or busy proves nothing about the code: what hangs is pytest's to end.
# Everything else stays as it is; with CI in the environment the examples are always the same.
settings.register_profile(
    "patient", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")

# What is imported and collected stays until the end: looking for garbage in it, then and later,
# takes as long as the rest of the collection.
gc.disable()

WORKERS = 4
LONGEST = ("test_chromium.py", "test_modules.py", "test_soak.py")
TESTS = Path(__file__).parent

# Locks of all workers, and of another run beside this one, that need no file of their own: who
# runs alone holds the gate while it waits for the room to be empty, so that nobody else goes in.
ROOM = os.open(__file__, os.O_RDONLY)
GATE = os.open(TESTS, os.O_RDONLY)


def pytest_configure(config: pytest.Config) -> None:
    """Add our marker, and show failures as they come."""
    config.addinivalue_line("markers", "alone: no other test runs meanwhile: it takes all there is")
    config.pluginmanager.register(_Failures(config))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Have several workers for folders, and none for single files; ``-n`` says otherwise."""
    # Else every worker compiles all tests, and every daemon all of the manager: 0.2 s each.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    option = config.option
    is_open = getattr(option, "numprocesses", 0) is None and not option.usepdb
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    if is_open and not is_worker and any(map(os.path.isdir, config.args)):
        option.numprocesses, option.dist = WORKERS, "loadfile"
        option.loadscopereorder = False  # our order, below


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long, and end with those of tests that run alone."""
    alone = {item.path for item in items if item.get_closest_marker("alone") is not None}

    def order(item: pytest.Item) -> tuple[bool, bool, bool]:
        path = item.path
        return path in alone, path.parent == TESTS, path.name not in LONGEST

    items.sort(key=order)


def pytest_collection_finish() -> None:
    """Look for garbage from now on, in what comes from now on."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let a test wait for its turn, before the time that it may take begins."""
    alone = item.get_closest_marker("alone") is not None
    fcntl.flock(GATE, fcntl.LOCK_EX)
    fcntl.flock(ROOM, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    fcntl.flock(GATE, fcntl.LOCK_UN)
    try:
        return (yield)
    finally:
        fcntl.flock(ROOM, fcntl.LOCK_UN)


class _Failures:
    def __init__(self, config: pytest.Config) -> None:
        self._plugins = config.pluginmanager

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Show why a test failed; workers have no terminal."""
        terminal = self._plugins.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.ensure_newline()
            terminal.write_sep("_", report.nodeid)
            terminal.write_line(report.longreprtext)
