"""The benchmark works; what it measures is judged by people."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ..integration.support import PROJECT
from .rows import ROWS


def test_every_row_in_its_quick_form(tmp_path: Path) -> None:
    """Each row gives figures, and the file has their samples."""
    file = tmp_path / "figures.json"
    argv = [sys.executable, "-m", "tests.bench", "--quick", "--json", str(file)]
    done = subprocess.run(argv, cwd=PROJECT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert {one["row"] for one in found} == set(ROWS)
    for one in found:
        assert one["what"] in done.stdout
        assert one["ours"], one
