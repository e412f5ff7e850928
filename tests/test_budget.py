"""When a search has done enough."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import a_spec

from repro_sweep.budget import Count
from repro_sweep.states import Direction, TrialState
from repro_sweep.sweep import Budget, Chosen, Constraint, Objective, SearchSpec, SpaceSpec

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


def count(
    constraints: tuple[Constraint, ...] = (), objectives: tuple[Objective, ...] = (), **budget: float
) -> Count:
    """A count for a metric ``score`` to be maximized."""
    search = SearchSpec(
        sampler=Chosen(name="tpe"),
        seed=0,
        space=SpaceSpec(),
        budget=Budget.model_validate(budget),
        constraints=constraints,
    )
    return Count(a_spec(Path("/tmp"), search=search, objectives=objectives))


def scored(made: Count, *scores: float, state: TrialState = COMPLETE) -> Count:
    """Points with these scores, one trial each."""
    for score in scores:
        number = made.trials
        made.asked(number, [number])
        made.told(number, state, {"score": score})
    return made


def test_trials_are_counted_when_they_are_asked_for() -> None:
    made = count(trials=3)
    made.asked(0, [0, 1])
    assert (made.left(), made.full()) == (1, None)
    made.asked(1, [2])
    assert (made.left(), made.full()) == (0, "3 trials (sweep.budget.trials)")


def test_a_trial_that_serves_two_suggestions_counts_once() -> None:
    made = count(trials=3)
    made.asked(0, [0])
    made.asked(1, [0])
    assert made.trials == 1


def test_the_target_is_reached_in_the_metric_s_direction() -> None:
    assert scored(count(target=0.9), 0.5, 0.89).reached(0) is None
    assert (
        scored(count(target=0.9), 0.5, 0.9).reached(0)
        == "trial 1 has reached the target 0.9 (sweep.budget.target)"
    )


@pytest.mark.parametrize("state", [PRUNED, FAIL])
def test_only_a_complete_trial_reaches_the_target(state: TrialState) -> None:
    assert scored(count(target=0.9), 0.95, state=state).reached(0) is None


def test_a_plateau_is_so_many_points_in_a_row_that_are_no_better() -> None:
    made = scored(count(plateau=3), 0.5, 0.4, 0.5, 0.6, 0.1, 0.2)
    assert made.reached(0) is None
    assert scored(made, 0.6).reached(0) == "3 points in a row were no better (sweep.budget.plateau)"


def test_a_point_is_its_repeats_mean_and_counts_when_all_have_ended() -> None:
    made = count(target=0.8)
    made.asked(0, [0], repeats=2)
    made.told(0, COMPLETE, {"score": 0.9})
    assert made.reached(0) is None
    made.asked(0, [1], repeats=2)
    made.told(1, COMPLETE, {"score": 0.6})
    assert made.reached(0) is None
    made.asked(1, [2, 3], repeats=2)
    made.told(2, COMPLETE, {"score": 0.9})
    made.told(3, COMPLETE, {"score": 0.7})
    assert made.reached(0) == "trial 2 has reached the target 0.8 (sweep.budget.target)"


def test_a_point_whose_first_repeats_are_the_best_so_far_does_not_make_a_plateau() -> None:
    made = scored(count(plateau=3), 0.5, 0.4, 0.3)
    made.asked(3, [3], repeats=2)
    made.told(3, COMPLETE, {"score": 0.9})
    assert made.reached(0) is None
    made.asked(3, [4], repeats=2)
    made.told(4, COMPLETE, {"score": 0.0})
    assert made.reached(0) == "3 points in a row were no better (sweep.budget.plateau)"


def test_a_point_whose_first_repeat_is_no_better_counts_at_once() -> None:
    made = scored(count(plateau=3), 0.5, 0.4, 0.3)
    made.asked(3, [3], repeats=2)
    made.told(3, COMPLETE, {"score": 0.1})
    assert made.reached(0) is not None


def test_what_violates_a_constraint_improves_nothing() -> None:
    made = count(constraints=(Constraint(metric="cost", operator="<=", bound=5),), target=0.9)
    made.asked(0, [0])
    made.told(0, COMPLETE, {"score": 0.95, "cost": 6})
    assert made.reached(0) is None
    made.asked(1, [1])
    made.told(1, COMPLETE, {"score": 0.95, "cost": 5})
    assert made.reached(0) is not None


def test_with_several_objectives_a_point_is_better_that_none_dominates() -> None:
    both = tuple(
        Objective(metric=name, direction=direction)
        for name, direction in (("score", Direction.MAXIMIZE), ("cost", Direction.MINIMIZE))
    )
    made = count(objectives=both, plateau=2)
    for number, (score, cost) in enumerate([(0.5, 5), (0.6, 6), (0.4, 4), (0.4, 5)]):
        made.asked(number, [number])
        made.told(number, COMPLETE, {"score": score, "cost": cost})
    assert made.reached(0) is None
    made.asked(4, [4])
    made.told(4, COMPLETE, {"score": 0.6, "cost": 6})
    assert made.reached(0) is not None


def test_hours_are_over() -> None:
    assert count(hours=2).reached(1.99) is None
    assert count(hours=2).reached(2) == "2 h are over (sweep.budget.hours)"
