"""The short form of the soak; ``python -m tests.soak`` is the long one."""

from __future__ import annotations

import json

import pytest

from .__main__ import soak
from .driver import Options


@pytest.mark.alone
@pytest.mark.timeout(600)
def test_a_short_soak() -> None:
    """Two checkpoints, with one busy loop beside it."""
    one, figures = soak(Options(seed=9, seconds=40.0, phase=20.0, retention=5.0), busy=1)
    print(json.dumps(figures, indent=1))
    assert not one.problems, "\n".join((*one.trail, *one.problems))
