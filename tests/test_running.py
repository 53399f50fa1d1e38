"""How the tests are run: see ``conftest.py``, which is taken to some tests of its own here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from .support import PATIENCE

TESTS = """
import time
from pathlib import Path
import pytest

def note(what):
    time.sleep(0.01)
    with Path(__file__).with_name("notes").open("a") as notes:
        notes.write(what + "\\n")

@pytest.mark.parametrize("number", range(40))
def test_beside_others(number):
    note("begin other")
    note("end other")

@pytest.mark.alone
@pytest.mark.parametrize("number", range(5))
def test_alone(number):
    note("begin alone")
    time.sleep(0.1)
    note("end alone")

def test_that_fails():
    assert "this" == "that"
"""


def test_one_that_is_to_run_alone_runs_alone(tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("conftest.py"), folder)
    for name in ("one", "other"):
        (folder / f"test_{name}.py").write_text(TESTS)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * PATIENCE,
    )
    assert "2 failed, 90 passed" in run.stdout, run.stdout + run.stderr
    notes = (folder / "notes").read_text().splitlines()
    assert len(notes) == 180
    for at in (at for at, note in enumerate(notes) if note == "begin alone"):
        assert notes[at + 1] == "end alone"
        begun, ended = (notes[:at].count(f"{what} other") for what in ("begin", "end"))
        assert begun == ended
    # Failures are shown as they come, and once more at the end.
    assert run.stdout.count("AssertionError: assert 'this' == 'that'") >= 4
