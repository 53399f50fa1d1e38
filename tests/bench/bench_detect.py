"""Measure native version detection beside asking an executor, both through HTTP.

One command, ``python tests/bench/bench_detect.py``, starts managers that differ only in
``version_detection`` and prints, from the same run on the same machine, the time of
``POST /contract/detect-version`` for a contract of 10 kB:

* natively, and asking the practice executor, which starts as fast as Python does: the goal is that
  the former is 20 times faster;
* asking the tiny executor in C that ``bench_runs.py`` uses, which looks at nothing: no executor
  can be faster, so this is the least that asking costs.

Requests to the managers alternate, so that all see the same machine. Nothing here can fail for
being slow.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# A script finds its neighbours; mypy takes this folder for a part of the package tests.
from bench_runs import (  # type: ignore[import-not-found]  # see above
    MANAGER,
    compile_executor,
    complete_body,
    manager,
)

VERSION = "v0.1.0"
MANIFEST = f'executor_versions: {{{VERSION}: {{available_after: "2025-01-01T00:00:00Z"}}}}\n'
CODE = b"# v0.1.0\n" + b"print('a contract of some length')\n" * 300
REQUEST = (
    "POST /contract/detect-version HTTP/1.1\r\nHost: localhost\r\n"
    f"Deployment-Timestamp: 2025-06-01T00:00:00Z\r\nContent-Length: {len(CODE)}\r\n\r\n"
).encode() + CODE
GOAL = 20


def install_practice(root: Path) -> None:
    """Install the practice executor where the manager looks for version v0.1.0."""
    script = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[1]); import genvm_manager;"
        " genvm_manager.install_practice_executor(pathlib.Path(sys.argv[2]), sys.argv[3])"
    )
    command = [sys.executable, "-c", script, str(MANAGER.parent), str(root), VERSION]
    subprocess.run(command, check=True)
    (root / "data").mkdir()
    (root / "data" / "manifest.yaml").write_text(MANIFEST)


@contextlib.contextmanager
def detector(
    how: str, prepare: Callable[[Path], object], profile: str | None = None
) -> Iterator[socket.socket]:
    """Run a manager that detects versions in this way; gives a keep-alive connection to it."""
    with tempfile.TemporaryDirectory(prefix="genvm-bench-") as folder:
        root = Path(folder)
        prepare(root)
        environment = {"GENVM_MANAGER_VERSION_DETECTION": how}
        with (
            manager(root, environment, profile) as port,
            socket.create_connection(("127.0.0.1", port)) as connection,
        ):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield connection


def detect(connection: socket.socket) -> float:
    """Make one request; return its microseconds."""
    start = time.perf_counter()
    connection.sendall(REQUEST)
    answer = b""
    while (body := complete_body(answer)) is None:
        data = connection.recv(65536)
        if not data:
            raise SystemExit("bench_detect: the manager closed the connection")
        answer += data
    spent = time.perf_counter() - start
    if json.loads(body) != {"specified_major": 0}:
        raise SystemExit(f"bench_detect: unexpected answer {body!r}")
    return spent * 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=100, help="requests to each manager")
    parser.add_argument("--profile", metavar="FILE", help="write a cProfile of native detection")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        connections = {
            "native": stack.enter_context(detector("native", install_practice, options.profile)),
            "asking the practice executor": stack.enter_context(
                detector("executor", install_practice)
            ),
        }
        if shutil.which("cc") or shutil.which("gcc"):
            connections["asking a tiny executor in C"] = stack.enter_context(
                detector("executor", compile_executor)
            )
        for connection in connections.values():
            detect(connection)  # warm
        samples: dict[str, list[float]] = {name: [] for name in connections}
        for _ in range(options.samples):
            for name, connection in connections.items():
                samples[name].append(detect(connection))
    medians = {name: statistics.median(times) for name, times in samples.items()}
    native = medians.pop("native")
    print(f"POST /contract/detect-version, native  {native:8.0f} us (median)")
    for name, microseconds in medians.items():
        goal = f" (goal {GOAL}x)" if "practice" in name else ""
        print(f"{name:38} {microseconds:8.0f} us  {microseconds / native:6.1f}x{goal}")


if __name__ == "__main__":
    main()
