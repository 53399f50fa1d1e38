"""The command: ``python -m tests.soak --seconds 1800 --busy 2``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from .acts import CLIENT
from .driver import MIB, Options, Soak
from .latency import figures
from .operating import OPERATOR

LATE_MS = 250.0
"""For the 99th percentile of ``GET /status``, whose goal is 50 ms, where nothing else runs."""


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Keep so many processors busy meanwhile."""
    loop = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10**5))"
    processes = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def soak(options: Options, busy: int = 0, late_ms: float = LATE_MS) -> tuple[Soak, dict[str, Any]]:
    """Run a soak; returns it with its figures. The log stays if there is a problem."""
    begin = time.monotonic()
    one = Soak(options, CLIENT, OPERATOR)
    with tempfile.TemporaryDirectory(prefix="soak-") as place, busy_loops(busy):
        folder = Path(place)
        asyncio.run(one.run(folder))
        status, yardstick = figures(one.latencies, one.model.pauses)
        if status.p99 > late_ms + 10 * yardstick.p99:
            one.problems.append(
                f"GET /status: p99 {status.p99} ms; a bare exchange: {yardstick.p99}"
            )
        if one.problems:
            kept = Path(tempfile.gettempdir()) / f"soak-{options.seed}-{os.getpid()}.log"
            shutil.copy(folder / "manager.log", kept)
            print(f"the manager's log: {kept}")
    return one, {
        "options": {**attrs.asdict(options), "busy": busy},
        "seconds": round(time.monotonic() - begin),
        "steps": one.steps,
        "requests": one.requests,
        "runs": sum(one.model.causes.values()),
        "ends": dict(one.model.causes),
        "kinds": dict(one.model.kinds),
        "asked to end as they ended": one.model.late_ends,
        "status_ms": attrs.asdict(status),
        "yardstick_ms": attrs.asdict(yardstick),
        "memory_mib": {name: round(size / MIB, 1) for name, size in one.memory.items()},
        "memory_after_each_phase_mib": [round(size / MIB) for size in one.memory_after],
        "sigterm_seconds": round(one.end_seconds, 2),
        "problems": one.problems,
    }


def replay(options: Options, busy: int) -> str:
    """Return the command that does the same again."""
    words = [
        f"--{name.replace('_', '-')} {value:g}" for name, value in attrs.asdict(options).items()
    ]
    return f"python -m tests.soak {' '.join(words)} --busy {busy}"


def main() -> int:
    """Run the command; the exit status is 1 if there was a problem."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--seconds", type=float, default=60.0, help="of load")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--phase", type=float, default=120.0, help="seconds between checkpoints")
    parser.add_argument("--retention", type=float, default=20.0, help="seconds; see the settings")
    parser.add_argument("--memory-mib", type=int, default=30, help="by which it may have grown")
    parser.add_argument("--busy", type=int, default=0, help="busy loops beside it")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    words = vars(parser.parse_args())
    busy, file = words.pop("busy"), words.pop("json")
    options = Options(**words)
    print(f"seed {options.seed}", flush=True)
    one, found = soak(options, busy)
    text = json.dumps(found, indent=1)
    print(text)
    if file is not None:
        file.write_text(text)
    if one.problems:
        print("the last steps:", *one.trail, sep="\n  ")
        print(f"{len(one.problems)} problems; again: {replay(options, busy)}")
    return bool(one.problems)


if __name__ == "__main__":
    sys.exit(main())
