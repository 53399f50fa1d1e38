"""Settings of Hypothesis for all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A machine that is slow or busy proves nothing about the code: what hangs is pytest's to end.
# Everything else stays as it is; with CI in the environment the examples are always the same.
settings.register_profile(
    "patient", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")
