"""The fixtures of the integration tests, for the tests of faults, and time for the long form."""

from __future__ import annotations

import pytest

from ..integration.conftest import fakes, provider, root, start
from .support import LONG

__all__ = ["fakes", "provider", "root", "start"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test half an hour where things are repeated more often."""
    for item in items if LONG else ():
        item.add_marker(pytest.mark.timeout(1800))
