"""Two runs of a trial, compared value by value."""

from __future__ import annotations

import math

import pytest

from repro_sweep.comparison import compare
from repro_sweep.states import Verdict

HERE = {"loss": {0: 0.5, 1: 0.25, 2: 0.1}, "score": {2: 1.0}}


def changed(metric: str, step: int, value: float | None) -> dict[str, dict[int, float]]:
    """The same with another value, or without it."""
    found = {name: dict(values) for name, values in HERE.items()}
    if value is None:
        del found[metric][step]
    else:
        found[metric][step] = value
    return found


def test_equal_values_are_exact() -> None:
    found = compare(HERE, changed("loss", 0, 0.5))
    assert (found.verdict, found.values, found.first) == (Verdict.EXACT, 4, None)


@pytest.mark.parametrize(
    ("was", "now", "verdict"),
    [
        (0.1, math.nextafter(0.1, 1), Verdict.DIFFERS),
        (0.0, -0.0, Verdict.DIFFERS),
        (math.nan, math.nan, Verdict.EXACT),
        (math.nan, 0.1, Verdict.DIFFERS),
        (math.inf, math.inf, Verdict.EXACT),
        (math.inf, -math.inf, Verdict.DIFFERS),
        (5e-324, 0.0, Verdict.DIFFERS),
    ],
)
def test_values_are_compared_as_bits(was: float, now: float, verdict: Verdict) -> None:
    """One unit in the last place is a difference, and so is the sign of a zero; a NaN is a NaN."""
    assert compare({"m": {0: was}}, {"m": {0: now}}).verdict is verdict


def test_the_first_difference_is_that_of_the_first_step() -> None:
    """Whatever the names of the metrics are."""
    now = changed("loss", 1, 0.26)
    now["score"][2] = 2.0
    first = compare(HERE, now).first
    assert first is not None
    assert (first.metric, first.step, first.was, first.now) == ("loss", 1, 0.25, 0.26)
    assert str(first) == (
        "loss at step 1: 0.25 (0x1.0000000000000p-2) before, 0.26 (0x1.0a3d70a3d70a4p-2) now"
        " (relative difference 3.8e-02)"
    )


@pytest.mark.parametrize("before", [True, False])
def test_a_value_that_is_not_there_differs_whatever_the_tolerance(*, before: bool) -> None:
    less = changed("score", 2, None)
    found = compare(less, HERE, rtol=0.5) if before else compare(HERE, less, rtol=0.5)
    assert found.verdict is Verdict.DIFFERS
    assert found.first is not None
    assert "nothing" in str(found.first)


def test_with_a_tolerance_the_difference_that_is_too_large_is_named() -> None:
    """Not one that is within it."""
    now = changed("loss", 0, 0.5001)
    assert compare(HERE, now, rtol=1e-3).verdict is Verdict.WITHIN_TOLERANCE
    assert compare(HERE, now, rtol=1e-5).verdict is Verdict.DIFFERS
    now["loss"][2] = 0.2
    found = compare(HERE, now, rtol=1e-3)
    assert found.verdict is Verdict.DIFFERS
    assert found.first is not None
    assert found.first.step == 2


def test_what_comes_later_is_not_compared_of_a_trial_that_was_cut() -> None:
    assert compare(changed("loss", 2, None), HERE, until=1).verdict is Verdict.EXACT
    assert compare(changed("loss", 2, None), HERE).verdict is Verdict.DIFFERS


def test_nothing_to_compare_proves_nothing() -> None:
    assert compare({}, {}).verdict is Verdict.UNVERIFIABLE
