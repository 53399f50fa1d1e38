"""The manager is killed with SIGKILL under load, again and again: nothing is left behind."""

from __future__ import annotations

import functools
import os
import random
import shlex
import time
from pathlib import Path

from ..integration.support import (
    Daemon,
    Root,
    alive,
    eventually,
    processes_with,
    report,
    run_body,
    shell,
    within,
)
from ..soak import plans
from .support import times

KINDS: dict[plans.Maker, int] = {
    **{plans.flood: 3, plans.stubborn: 3, plans.polite: 2, plans.holder: 2, plans.writer: 2},
    **{plans.large: 2, plans.practice_waits: 3, plans.practice: 2},
}
RUNS = 16
MODULE = {
    "module_type": "llm",
    "config": {"bind_address": "127.0.0.1:0"},
    "allow_empty_backends": True,
}


def killed(daemon: Daemon, what: str) -> None:
    """Kill a manager and see that nothing outlives it."""
    guardian = daemon.guardian()
    daemon.process.kill()
    within(1.0, lambda: not processes_with(daemon.marker), f"kill -9 {what}: nothing is left")
    eventually(lambda: not alive(guardian), what="the guardian ends")


def is_gone(pid: int) -> bool:
    return not alive(pid)


def wait_for_executors(daemon: Daemon, count: int) -> None:
    """Wait until so many run."""
    eventually(lambda: len(daemon.descendants()) >= count, what=f"{count} executors run")


def test_killed_again_and_again_under_load(root: Root, tmp_path: Path) -> None:
    """On the same socket each time, with a module, whatever its executors do at that moment."""
    root.add_shell()
    rng = random.Random(9)
    socket_path = root.path / "socket"
    folder = root.path / "t"
    folder.mkdir()
    for turn in range(times(5, 60)):
        daemon = Daemon.serve(
            root,
            *("--permits", "64"),
            listen=("--socket", str(socket_path)),
            environ={"TMPDIR": str(folder)},
        )
        try:
            # Some are being started at the moment of the kill.
            pending = [daemon.send("POST", "/module/start", MODULE)] if turn % 2 else []
            for number in range(RUNS):
                body = plans.choose(rng, KINDS, f"k{turn}.{number}").body
                pending.append(daemon.send("POST", "/genvm/run", body))
            for one in pending[: rng.randint(0, RUNS)]:
                assert one.reply().status == 200
            time.sleep(rng.random() / 2)
            killed(daemon, f"number {turn}")
            for one in pending:
                one.close()
        finally:
            daemon.close()
    daemon = Daemon.serve(root, listen=("--socket", str(socket_path)))
    try:
        assert daemon.result(daemon.run("exit 0"))["exit_code"] == 0
        assert daemon.stop() == 0
    finally:
        daemon.close()
    report(f"left in the temporary folder: {os.listdir(folder)}")


def test_killed_with_descendants_that_cleared_their_environment(root: Root) -> None:
    """In sessions of their own, some with another parent by then, and far down."""
    root.add_shell()
    for _ in range(times(2, 30)):
        daemon = Daemon.serve(root, "--permits", "20")
        try:
            files = [root.path / f"hidden-{number}" for number in range(8)]
            for file in files:
                write = f"echo $$ > {file}.new; mv {file}.new {file}; exec sleep 300"
                hide = f"setsid -f env -i sh -c '{write}'"
                daemon.run(**shell(f"env -i sh -c {shlex.quote(hide)}; sleep 300"))
            for file in files:
                eventually(file.exists, what="all are hidden")
            hidden = [int(file.read_text()) for file in files]
            killed(daemon, "with descendants that cleared their environment")
            for pid in hidden:
                within(1.0, functools.partial(is_gone, pid), "nothing hidden is left")
            for file in files:
                file.unlink()
        finally:
            daemon.close()


def test_killed_while_it_checks_and_detects(root: Root) -> None:
    """The executors of requests that are no runs are found as well."""
    root.script("trap '' TERM; sleep 300")
    for _ in range(times(2, 20)):
        daemon = Daemon.serve(root, "--version-detection", "executor")
        header = {"Deployment-Timestamp": "2025-06-01T00:00:00Z"}
        try:
            pending = [
                daemon.send("POST", f"/{path}", b"# v0.1.0", header)
                for path in ("contract/detect-version", "genvm/run/readonly")
            ]
            pending.append(daemon.send("POST", "/genvm/run", run_body()))
            wait_for_executors(daemon, 3)
            killed(daemon, "with executors that are asked")
            for one in pending:
                one.close()
        finally:
            daemon.close()
