"""Pruning by the real Optuna: what each pruner says is what it says on an ordinary study."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import optuna
import pytest

from repro_sweep.errors import SweepError
from repro_sweep.search import base, pruning, samplers
from repro_sweep.search.pruning import Rungs, build
from repro_sweep.states import Direction, TrialState
from repro_sweep.sweep import Chosen

PRUNERS: dict[str, tuple[dict[str, Any], Any]] = {
    "none": ({}, optuna.pruners.NopPruner),
    "median": ({"n_startup_trials": 2, "n_warmup_steps": 1}, optuna.pruners.MedianPruner),
    "percentile": ({"percentile": 25.0, "n_startup_trials": 3}, optuna.pruners.PercentilePruner),
    "successive_halving": (
        {"min_resource": 1, "reduction_factor": 2},
        optuna.pruners.SuccessiveHalvingPruner,
    ),
    "hyperband": ({"min_resource": 1, "max_resource": 9}, optuna.pruners.HyperbandPruner),
    "patient": ({"patience": 2, "min_delta": 0.05}, optuna.pruners.PatientPruner),
    "threshold": ({"lower": 0.2, "upper": 2.5}, optuna.pruners.ThresholdPruner),
    "wilcoxon": ({"p_threshold": 0.2}, optuna.pruners.WilcoxonPruner),
}


def chosen(name: str, **options: Any) -> Chosen:
    """A choice with all of its options, as Hydra gives them."""
    conf: Any = base.pruner_options()[name]
    return Chosen(name=name, options={**(asdict(conf()) if callable(conf) else {}), **options})


Call = tuple[str, int, int, float]


def calls(seed: int, *, trials: int = 30, slots: int = 4, steps: int = 9) -> Iterator[Call]:
    """What trials that run at the same time do, each step in its turn; some values are NaN, some trials fail."""
    rng = random.Random(seed)
    waiting = list(range(trials))
    running: dict[int, int] = {}
    slope = {number: rng.uniform(0.1, 3.0) for number in waiting}
    while waiting or running:
        while waiting and len(running) < slots:
            running[waiting.pop(0)] = 0
            yield "add", list(running)[-1], 0, 0.0
        number = rng.choice(list(running))
        step = running[number]
        if step == steps or rng.random() < 0.01:
            del running[number]
            yield "end" if step == steps else "fail", number, 0, slope[number]
            continue
        value = math.nan if rng.random() < 0.02 else slope[number] * (1 + rng.gauss(0, 0.2))
        yield "report", number, step, value
        running[number] = step + 1


def by_rungs(pruner: Chosen, direction: Direction, seed: int) -> list[tuple[int, int, bool]]:
    """Which report was answered how."""
    rungs = Rungs(pruner, direction, "study")
    answers = []
    over: set[int] = set()
    for name, number, step, value in calls(seed):
        if number in over:
            continue
        if name == "add":
            rungs.add(number)
        elif name == "report":
            rungs.report(number, step, value)
            answers.append((number, step, rungs.should_prune(number)))
            if rungs.should_prune(number):
                rungs.end(number, TrialState.PRUNED, value)
                over.add(number)
        else:
            rungs.end(number, TrialState.COMPLETE if name == "end" else TrialState.FAIL, value)
    return answers


def by_optuna(
    pruner: optuna.pruners.BasePruner, direction: Direction, seed: int
) -> list[tuple[int, int, bool]]:
    """The same on an ordinary study."""
    trials: dict[int, optuna.Trial] = {}
    answers = []
    over: set[int] = set()
    with samplers.quiet():
        study = optuna.create_study(study_name="study", direction=direction.value, pruner=pruner)
        for name, number, step, value in calls(seed):
            if number in over:
                continue
            if name == "add":
                trials[number] = study.ask()
            elif name == "report":
                trials[number].report(value, step)
                answer = trials[number].should_prune()
                answers.append((number, step, answer))
                if answer:
                    study.tell(trials[number], state=optuna.trial.TrialState.PRUNED)
                    over.add(number)
            elif name == "end":
                study.tell(trials[number], value)
            else:
                study.tell(trials[number], state=optuna.trial.TrialState.FAIL)
    return answers


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_a_pruner_prunes_exactly_what_it_prunes_in_an_ordinary_study(name: str, direction: Direction) -> None:
    options, made = PRUNERS[name]
    extra = {"wrapped_pruner": None} if name == "patient" else {}
    pruned = 0
    for seed in range(3):
        with samplers.quiet():
            theirs = made(**options, **extra)
        expected = by_optuna(theirs, direction, seed)
        assert by_rungs(chosen(name, **options), direction, seed) == expected
        pruned += sum(answer for _, _, answer in expected)
    assert (pruned > 0) == (name != "none")


def test_patient_asks_the_pruner_that_it_wraps() -> None:
    wrapped = {"name": "median", "n_startup_trials": 2}
    found = by_rungs(chosen("patient", patience=1, wrapped_pruner=wrapped), Direction.MINIMIZE, 1)
    with samplers.quiet():
        theirs = optuna.pruners.PatientPruner(optuna.pruners.MedianPruner(n_startup_trials=2), patience=1)
    assert found == by_optuna(theirs, Direction.MINIMIZE, 1)
    assert found != by_rungs(chosen("patient", patience=1), Direction.MINIMIZE, 1)


def test_any_pruner_is_made_by_its_target() -> None:
    options = {
        "_target_": "optuna.pruners.PatientPruner",
        "patience": 1,
        "wrapped_pruner": {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 2},
    }
    found = by_rungs(Chosen(name="optuna", options=options), Direction.MINIMIZE, 2)
    wrapped = {"name": "median", "n_startup_trials": 2}
    assert found == by_rungs(chosen("patient", patience=1, wrapped_pruner=wrapped), Direction.MINIMIZE, 2)


def test_hyperband_sorts_trials_into_brackets_by_the_name_of_the_sweep() -> None:
    pruner = chosen("hyperband", max_resource=9)

    def pruned(name: str) -> list[bool]:
        rungs = Rungs(pruner, Direction.MINIMIZE, name)
        for number in range(24):
            rungs.add(number)
            for step in range(9):
                rungs.report(number, step, float(number % 7))
        return [rungs.should_prune(number) for number in range(24)]

    assert pruned("one") == pruned("one")
    assert pruned("one") != pruned("other")


def rungs_of_three() -> Rungs:
    """A threshold, and trials 5, 7 and 9."""
    rungs = Rungs(chosen("threshold", upper=1.0), Direction.MINIMIZE, "sweep")
    for number in (5, 7, 9):
        rungs.add(number)
    return rungs


def test_a_decision_stands_and_asking_for_it_changes_nothing() -> None:
    rungs = rungs_of_three()
    rungs.report(5, 0, 2.0)
    rungs.report(5, 1, 0.5)
    rungs.report(7, 0, 0.5)
    assert [rungs.should_prune(number) for number in (5, 7, 9, 5)] == [True, False, False, True]


def test_a_step_that_is_reported_again_keeps_its_first_value() -> None:
    rungs = rungs_of_three()
    rungs.report(5, 0, 0.5)
    rungs.report(5, 0, 2.0)
    assert not rungs.should_prune(5)


def test_reports_that_come_late_or_of_unknown_trials_do_no_harm() -> None:
    rungs = rungs_of_three()
    rungs.end(5, TrialState.COMPLETE, 0.5)
    rungs.end(5, TrialState.COMPLETE, 0.5)
    rungs.report(5, 3, 9.0)
    rungs.report(99, 0, 9.0)
    rungs.report(7, -1, 9.0)
    assert not any(rungs.should_prune(number) for number in (5, 7, 99))


def test_a_trial_that_runs_again_after_its_end_starts_anew() -> None:
    rungs = rungs_of_three()
    rungs.report(5, 0, 2.0)
    rungs.end(5, TrialState.FAIL, None)
    assert rungs.should_prune(5)
    rungs.add(5)
    assert not rungs.should_prune(5)
    rungs.report(5, 0, 0.5)
    assert not rungs.should_prune(5)


def test_a_trial_that_ends_without_a_value_or_with_nan_is_compared_with_none() -> None:
    rungs = Rungs(chosen("median", n_startup_trials=1), Direction.MINIMIZE, "sweep")
    for number, (state, value) in enumerate(
        [(TrialState.COMPLETE, math.nan), (TrialState.COMPLETE, None), (TrialState.FAIL, 1.0)]
    ):
        rungs.add(number)
        rungs.report(number, 0, 1.0)
        rungs.end(number, state, value)
    rungs.add(3)
    rungs.report(3, 0, 9.0)
    assert not rungs.should_prune(3)
    rungs.end(3, TrialState.COMPLETE, 1.0)
    rungs.add(4)
    rungs.report(4, 0, 10.0)
    assert rungs.should_prune(4)


def test_no_choice_and_none_never_prune() -> None:
    for pruner in (None, chosen("none")):
        assert isinstance(build(pruner), optuna.pruners.NopPruner)


REFUSED: list[tuple[Chosen, str]] = [
    (chosen("percentile"), "^sweep.pruner.percentile: must be given: a number from 0 to 100$"),
    (
        chosen("percentile", percentile=101.0),
        "^sweep.pruner.percentile: Percentile must be between 0 and 100",
    ),
    (chosen("patient"), "^sweep.pruner.patience: must be given: a number of steps$"),
    (chosen("patient", patience=-1), "^sweep.pruner.patience: patience cannot be negative but got -1$"),
    (
        chosen("patient", patience=1, wrapped_pruner="median"),
        "^sweep.pruner.wrapped_pruner: must be null or a mapping such as {name: median}, got 'median'$",
    ),
    (
        chosen("patient", patience=1, wrapped_pruner={"name": "medium"}),
        r"^sweep.pruner.wrapped_pruner.name: 'medium' is not a pruner \(hyperband, median, none",
    ),
    (
        chosen("patient", patience=1, wrapped_pruner={"name": "median", "n_startup": 1}),
        r"^sweep.pruner.wrapped_pruner.n_startup: not an option of median \(n_startup_trials, ",
    ),
    (chosen("threshold"), "^sweep.pruner: threshold needs lower, upper or both$"),
    (chosen("threshold", lower=2.0, upper=1.0), "^sweep.pruner: lower should be smaller than upper$"),
    (chosen("median", n_startup_trials=-1), "^sweep.pruner.n_startup_trials: "),
    (chosen("median", interval_steps=0), "^sweep.pruner.interval_steps: "),
    (chosen("median", n_min_trials=0), "^sweep.pruner.n_min_trials: "),
    (
        chosen("successive_halving", min_resource=0),
        "^sweep.pruner.min_resource: must be a number of steps, at least 1, or auto; got 0$",
    ),
    (chosen("successive_halving", min_resource=1.5), "^sweep.pruner.min_resource: must be a number of steps"),
    (chosen("successive_halving", bootstrap_count=1), "^sweep.pruner: .*mutually incompatible"),
    (chosen("hyperband", max_resource="all"), "^sweep.pruner.max_resource: must be a number of steps"),
    (chosen("hyperband", reduction_factor=1), "^sweep.pruner.reduction_factor: must be at least 2, got 1$"),
    (
        chosen("hyperband", min_resource=9, max_resource=3),
        r"^sweep.pruner.max_resource: must be at least min_resource \(9\), got 3$",
    ),
    (chosen("wilcoxon", p_threshold=2.0), "^sweep.pruner.p_threshold: p_threshold must be between 0 and 1"),
    (
        Chosen(name="optuna", options={"_target_": "optuna.samplers.TPESampler"}),
        "_target_: .* is no pruner of Optuna's$",
    ),
    (Chosen(name="optuna", options={"_target_": None}), "^sweep.pruner._target_: must be a dotted name"),
]


@pytest.mark.parametrize(("pruner", "line"), REFUSED)
def test_options_that_cannot_be_used_are_refused_in_one_line(pruner: Chosen, line: str) -> None:
    with pytest.raises(SweepError, match=line) as caught:
        build(pruner)
    assert "\n" not in str(caught.value)


def test_wilcoxon_without_scipy_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning.samplers, "find_spec", lambda name: None)
    with pytest.raises(
        SweepError, match=r"^sweep/pruner=wilcoxon needs the package scipy: pip install scipy$"
    ):
        build(chosen("wilcoxon"))
