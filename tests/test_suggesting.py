"""What becomes of suggestions, and what a sampler learns of it: with a search that suggests what it is told to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from helpers import a_spec, new_trial

from repro_sweep.errors import CompositionError
from repro_sweep.points import Point, Scalar
from repro_sweep.records import NewTrial, Step
from repro_sweep.search.base import Search, Suggestion
from repro_sweep.search.pruning import Rungs, must_decide
from repro_sweep.states import Direction, StepKind, TrialState
from repro_sweep.suggesting import Suggester
from repro_sweep.sweep import Budget, Chosen, SearchSpec, SpaceSpec, SweepSpec

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
MEDIAN = Chosen(name="median", options={"n_startup_trials": 1})


class Told(Search):
    """Suggests x = 0, 1, 2, …, with some repeats, and remembers what it is told."""

    def __init__(self, repeats: int = 1) -> None:
        self.repeats = repeats
        self.count = 0
        self.ends: list[tuple[int, TrialState, list[float] | None]] = []

    def ask(self) -> Suggestion:
        self.count += 1
        return self.restore({"x": self.count - 1})

    def restore(self, values: Mapping[str, Scalar]) -> Suggestion:
        points = (
            Point(overrides=(f"x={values['x']}", f"seed={seed}"), params=dict(values), repeat={"seed": seed})
            for seed in range(self.repeats)
        )
        return Suggestion(values=values, points=tuple(points))

    def tell(
        self, number: int, state: TrialState, values: Sequence[float] | None, violations: Sequence[float] = ()
    ) -> None:
        self.ends.append((number, state, None if values is None else list(values)))

    def report(self, number: int, step: int, value: float, *, decide: bool = True) -> None:
        pass

    def should_prune(self, number: int) -> bool:
        return False


def make(point: Point, number: int) -> NewTrial:
    """A trial of a point; x=13 cannot be composed with seed 1."""
    if point.overrides == ("x=13", "seed=1"):
        raise CompositionError("x: 13 is too much")
    identity = " ".join(point.overrides)
    return new_trial(number).__class__(
        number=number, identity=identity, directory=f"trials/{number}", overrides=point.overrides,
        params=point.params, repeat=point.repeat, config=f"x: {point.params['x']}\n",
    )  # fmt: skip


def a_search(**changes: object) -> SweepSpec:
    """The record of a search."""
    search = SearchSpec(sampler=Chosen(name="tpe"), seed=0, space=SpaceSpec(), budget=Budget(trials=9))
    return a_spec(Path("/tmp"), search=search.model_copy(update=changes))


def suggester(search: Search, spec: SweepSpec, known: Iterable[str] = (), **given: object) -> Suggester:
    """One whose ledger knows these points, numbered from 0."""
    identities = {identity: number for number, identity in enumerate(known)}
    return Suggester(spec, search, None, make, identities, **given)  # type: ignore[arg-type]


def test_a_trial_that_an_earlier_search_has_left_unfinished_is_run_when_it_is_suggested_again() -> None:
    made = suggester(Told(), a_search(), ["x=0 seed=0", "x=1 seed=0"], withdrawn=[1])
    made.rebuild([], lambda _: [], {0: (COMPLETE, {"score": 0.5})})
    answer = made.ask(2)
    assert (answer.trials, answer.again) == ((), (1,))
    assert [data["trials"] for _, data in answer.steps] == [[0], [1]]
    assert made.ask(2).trials[0].params == {"x": 2}


def test_a_trial_of_an_earlier_search_waits_again_only_once() -> None:
    made = suggester(Told(), a_search(), ["x=0 seed=0"], withdrawn=[0])
    assert made.ask(1).again == (0,)
    search = Told()
    again = suggester(search, a_search(), ["x=0 seed=0"])  # it is withdrawn no more
    step = {"suggestion": 0, "values": {"x": 0}, "trials": [0], "repeats": 1, "after": 0}
    again.rebuild([Step(seq=1, kind=StepKind.ASK, data=step)], lambda _: [], {})
    assert search.ends == []
    again.tell(2, 0, COMPLETE, {"score": 0.25})
    assert search.ends == [(0, COMPLETE, [0.25])]


def test_the_seeds_that_a_point_with_a_pruned_repeat_has_left_are_not_spent() -> None:
    search = Told(repeats=3)
    made = suggester(search, a_search(repeats_pruner=MEDIAN))
    [first] = made.ask(0).trials
    made.tell(1, first.number, PRUNED, {"score": 0.125})
    assert search.ends == [(0, PRUNED, [0.125])]
    assert made.ask(1).trials[0].params == {"x": 1}


def test_a_point_that_cannot_be_composed_with_each_seed_leaves_no_trial_behind() -> None:
    search = Told(repeats=2)
    search.count = 13
    made = suggester(search, a_search())
    answer = made.ask(0)
    assert [trial.params for trial in answer.trials] == [{"x": 14}, {"x": 14}]
    assert [trial.number for trial in answer.trials] == [0, 1]
    search.count = 14
    assert made.ask(2).steps[0][1]["trials"] == [0, 1]


def test_a_grid_is_pruned_by_what_its_trials_reported_before_the_process_was_made_again() -> None:
    """Also where the sweep was a search before, whose steps its ledger still holds."""
    spec = a_spec(Path("/tmp"), pruner=MEDIAN)
    made = Suggester(spec, None, Rungs(MEDIAN, Direction.MAXIMIZE, "unit"), make)
    steps = [
        Step(seq=1, kind=StepKind.BEGIN, data={"definition": {}, "known": [], "first": 0}),
        Step(seq=2, kind=StepKind.ASK, data={"suggestion": 0, "values": {}, "trials": [0], "after": 0}),
        Step(seq=3, kind=StepKind.TELL, data={"trial": 0, "state": "COMPLETE", "metrics": {"score": 1.0}}),
    ]
    rows = {0: [(0, 1.0), (1, 1.0)], 1: [(0, 0.0)]}

    def reports(number: int) -> list[object]:
        from repro_sweep.records import Report

        return [
            Report(seq=0, trial=number, attempt="a", step=step, time=0.0, metrics={"score": value})
            for step, value in rows[number]
        ]

    made.rebuild(steps, reports, {}, unfinished=[1])  # type: ignore[arg-type]
    assert made.report(1, 1, 0.0)
    assert not made.report(2, 0, 1.0)


def test_a_pruner_without_a_memory_is_not_asked_about_trials_that_have_ended() -> None:
    asha = Chosen(name="successive_halving")
    assert [must_decide(pruner, decide=True) for pruner in (None, MEDIAN, asha)] == [False, True, True]
    assert [must_decide(pruner, decide=False) for pruner in (None, MEDIAN, asha)] == [False, False, True]
