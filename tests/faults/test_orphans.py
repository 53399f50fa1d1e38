"""What executors leave behind: helpers of runs that go on, of runs that ended, and zombies."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..integration.conftest import Start
from ..integration.support import Daemon, Root, alive, children_of, eventually

#: Double forks, so that their parent is the manager; the second one clears its environment.
HELPERS = {
    "marked": "(setsid sh -c 'echo $$ > {file}; exec sleep 300' &)",
    "unmarked": "(setsid env -i sh -c 'echo $$ > {file}; exec sleep 300' &)",
}


def pid_in(file: Path) -> int:
    text = eventually(lambda: file.exists() and file.read_text().strip(), what="the helper runs")
    return int(text)


@pytest.fixture
def daemon(root: Root, start: Start) -> Daemon:
    root.script("exit 0", "v1.0.0")
    root.write_manifest({"v0.1.0": "2025-01-01T00:00:00Z", "v1.0.0": "2025-01-01T00:00:00Z"})
    return start("--permits", "20")


@pytest.mark.parametrize("kind", HELPERS)
def test_a_helper_lives_as_long_as_its_run(root: Root, daemon: Daemon, kind: str) -> None:
    file, go = root.path / "helper", root.path / "go"
    root.script(f"{HELPERS[kind].format(file=file)}; while ! test -e {go}; do sleep 0.01; done")
    genvm_id = daemon.run()
    helper = pid_in(file)
    eventually(lambda: helper in children_of(daemon.pid), what="it has become the manager's")
    for _ in range(20):
        assert daemon.result(daemon.run(major=1))["exit_code"] == 0
    quiet = daemon.run(major=1)
    daemon.result(quiet)
    assert alive(helper), "others have ended, but not its own run"
    go.touch()
    assert daemon.result(genvm_id)["exit_code"] == 0
    eventually(lambda: not alive(helper), what="it ends with its run")


def test_helpers_that_ended_are_not_kept_as_zombies(root: Root, daemon: Daemon) -> None:
    """A run goes on and ends no other, so nothing but the manager's own watch can reap them."""
    made = root.path / "made"
    helpers = "i=0; while test $i -lt 200; do (setsid true &); i=$((i+1)); done"
    root.script(f"{helpers}; touch {made}; exec sleep 300")
    genvm_id = daemon.run()
    eventually(made.exists, what="the helpers were started")
    # The guardian and the executor.
    eventually(lambda: len(children_of(daemon.pid)) == 2, what="the zombies are reaped")
    assert daemon.request("DELETE", f"/genvm/{genvm_id}").status == 200
