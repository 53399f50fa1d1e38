"""The command: ``python -m tests.cluster`` measures one manager, and three behind HAProxy.

The ways take turns on the same machine, so that each sees the same of whatever else it does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys

from ..bench.rows import one_run
from ..bench.stage import CLIENTS, Stage, converse
from ..integration.support import Daemon, cpu_of, processes_with
from .support import HAPROXY, INSTANCES, Proxy


def processor_of(daemon: Daemon) -> float:
    """Return the seconds of a processor that a daemon took with its processes."""
    return sum(map(cpu_of, processes_with(daemon.marker)))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how often each way has its turn")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn")
    parser.add_argument("--clients", type=int, default=3 * CLIENTS, help="connections at a time")
    options = parser.parse_args()
    if HAPROXY is None:
        parser.error("needs HAProxy (Debian: apt-get install haproxy)")
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, {options.clients} clients")
    with Stage(quick=False) as stage:
        managers = [stage.manager(GENVM_MANAGER_INSTANCE=str(i)) for i in INSTANCES]
        addresses = [manager.address for manager in managers]
        one, three = (stage.folder / name for name in ("one", "three"))
        proxies = []
        for folder, behind in ((one, addresses[:1]), (three, addresses)):
            folder.mkdir()
            proxies.append(Proxy.start(folder, behind))
            proxies[-1].wait_up("genvm", *INSTANCES[: len(behind)])
        try:
            ways = {"one manager": managers[0], "one behind HAProxy": proxies[0]}
            ways["three behind HAProxy"] = proxies[1]
            rates: dict[str, list[float]] = {way: [] for way in ways}
            used = processor_of(proxies[1])
            for _ in range(options.rounds):
                for way, daemon in ways.items():
                    rate = converse(daemon.address, options.clients, options.seconds, one_run)
                    rates[way].append(rate)
            used = processor_of(proxies[1]) - used
        finally:
            for proxy in proxies:
                proxy.close()
    base = rates["one manager"]
    for way, found in rates.items():
        pairs = statistics.median(rate / other for rate, other in zip(found, base, strict=True))
        turns = " ".join(f"{rate:.0f}" for rate in found)
        print(f"{way:22}{statistics.median(found):6.0f} runs a second, {pairs:.2f}x  ({turns})")
    runs = sum(rates["three behind HAProxy"]) * options.seconds
    print(f"HAProxy took {used / runs * 1000:.2f} ms of a processor for a run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
