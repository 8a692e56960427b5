"""How hypothesis runs here: the same few examples every time, and none too slow for a loaded machine."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

fuzz = settings(
    max_examples=60,
    derandomize=True,  # the same examples in every run
    deadline=None,  # no test depends on the clock
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
