"""A manager that is stopped for a while, as on a machine that is busy or was suspended."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from ..integration.conftest import Start
from ..integration.support import Root, eventually, state_of
from .support import executors, stopped

#: Longer than the manager waits for pipes that others hold.
PAUSE_SECONDS = 0.7


def text_of(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def go(root: Root) -> None:
    (root.path / "go").touch()


def test_no_output_is_lost_while_the_manager_stands_still(root: Root, start: Start) -> None:
    """Everything is written and the process has ended before the manager sees any of it."""
    text = "x" * 50_000
    root.script(
        f"while ! test -e {root.path}/go; do sleep 0.01; done; printf '%s' {text}; "
        f"printf '%s' {text} >&2; i=0; while test $i -lt 1000; do echo '{{}}'; i=$((i+1)); done >&3"
    )
    daemon = start("--permits", "50")
    ids = [daemon.run() for _ in range(8)]
    processes = executors(daemon)
    with stopped(daemon):
        go(root)
        eventually(lambda: {*map(state_of, processes)} == {"Z"}, what="all have ended")
        time.sleep(PAUSE_SECONDS)
    for genvm_id in ids:
        result = daemon.result(genvm_id)
        assert (result["cause"], result["exit_code"], result["truncated"]) == ("exited", 0, [])
        assert (result["stdout"], result["stderr"]) == (text, text)
        assert len(result["genvm_log"]) == 1000


def test_what_somebody_goes_on_writing_is_said_to_be_cut(root: Root, start: Start) -> None:
    """Not a descendant of the executor, which would be killed with it."""
    go = root.path / "go"
    root.script(f"echo first; echo $$ > {go}.pid; while ! test -e {go}; do sleep 0.01; done")
    daemon = start()
    genvm_id = daemon.run()
    pid = int(eventually(lambda: text_of(Path(f"{go}.pid")), what="it runs"))
    written = 0
    with open(f"/proc/{pid}/fd/1", "wb", buffering=0) as pipe:
        go.touch()
        with contextlib.suppress(BrokenPipeError):
            while written < 1 << 30:
                written += pipe.write(b"more\n" * 1000)
    assert written < 1 << 30, "the pipe is closed"
    result = daemon.result(genvm_id)
    assert (result["exit_code"], result["truncated"]) == (0, ["stdout"])


def test_a_grandchild_that_only_holds_the_pipes_cuts_nothing(root: Root, start: Start) -> None:
    root.script("echo first; sleep 600 & exit 3")
    daemon = start()
    result = daemon.result(daemon.run())
    assert (result["stdout"], result["exit_code"], result["truncated"]) == ("first\n", 3, [])


def at_the_deadline(root: Root, start: Start, trap: str, **constants: float) -> dict[str, Any]:
    """Return the result of an executor with a trap for SIGTERM that runs into its deadline.

    The deadline is later where a busy machine needs more time until the trap is set.
    """
    root.script(f"{trap}; touch {root.path}/up; while :; do sleep 0.01; done")
    daemon = start(constants=constants)
    for seconds in (0.6, 6, 60):
        result = daemon.result(daemon.run(max_execution_minutes=seconds / 60))
        if (root.path / "up").exists():
            return result
    raise AssertionError("the machine was too busy to show anything")


def test_an_executor_can_tell_its_host_of_the_deadline(root: Root, start: Start) -> None:
    result = at_the_deadline(
        root, start, "trap 'echo told; exit 0' TERM", DEADLINE_GRACE_SECONDS=60
    )
    assert (result["cause"], result["exit_code"]) == ("deadline", 0)
    assert result["stdout"] == "told\n"


def test_a_stubborn_executor_is_killed_after_the_deadline(root: Root, start: Start) -> None:
    result = at_the_deadline(root, start, "trap '' TERM")
    assert (result["cause"], result["signal"]) == ("deadline", 9)
