"""The API by its own document: schemathesis sends what it allows and what it forbids."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .conftest import Start
from .support import PROJECT

FOLDER = PROJECT / "tests" / "schemathesis"


def test_all_checks(start: Start, tmp_path: Path) -> None:
    daemon = start("--error-status", "http", "--permits", "8")
    url = f"http://{daemon.address}"
    program = Path(sys.executable).with_name("schemathesis")
    done = subprocess.run(
        [
            *(program, "--config-file", FOLDER / "schemathesis.toml"),
            *("run", f"{url}/openapi.json", "--max-examples", "5", "--no-color"),
        ],
        env={**os.environ, "MANAGER_URL": url, "PYTHONPATH": str(FOLDER)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
