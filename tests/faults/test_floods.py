"""Executors that write as fast as they can, on all their outputs and in lines of every length."""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time

import pytest

from ..integration.conftest import Start
from ..integration.support import (
    HELD_SECONDS,
    Daemon,
    Root,
    clock_of,
    eventually,
    percentile,
    report,
    timed,
)

pytestmark = pytest.mark.alone

FLOODS = {
    "empty records": "yes '{}' >&3",
    "records": """yes '{"level": "info", "message": "a message", "n": 17}' >&3""",
    "blank lines": "yes '' >&3",
    "short lines": "yes x >&3",
    "many members": """
        line="[$(yes '{}' | head -n 40000 | tr '\\n' ',')0]"
        while :; do printf '{"level": "info", "n": %s}\\n' "$line"; done >&3""",
    "long lines": """
        line=$(head -c 100000 /dev/zero | tr '\\0' x)
        while :; do printf '{"level": "info", "message": "%s"}\\n' "$line"; done >&3""",
    "no line at all": "cat /dev/zero >&3",
    "endless record": """{ printf '{"level": "info", "x": "'; yes x | tr -d '\\n'; } >&3""",
}
SECONDS = 2.5
#: The goals: what a client waits for the status, and an operator for the end, in seconds.
STATUS_SECONDS = 0.05
END_SECONDS = 1.0


def flood(root: Root, version: str, text: str) -> None:
    root.script(f"yes out & yes err >&2 & {text} & wait", version)


#: It runs in a process of its own: ours reads the log of the daemon as fast as it can. Each line is
#: the milliseconds that a status took, and those of the processors that the daemon used meanwhile.
WATCHER = """
import http.client, sys, time
address, clock, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
end = time.monotonic() + seconds
while time.monotonic() < end:
    begin, used = time.monotonic(), time.clock_gettime(clock)
    connection = http.client.HTTPConnection(address, timeout=90)
    connection.request("GET", "/status")
    assert connection.getresponse().read()
    connection.close()
    print((time.monotonic() - begin) * 1000, (time.clock_gettime(clock) - used) * 1000)
"""


def watch(daemon: Daemon, seconds: float) -> None:
    """Ask for the status all the time; half of the answers must come before much other work.

    A busy machine does not change how much the daemon works until then.
    """
    command = [sys.executable, "-c", WATCHER, daemon.address, str(clock_of(daemon.pid))]
    run = subprocess.run(
        [*command, str(seconds)], capture_output=True, text=True, check=True, timeout=seconds + 120
    )
    lines = [[float(word) for word in line.split()] for line in run.stdout.splitlines()]
    waits, costs = (sorted(figures) for figures in zip(*lines, strict=True))
    cost = statistics.median(costs)
    report(
        f"ten floods: /status p99 {percentile(waits, 99):.1f} ms (goal {STATUS_SECONDS} s), "
        f"max {waits[-1]:.1f} ms; {cost:.1f} ms of a processor, n {len(costs)}"
    )
    assert cost < HELD_SECONDS * 1000, "the reactor was held"


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "forwarded"])
@pytest.mark.parametrize("names", [["empty records"], [*FLOODS]], ids=["empty records", "all"])
def test_a_flood_holds_up_nobody(
    root: Root, start: Start, captured: bool, names: list[str]
) -> None:
    versions = {f"v0.{number}.0": name for number, name in enumerate(names)}
    root.write_manifest({v: f"2025-0{n + 1}-01T00:00:00Z" for n, v in enumerate(versions)})
    for version, name in versions.items():
        flood(root, version, FLOODS[name])
    daemon = start("--permits", "20")
    ids = [
        daemon.run(capture_output=captured, timestamp=f"2025-0{n % len(versions) + 1}-02T00:00:00Z")
        for n in range(10)
    ]
    watch(daemon, SECONDS)
    begin = time.monotonic()
    ended = daemon.request("DELETE", f"/genvm/{ids[0]}?wait_timeout_ms=2000")
    assert ended.status in (200, 500)
    timed("the end of one of them", time.monotonic() - begin, END_SECONDS)
    if captured:
        result = daemon.result(ids[0])
        assert result["truncated"], "more was written than is kept"
        assert set(result["stdout"]) == set("out\n")
        assert set(result["stderr"]) <= set("er\n")
    begin = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    timed("SIGTERM to the exit", time.monotonic() - begin, END_SECONDS)
    eventually(lambda: not daemon.descendants(), what="nothing is left")
    assert "Traceback" not in daemon.text + daemon.errors


def test_a_flood_is_fair(root: Root, start: Start) -> None:
    """Ten floods delay the output of a quiet run, but they do not keep it from being read."""
    flood(root, "v0.1.0", FLOODS["empty records"])
    root.script('echo out; echo err >&2; echo \'{"level": "info"}\' >&3', "v1.0.0")
    root.write_manifest({"v0.1.0": "2025-01-01T00:00:00Z", "v1.0.0": "2025-01-01T00:00:00Z"})
    daemon = start("--permits", "20")
    for number in range(10):
        daemon.run(capture_output=number % 2 == 0)
    for _ in range(5):
        begin = time.monotonic()
        result = daemon.result(daemon.run(major=1))
        timed("a quiet run beside ten floods", time.monotonic() - begin, 0.5)
        assert (result["stdout"], result["stderr"]) == ("out\n", "err\n")
        assert (result["genvm_log"], result["truncated"]) == ([{"level": "info"}], [])
