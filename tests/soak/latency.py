"""Measure how long ``GET /status`` takes, beside a bare exchange of one byte on the same machine.

A process of its own: ``python -m tests.soak.latency HOST PORT``. It writes a line a measurement:
the monotonic time, the seconds of the one, the seconds of the other; until the manager is gone.
"""

from __future__ import annotations

import http.client
import os
import socket
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import attrs

EVERY = 0.05
PATIENCE = 120.0


def echo(peer: socket.socket) -> None:
    """Give back each byte until the other side closes."""
    while data := peer.recv(1):
        peer.sendall(data)


def measure(host: str, port: int, yardstick: socket.socket) -> None:
    """Measure until the manager does not answer any more."""
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    while True:
        start = time.monotonic()
        try:
            connection.request("GET", "/status")
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return
        between = time.monotonic()
        yardstick.sendall(b"x")
        yardstick.recv(1)
        end = time.monotonic()
        print(f"{start:.6f} {between - start:.6f} {end - between:.6f}", flush=True)
        time.sleep(EVERY)


@attrs.frozen
class Latencies:
    """Figures in milliseconds."""

    count: int
    p50: float
    p99: float
    worst: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Latencies:
        """Make the figures of some times."""
        found = sorted(1000 * one for one in seconds) or [0.0]
        cuts = statistics.quantiles(found, n=100) if len(found) > 1 else found * 99
        return cls(len(found), round(cuts[49], 2), round(cuts[98], 2), round(found[-1], 2))


def figures(path: Path, left_out: list[tuple[float, float]]) -> tuple[Latencies, Latencies]:
    """Return the figures of ``/status`` and of the yardstick, without what overlaps a pause."""
    rows = [tuple(map(float, line.split())) for line in path.read_text().splitlines()]
    kept = [
        row
        for row in rows
        if not any(row[0] < end and row[0] + row[1] > begin for begin, end in left_out)
    ]
    return Latencies.of(row[1] for row in kept), Latencies.of(row[2] for row in kept)


def main() -> None:
    """Run as a process."""
    here, there = socket.socketpair()
    if os.fork() == 0:
        here.close()
        echo(there)
        os._exit(0)
    there.close()
    measure(sys.argv[1], int(sys.argv[2]), here)
    here.close()
    os.wait()


if __name__ == "__main__":
    main()
