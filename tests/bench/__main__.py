"""The command: ``python -m tests.bench``, all rows or those that are named."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from .rows import ROWS, Figure
from .stage import Stage

HEAD = ("what", "ours", "yardstick", "ratio", "goal", "met")


def cells(figure: Figure) -> tuple[str, ...]:
    """Return a line of the table."""
    unit, sign = figure.unit, "at least" if figure.more else "at most"
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}x"
    standard = "" if figure.standard is None else f"{figure.yardstick}: {figure.standard:.4g}"
    goal = ""
    if figure.goal is not None:
        goal = f"{sign} {figure.goal:g}{f' {unit}' if figure.absolute else 'x'}"
    met = {None: "", True: "yes", False: "no"}[figure.is_met]
    return figure.what, f"{figure.value:.4g} {unit}", standard, ratio, goal, met


def measure(names: list[str], *, quick: bool, log_level: str) -> Iterator[tuple[str, Figure]]:
    """Measure rows; each has managers of its own, unless it is only to be seen that they work."""
    for some in [names] if quick else [[name] for name in names]:
        with Stage(quick=quick, log_level=log_level) as stage:
            for name in some:
                for figure in ROWS[name](stage):
                    yield name, figure


def as_json(name: str, figure: Figure) -> dict[str, Any]:
    """Return everything about a figure."""
    found = {"value": figure.value, "standard": figure.standard, "ratio": figure.ratio}
    return {"row": name, **attrs.asdict(figure), **found, "is_met": figure.is_met}


def main() -> int:
    """Run the command."""
    # Without its bytecode each process takes 24 MiB and 0.2 s more.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all if none")
    parser.add_argument("--quick", action="store_true", help="see that it works; figures are poor")
    parser.add_argument("--repeat", type=int, default=1, help="measure everything so often")
    parser.add_argument("--log-level", default="warn", help="of the managers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to a file")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    names = (options.rows or [*ROWS]) * options.repeat
    begin, found = time.monotonic(), []
    print(f"{platform.python_implementation()} {platform.python_version()},", end=" ")
    print(f"{platform.machine()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for name, figure in measure(names, quick=options.quick, log_level=options.log_level):
        print("| " + " | ".join(cells(figure)) + " |", flush=True)
        found.append(as_json(name, figure))
    print(f"{time.monotonic() - begin:.0f} s")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
