"""The short form of the soak; ``python -m tests.soak`` is the long one."""

from __future__ import annotations

import json

from .__main__ import soak
from .driver import Options


def test_a_short_soak() -> None:
    """Two checkpoints, beside the other tests; that the status never waits is told by others."""
    options = Options(seed=9, seconds=40.0, phase=20.0, retention=5.0)
    one, figures = soak(options, late_ms=60_000.0)
    print(json.dumps(figures, indent=1))
    assert not one.problems, "\n".join((*one.trail, *one.problems))
