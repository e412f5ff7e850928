"""Two runs of a trial, compared value by value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from repro_sweep import comparison
from repro_sweep.comparison import Comparison
from repro_sweep.states import Verdict

HERE = {"loss": {0: 0.5, 1: 0.25, 2: 0.1}, "score": {2: 1.0}}


def compare(
    before: Mapping[str, Mapping[int, float]], now: Mapping[str, Mapping[int, float]], **options: Any
) -> Comparison:
    """Of runs with one value at each step."""
    both = (
        {name: {step: [value] for step, value in values.items()} for name, values in each.items()}
        for each in (before, now)
    )
    return comparison.compare(*both, **options)


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


def test_of_a_trial_that_was_cut_only_what_it_has_is_compared() -> None:
    """Its repetition may go further, also within the step at which it was cut."""
    less = changed("loss", 2, None)
    del less["score"]
    assert compare(less, HERE, cut=True).verdict is Verdict.EXACT
    assert compare(less, HERE).verdict is Verdict.DIFFERS
    assert compare(HERE, less, cut=True).verdict is Verdict.DIFFERS


@pytest.mark.parametrize(
    ("was", "now", "verdict"),
    [
        ([3.0, 1.0, 2.0], [1.0, 2.0, 3.0], Verdict.EXACT),
        ([1.0, 1.0], [1.0], Verdict.EXACT),
        ([1.0, 2.0], [1.0], Verdict.DIFFERS),
        ([1.0], [1.0, 2.0], Verdict.DIFFERS),
        ([0.0, -0.0], [0.0], Verdict.DIFFERS),
    ],
)
def test_several_values_at_one_step_have_no_order(
    was: list[float], now: list[float], verdict: Verdict
) -> None:
    """MLflow does not keep it for those of one millisecond; equal ones are one."""
    found = comparison.compare({"m": {0: was}}, {"m": {0: now}})
    assert found.verdict is verdict
    if found.first is not None:
        assert {repr(found.first.was), repr(found.first.now)} & {"2.0", "-0.0"}


def test_nothing_to_compare_proves_nothing() -> None:
    assert compare({}, {}).verdict is Verdict.UNVERIFIABLE
