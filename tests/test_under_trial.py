"""Runs the test cases for trial, which check that nothing is left in the reactor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .support import PATIENCE

PROJECT = Path(__file__).resolve().parent.parent


def test_the_service_passes_under_trial(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "twisted.trial", "--temp-directory", str(tmp_path / "trial")]
    done = subprocess.run(
        [*command, "tests.trial_service"],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "PASSED (successes=3)" in done.stdout
