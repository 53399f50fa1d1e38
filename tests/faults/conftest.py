"""The fixtures of the integration tests, for the tests of faults."""

from ..integration.conftest import root, start

__all__ = ["root", "start"]
