"""Searches by Optuna's samplers, with the real Optuna."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from repro_sweep.errors import SpaceError, SweepError
from repro_sweep.points import Categorical, Choose, FloatRange, IntRange, Parameter, Point, Scalar
from repro_sweep.search import base, samplers, targets
from repro_sweep.search.checks import check
from repro_sweep.search.study import OptunaSearch, _text
from repro_sweep.states import Direction, TrialState
from repro_sweep.sweep import Budget, Chosen, Constraint, Objective, SearchSpec, SpaceSpec, SweepSpec
from tests.helpers import a_spec

ROOT = Path(__file__).resolve().parents[1]
REPLAYED = ("tpe", "random", "cmaes", "gp", "qmc", "nsgaii", "nsgaiii", "bruteforce", "optuna")
FIXED: dict[str, object] = {
    "_target_": "optuna.samplers.PartialFixedSampler",
    "fixed_params": {"n": 3},
    "base_sampler": {"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 4},
}
OPTIONS: dict[str, dict[str, object]] = {
    "tpe": {"n_startup_trials": 5},
    "gp": {"n_startup_trials": 5},
    "nsgaii": {"population_size": 6},
    "nsgaiii": {"population_size": 6},
    "optuna": FIXED,
}


def a_parameter(name: str, domain: Any, *, conditional: bool = False) -> Parameter:
    key = name.split(" ", maxsplit=1)[0]
    return Parameter(name=name, key=key, where=f"sweep.params.{key}", domain=domain, conditional=conditional)


class HandSpace:
    """Some parameters that always exist; and, where asked for, two optimizers with parameters of their own."""

    def __init__(self, *always: Parameter, conditional: bool = False, exclude: Any = None) -> None:
        self.always = always or (
            a_parameter("x", FloatRange(low=-4.0, high=4.0)),
            a_parameter("lr", FloatRange(low=1e-4, high=1.0, log=True)),
            a_parameter("n", IntRange(low=0, high=8)),
            a_parameter("c", Categorical(choices=("good", "bad", None, 3))),
        )
        self.optimizer = a_parameter("optimizer", Categorical(choices=("SGD", "Adam")))
        self.below = {
            "SGD": [a_parameter("momentum", FloatRange(low=0.0, high=0.9), conditional=True)],
            "Adam": [
                a_parameter("beta1", FloatRange(low=0.8, high=0.99), conditional=True),
                a_parameter("beta2", FloatRange(low=0.9, high=0.999), conditional=True),
            ],
        }
        self.conditional = conditional
        self.exclude = exclude

    def parameters(self) -> Sequence[Parameter]:
        below = [item for items in self.below.values() for item in items]
        return [*self.always, *([self.optimizer, *below] if self.conditional else [])]

    def draw(self, choose: Choose) -> tuple[Point, ...]:
        values: dict[str, Scalar] = {item.name: choose(item) for item in self.always}
        if self.conditional:
            values["optimizer"] = choose(self.optimizer)
            values |= {item.name: choose(item) for item in self.below[str(values["optimizer"])]}
        if self.exclude is not None and self.exclude(values):
            return ()
        overrides = tuple(f"{name}={value}" for name, value in values.items())
        return tuple(
            Point(overrides=(*overrides, f"seed={seed}"), params=values, repeat={"seed": seed})
            for seed in (0, 1)
        )

    def assign(self, params: Mapping[str, object]) -> dict[str, Scalar] | None:
        raise NotImplementedError

    def assign_partial(self, params: Mapping[str, object], where: str) -> dict[str, Scalar]:
        known = {item.name for item in self.parameters()}
        for key in params:
            if key not in known:
                raise SpaceError(f"{where}: {key!r} is not a parameter")
        return dict(params)  # type: ignore[arg-type]


DISCRETE = HandSpace(
    a_parameter("a", IntRange(low=1, high=3)), a_parameter("c", Categorical(choices=("x", "y")))
)


def a_sweep(sampler: str = "tpe", *, seed: int = 7, **changes: Any) -> SweepSpec:
    options = changes.pop("options", OPTIONS.get(sampler, {}))
    of_search = {key: changes.pop(key) for key in list(changes) if key in SearchSpec.model_fields}
    search = SearchSpec(
        sampler=Chosen(name=sampler, options=options),
        seed=seed,
        space=SpaceSpec(),
        budget=Budget(),
        **of_search,
    )
    given = {"metric": "loss", "direction": Direction.MINIMIZE, "sampler": sampler, **changes}
    return a_spec(Path("/nowhere"), search=search, **given)


def a_search(sampler: str = "tpe", space: Any = None, **changes: Any) -> OptunaSearch:
    extend = changes.pop("extend", None)
    pruner = changes.pop("pruner", None)
    return OptunaSearch(space or HandSpace(), a_sweep(sampler, **changes), pruner=pruner, extend=extend)


def loss(values: Mapping[str, Any]) -> float:
    """0 at best: x = 1, n = 3, c = good; lr = 0.01."""
    far = (float(values.get("x", 1.0)) - 1) ** 2 + 0.3 * (int(values.get("n", 3)) - 3) ** 2
    far += (math.log10(float(values.get("lr", 0.01))) + 2) ** 2
    return far + (0.0 if values.get("c", "good") == "good" else 1.0)


def run(search: OptunaSearch, trials: int, *, slots: int = 1, begin: int = 0) -> list[dict[str, Scalar]]:
    """Ask and tell as so many slots would, and return what was suggested."""
    asked: list[dict[str, Scalar]] = []
    running: list[int] = []
    for _ in range(trials):
        if len(running) == slots:
            tell(search, running.pop(0), asked)
        suggestion = search.ask()
        assert suggestion is not None
        asked.append(dict(suggestion.values))
        running.append(len(asked) - 1 + begin)
    for number in running:
        tell(search, number, asked)
    return asked


def tell(search: OptunaSearch, number: int, asked: Sequence[Mapping[str, Scalar]]) -> None:
    search.tell(number, TrialState.COMPLETE, [loss(asked[number])])


# --- every sampler --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "gp", "nsgaii", "nsgaiii"])
def test_a_sampler_that_learns_comes_closer_than_chance(sampler: str) -> None:
    # a Gaussian process takes long, and needs few
    trials, seeds = (13, 1) if sampler == "gp" else (100, 3)
    found = {
        name: statistics.mean(
            statistics.mean(loss(values) for values in run(a_search(name, seed=seed), trials)[-6:])
            for seed in range(seeds)
        )
        for name in (sampler, "random")
    }
    assert found[sampler] < 0.75 * found["random"]


def test_quasi_random_points_cover_a_square_more_evenly_than_random_ones() -> None:
    space = HandSpace(*(a_parameter(name, FloatRange(low=0.0, high=1.0)) for name in ("x", "y")))

    def cells(sampler: str) -> int:
        asked = run(a_search(sampler, space), 65)[1:]  # the first one of qmc is random
        return len({(int(8 * float(v["x"])), int(8 * float(v["y"]))) for v in asked})  # type: ignore[arg-type]

    assert cells("qmc") == 64
    assert cells("random") < 50


def test_random_suggestions_fill_the_ranges_and_none_is_made_twice() -> None:
    asked = run(a_search("random"), 300)
    assert len({json.dumps(values) for values in asked}) == 300
    assert {values["c"] for values in asked} == {"good", "bad", None, 3}
    assert {values["n"] for values in asked} == set(range(9))
    logs = [math.log10(float(values["lr"])) for values in asked]  # type: ignore[arg-type]
    assert statistics.mean(logs) == pytest.approx(-2, abs=0.2)
    assert {type(values["n"]) for values in asked} == {int}
    assert {type(values["x"]) for values in asked} == {float}


@pytest.mark.parametrize("slots", [1, 4, 6])
def test_brute_force_tries_every_point_once_and_then_has_none(slots: int) -> None:
    search = a_search("bruteforce", DISCRETE)
    asked = run(search, 6, slots=slots)
    assert {(values["a"], values["c"]) for values in asked} == {(a, c) for a in (1, 2, 3) for c in "xy"}
    assert search.ask() is None
    assert search.ask() is None


def test_brute_force_has_no_more_while_its_last_points_still_run_and_goes_on_after_a_replay_without_that_ask() -> (
    None
):
    search, again = a_search("bruteforce", DISCRETE), a_search("bruteforce", DISCRETE)
    for _ in range(6):
        suggestion = search.ask()
        assert suggestion is not None
        again.restore(suggestion.values)
    assert search.ask() is None
    assert again.ask() is None
    for made in (search, again):
        made.tell(3, TrialState.COMPLETE, [1.0])
        assert made.ask() is None


def test_brute_force_covers_a_conditional_space() -> None:
    space = HandSpace(a_parameter("n", IntRange(low=0, high=1)), conditional=True)
    space.below = {
        "SGD": [a_parameter("nesterov", Categorical(choices=(True, False)), conditional=True)],
        "Adam": [],
    }
    asked = run(a_search("bruteforce", space), 6)
    assert len({json.dumps(values, sort_keys=True) for values in asked}) == 6
    assert sum("nesterov" in values for values in asked) == 4


# --- replay ---------------------------------------------------------------------------------------------


class Recorded:
    """Makes calls, and can make them again."""

    def __init__(self, search: OptunaSearch) -> None:
        self.search = search
        self.calls: list[tuple[Any, ...]] = []
        self.asked: list[dict[str, Scalar]] = []

    def ask(self) -> None:
        suggestion = self.search.ask()
        assert suggestion is not None
        values = json.loads(json.dumps(dict(suggestion.values)))  # as it comes back from the ledger
        self.calls.append(("ask", values))
        self.asked.append(dict(suggestion.values))
        assert [point.params for point in suggestion.points] == [suggestion.values] * len(suggestion.points)

    def tell(self, number: int, state: TrialState, values: list[float] | None) -> None:
        self.calls.append(("tell", number, state, values))
        self.search.tell(number, state, values)

    def report(self, number: int, step: int, value: float) -> None:
        self.calls.append(("report", number, step, value))
        self.search.report(number, step, value)

    def again(self, search: OptunaSearch, calls: int) -> None:
        for name, *arguments in self.calls[:calls]:
            getattr(search, "restore" if name == "ask" else name)(*arguments)


def recorded(search: OptunaSearch, trials: int) -> Recorded:
    """Three slots; some fail, some are pruned, one runs again after it failed."""
    made = Recorded(search)
    for number in range(trials):
        made.ask()
        done = number - 2
        if done < 0:
            continue
        value = loss(made.asked[done])
        for step in range(5):
            made.report(done, step, value + 1 / (step + 1))
        if done % 7 == 3:
            made.tell(done, TrialState.FAIL, None)
        elif done % 5 == 2:
            made.tell(done, TrialState.PRUNED, [value])
        else:
            made.tell(done, TrialState.COMPLETE, [value])
        if done == 9:
            made.tell(3, TrialState.COMPLETE, [loss(made.asked[3])])
    return made


@pytest.mark.parametrize("sampler", REPLAYED)
def test_a_search_that_was_killed_goes_on_with_the_same_suggestions(sampler: str) -> None:
    # cmaes, gp and qmc want a space without conditions, brute force one without an interval
    space = {
        "tpe": HandSpace(conditional=True),
        "random": HandSpace(conditional=True),
        "nsgaii": HandSpace(conditional=True),
        "bruteforce": HandSpace(
            a_parameter("n", IntRange(low=0, high=8)),
            a_parameter("c", Categorical(choices=("good", "bad", None, 3))),
        ),
    }.get(sampler, HandSpace())
    trials = 10 if sampler == "gp" else 30
    whole = recorded(a_search(sampler, space), trials)
    assert len({json.dumps(values) for values in whole.asked}) > 0.9 * trials
    for killed in (1, 12, len(whole.calls) // 2, len(whole.calls) - 3):
        if sampler == "gp" and killed == 1:
            continue  # it would take long
        search = a_search(sampler, space)
        whole.again(search, killed)
        for name, *arguments in whole.calls[killed:]:
            if name == "ask":
                suggestion = search.ask()
                assert suggestion is not None
                assert dict(suggestion.values) == arguments[0]
            else:
                getattr(search, name)(*arguments)


def test_the_same_seed_suggests_the_same_in_processes_that_hash_strings_differently() -> None:
    code = (
        "from tests.test_search import *\n"
        "made = recorded(a_search('tpe', HandSpace(conditional=True)), 25)\n"
        "print(json.dumps(made.asked))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT}/launcher"},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert len(json.loads(outputs.pop())) == 25


def test_another_seed_suggests_something_else() -> None:
    for sampler in REPLAYED:
        if sampler != "qmc":
            space = DISCRETE if sampler == "bruteforce" else HandSpace()
            one, other = (run(a_search(sampler, space, seed=seed), 4) for seed in (1, 2))
            assert one != other, sampler


def test_a_thousand_suggestions_of_tpe_are_restored_in_less_than_two_seconds() -> None:
    source = a_search("random", HandSpace(conditional=True))
    asked = run(source, 1000)
    search = a_search("tpe", HandSpace(conditional=True))
    began = time.process_time()
    for number, values in enumerate(asked):
        search.restore(values)
        tell(search, number, asked)
    assert time.process_time() - began < 2
    assert search.ask() is not None


@pytest.mark.parametrize(
    "values",
    [
        {"x": 0.5, "lr": 0.1, "n": 3},
        {"x": 9.0, "lr": 0.1, "n": 3, "c": "good"},
        {"x": 0.5, "lr": 0.1, "n": 3.5, "c": "good"},
        {"x": 0.5, "lr": 0.1, "n": 3, "c": "ugly"},
        {"x": 0.5, "lr": 0.1, "n": 3, "c": "good", "more": 1},
        {"x": "0.5", "lr": 0.1, "n": True, "c": "good"},
    ],
)
def test_what_the_space_does_not_have_cannot_be_restored(values: dict[str, Scalar]) -> None:
    with pytest.raises(SpaceError, match=r"^suggestion 0: the space has no point \{"):
        a_search("tpe").restore(values)


def test_a_sampler_that_suggests_something_else_on_replay_is_found_out() -> None:
    search = a_search("nsgaii")
    values = run(a_search("nsgaii", seed=8), 1)[0]
    with pytest.raises(
        SweepError, match=r"^sweep/sampler=nsgaii: the search cannot be replayed: suggestion 0 was .*optuna 5"
    ):
        search.restore(values)


def test_somebody_elses_sampler_that_draws_from_the_global_random_numbers_is_replayed() -> None:
    sweep = {"options": {"_target_": "tests.test_search.Careless"}}
    random.seed(1)
    np.random.seed(1)
    before = random.getstate()
    one = run(a_search("optuna", **sweep), 5)
    assert random.getstate() == before
    random.seed(2)
    np.random.seed(2)
    search = a_search("optuna", **sweep)
    for number, values in enumerate(one[:3]):
        search.restore(values)
        tell(search, number, one)
    assert run(search, 1)[0] == one[3]


class Careless(optuna.samplers.BaseSampler):
    """A sampler without random numbers of its own."""

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        fraction = (random.random() + np.random.random()) / 2
        if isinstance(param_distribution, optuna.distributions.CategoricalDistribution):
            return param_distribution.choices[int(fraction * len(param_distribution.choices))]
        value = param_distribution.low + fraction * (param_distribution.high - param_distribution.low)
        return round(value) if isinstance(param_distribution, optuna.distributions.IntDistribution) else value


# --- as Optuna itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_stateless_sampler_suggests_what_plain_optuna_does_with_the_same_fresh_seeds(sampler: str) -> None:
    asked = run(a_search(sampler), 9 if sampler == "gp" else 40)
    study = optuna.create_study(study_name="unit")
    for number, values in enumerate(asked):
        study.sampler = samplers.build(
            sampler,
            {"tpe": {"n_startup_trials": 5, "group": True, "multivariate": True}}.get(
                sampler, OPTIONS[sampler]
            ),
            samplers.fresh_seed(7, number),
        )
        assert plain(study) == values
        study.tell(number, loss(values))


@pytest.mark.parametrize(
    ("sampler", "made"),
    [
        ("cmaes", lambda: optuna.samplers.CmaEsSampler(seed=7, warn_independent_sampling=False)),
        ("qmc", lambda: optuna.samplers.QMCSampler(seed=7)),
        ("nsgaii", lambda: optuna.samplers.NSGAIISampler(seed=7, population_size=6)),
        ("nsgaiii", lambda: optuna.samplers.NSGAIIISampler(seed=7, population_size=6)),
    ],
)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_sampler_with_a_memory_suggests_what_plain_optuna_does_with_the_same_seed(
    sampler: str, made: Callable[[], optuna.samplers.BaseSampler]
) -> None:
    with samplers.quiet():
        study = optuna.create_study(sampler=made())
        for number, values in enumerate(run(a_search(sampler), 30)):
            assert plain(study) == values
            study.tell(number, loss(values))


def plain(study: optuna.Study) -> dict[str, Any]:
    """What plain Optuna suggests next for :class:`HandSpace`."""
    trial = study.ask()
    trial.suggest_float("x", -4.0, 4.0)
    trial.suggest_float("lr", 1e-4, 1.0, log=True)
    trial.suggest_int("n", 0, 8)
    trial.suggest_categorical("c", ("good", "bad", None, 3))
    return trial.params


def test_running_suggestions_keep_others_away() -> None:
    space = HandSpace(a_parameter("x", FloatRange(low=-4.0, high=4.0)))

    def spread(*, liar: bool) -> float:
        spreads = []
        for seed in range(8):
            search = a_search("tpe", space, seed=seed, options={"constant_liar": liar})
            run(search, 25)
            waiting = [search.ask() for _ in range(16)]
            spreads.append(statistics.stdev(float(item.values["x"]) for item in waiting if item))  # type: ignore[arg-type]
        return statistics.mean(spreads)

    assert spread(liar=True) > 1.3 * spread(liar=False)


def test_a_value_exists_only_with_the_choice_that_it_depends_on() -> None:
    asked = run(a_search("tpe", HandSpace(conditional=True)), 60, slots=4)
    for values in asked:
        below = {"SGD": {"momentum"}, "Adam": {"beta1", "beta2"}}[str(values["optimizer"])]
        assert set(values) == {"x", "lr", "n", "c", "optimizer", *below}
    assert {values["optimizer"] for values in asked} == {"SGD", "Adam"}


def test_a_running_suggestion_counts_only_for_the_parameters_that_it_has() -> None:
    search = a_search("tpe", HandSpace(conditional=True))
    run(search, 20)
    suggestion = search.ask()
    assert suggestion is not None
    notes = search._study.get_trials(deepcopy=False)[-1].system_attrs
    assert notes
    assert not any(notes.values())


# --- what becomes of suggestions ------------------------------------------------------------------------


def outcomes(search: OptunaSearch) -> list[tuple[str, list[float] | None]]:
    return [(trial.state.name, trial.values) for trial in search._study.get_trials(deepcopy=False)]


def test_nan_and_missing_values_count_as_failed_as_in_optuna() -> None:
    search = a_search("random")
    for number, values in enumerate([[math.nan], None, [], [math.inf], [2.0]]):
        search.ask()
        search.tell(number, TrialState.COMPLETE, values)
    assert outcomes(search) == [("FAIL", None)] * 3 + [("COMPLETE", [math.inf]), ("COMPLETE", [2.0])]


def test_a_pruned_suggestion_keeps_its_last_value_where_samplers_look_for_it() -> None:
    search = a_search("random")
    for number in range(3):
        search.ask()
        if number == 0:
            search.report(0, 4, 0.5)
            search.report(0, 4, 0.75)  # the first one of a step is kept
        search.tell(number, TrialState.PRUNED, [0.25] if number == 1 else None)
    trials = search._study.get_trials(deepcopy=False)
    assert [trial.intermediate_values for trial in trials] == [{4: 0.5}, {0: 0.25}, {}]
    assert outcomes(search) == [("PRUNED", [0.5]), ("PRUNED", [0.25]), ("PRUNED", None)]


def test_a_later_outcome_of_a_suggestion_replaces_the_earlier_one() -> None:
    search = a_search("tpe", constraints=(Constraint(metric="mb", operator="<=", bound=1.0),))
    for _ in range(3):
        search.ask()
    search.tell(0, TrialState.COMPLETE, [1.0], [2.0])
    search.tell(1, TrialState.FAIL, None)
    search.tell(0, TrialState.COMPLETE, [3.0], [-1.0])
    search.tell(1, TrialState.COMPLETE, [2.0], [-0.5])
    assert outcomes(search) == [("COMPLETE", [3.0]), ("COMPLETE", [2.0]), ("RUNNING", None)]
    assert search._study.best_trial.number == 1
    violations = [list(trial.constraints.values()) for trial in search._study.get_trials(deepcopy=False)]
    assert violations == [[-1.0], [-0.5], []]
    search.tell(1, TrialState.FAIL, None)
    assert search._study.best_trial.number == 0
    search.tell(0, TrialState.FAIL, None)
    with pytest.raises(ValueError, match="No trials are completed yet"):
        _ = search._study.best_trial


def test_cmaes_goes_on_after_a_suggestion_that_made_a_generation_has_run_again() -> None:
    space = HandSpace(*(a_parameter(name, FloatRange(low=-4.0, high=4.0)) for name in ("x", "y")))
    search = a_search("cmaes", space)
    asked = run(search, 40)
    for number in range(0, 40, 3):
        search.tell(number, TrialState.FAIL, None)
        tell(search, number, asked)
    later = run_on(search, asked, 30)
    assert statistics.mean(loss(values) for values in later) < statistics.mean(loss(v) for v in asked[:20])


def run_on(search: OptunaSearch, asked: list[dict[str, Scalar]], trials: int) -> list[dict[str, Scalar]]:
    """Go on with a search that has asked for these."""
    later = []
    for _ in range(trials):
        suggestion = search.ask()
        assert suggestion is not None
        search.tell(len(asked) + len(later), TrialState.COMPLETE, [loss(suggestion.values)])
        later.append(dict(suggestion.values))
    return later


def test_an_excluded_suggestion_counts_as_failed_and_need_not_be_told() -> None:
    search = a_search("random", HandSpace(exclude=lambda values: values["n"] < 4))
    made = [search.ask() for _ in range(40)]
    for suggestion, (state, _) in zip(made, outcomes(search), strict=True):
        assert suggestion is not None
        assert (suggestion.points == ()) == (int(suggestion.values["n"]) < 4)  # type: ignore[arg-type]
        assert state == ("FAIL" if suggestion.points == () else "RUNNING")
    assert 5 < sum(suggestion.points == () for suggestion in made if suggestion) < 35


def test_enqueued_points_come_first_and_what_they_leave_open_is_chosen() -> None:
    enqueue = ({"x": 1.0, "n": 3}, {"lr": 0.01, "c": None, "x": 0.0, "n": 0})
    for sampler in ("tpe", "cmaes", "nsgaii"):
        search = a_search(sampler, enqueue=enqueue)
        first, second, third = run(search, 3)
        assert (first["x"], first["n"]) == (1.0, 3)
        assert second == {"lr": 0.01, "c": None, "x": 0.0, "n": 0}
        assert third["x"] not in (0.0, 1.0)
        again = a_search(sampler, enqueue=enqueue)
        assert again.restore(first).values == first
        assert again.restore(second).values == second


def test_what_is_known_from_elsewhere_is_learnt() -> None:
    known = run(a_search("random", seed=1), 60)
    better = []
    for seed in range(3):
        search = a_search("tpe", seed=seed)
        for values in known:
            search.learn(values, TrialState.COMPLETE, [loss(values)])
        better.append(statistics.mean(loss(values) for values in run(search, 5)))
    assert statistics.mean(better) < 0.5 * statistics.mean(loss(values) for values in known)
    search.learn({"x": 99.0}, TrialState.COMPLETE, [1.0])
    search.learn(known[0], TrialState.FAIL, [])
    search.learn(known[0], TrialState.COMPLETE, [math.nan])
    assert len(outcomes(search)) == 65
    search.learn({**known[0], "elsewhere": 1}, TrialState.PRUNED, [4.0])
    trial = search._study.get_trials(deepcopy=False)[-1]
    assert (trial.params, trial.intermediate_values) == (known[0], {0: 4.0})


def test_a_users_function_adds_parameters_that_become_overrides() -> None:
    def extend(trial: Any) -> None:
        trial.suggest_float("model.dropout", 0.0, 0.5)
        if trial.params["n"] > 4:
            trial.suggest_categorical("+note", ["it's", "plain"])

    search = a_search("tpe", extend=extend)
    asked = []
    for _ in range(20):
        suggestion = search.ask()
        assert suggestion is not None
        asked.append(dict(suggestion.values))
        dropout = suggestion.values["model.dropout"]
        for point in suggestion.points:
            assert f"model.dropout={dropout}" in point.overrides
            assert point.params["model.dropout"] == dropout
            if suggestion.values["n"] > 4:  # type: ignore[operator]
                assert point.params["note"] == suggestion.values["+note"]
                assert {"+note='it\\'s'", "+note=plain"} & set(point.overrides)
    assert {"+note" in values for values in asked} == {True, False}
    again = a_search("tpe", extend=extend)
    for values in asked:
        again.restore(values)
    assert again.ask() == search.ask()


def test_an_error_of_the_users_function_is_one_line() -> None:
    def extend(trial: Any) -> None:
        raise KeyError("model")

    with pytest.raises(SweepError, match=r"^sweep.custom_search_space: it raised KeyError: 'model'$"):
        a_search("tpe", extend=extend).ask()


@pytest.mark.parametrize(
    "value",
    ["plain", "a b", "it's", 'say "x"', "back\\", "a\\'b", "true", "", "a,b", "${x}", 1, 1e-05, None, True],
)
def test_hydra_reads_an_added_value_as_it_is(value: Any) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(f"key={_text(value)}")
    read = override.value()
    assert getattr(read, "text", read) == value


# --- objectives and constraints -------------------------------------------------------------------------

TWO = (
    Objective(metric="near_0", direction=Direction.MINIMIZE),
    Objective(metric="near_2", direction=Direction.MAXIMIZE),
)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsgaii", "nsgaiii"])
def test_two_objectives_lead_to_their_pareto_front(sampler: str) -> None:
    # a genetic sampler mutates one parameter in each child: with a single one, all would be mutants
    names = ("x",) if sampler == "gp" else ("x", "y", "z")
    space = HandSpace(*(a_parameter(name, FloatRange(low=-10.0, high=10.0)) for name in names))
    search = a_search(sampler, space, objectives=TWO)
    asked: list[float] = []
    trials = 12 if sampler == "gp" else 160
    for number in range(trials):
        suggestion = search.ask()
        assert suggestion is not None
        x = float(suggestion.values["x"])  # type: ignore[arg-type]
        asked.append(x)
        search.report(number, 0, x)  # there is nothing to decide, and no harm in it
        if number % 10 == 9:
            search.tell(number, TrialState.PRUNED, [x**2, -((x - 2) ** 2)])
        else:
            search.tell(number, TrialState.COMPLETE, [x**2, -((x - 2) ** 2)])
    late = asked[-trials // 2 :]
    # the front is 0 to 2: a tenth of the range
    assert sum(-0.5 <= x <= 2.5 for x in late) / len(late) > 0.35
    assert search.should_prune(0) is False


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsgaii", "nsgaiii"])
def test_constraints_change_what_is_suggested(sampler: str) -> None:
    names = ("x",) if sampler == "gp" else ("x", "y", "z")
    space = HandSpace(*(a_parameter(name, FloatRange(low=-4.0, high=4.0)) for name in names))
    constraint = Constraint(metric="x", operator="<=", bound=-1.0)

    def share(*, constrained: bool) -> float:
        inside = []
        for seed in range(1 if sampler == "gp" else 2):
            search = a_search(sampler, space, seed=seed, constraints=(constraint,) if constrained else ())
            for number in range(13 if sampler == "gp" else 120):
                suggestion = search.ask()
                assert suggestion is not None
                x = float(suggestion.values["x"])  # type: ignore[arg-type]
                violations = [constraint.violation(x)] if constrained else []
                if number % 9 == 4:
                    search.tell(number, TrialState.PRUNED, [loss(suggestion.values)])
                else:
                    search.tell(number, TrialState.COMPLETE, [loss(suggestion.values)], violations)
                inside += [x <= -0.5] if number > (8 if sampler == "gp" else 40) else []
        return sum(inside) / len(inside)

    assert share(constrained=True) > share(constrained=False) + 0.2


def test_a_complete_point_of_which_a_constraint_is_not_known_is_not_feasible() -> None:
    search = a_search("gp", constraints=(Constraint(metric="mb", operator=">=", bound=1.0),))
    for number in range(8):
        search.ask()
        search.tell(
            number, TrialState.COMPLETE, [float(number)], () if number == 2 else [math.nan if number else -1]
        )
    found = [list(trial.constraints.values()) for trial in search._study.get_trials(deepcopy=False)]
    assert found == [[-1.0]] + [[math.inf]] * 7
    assert search.ask() is not None


# --- a pruner between repeats ---------------------------------------------------------------------------


def test_a_search_prunes_by_what_was_reported_and_asking_changes_nothing() -> None:
    pruner = Chosen(name="successive_halving", options={"min_resource": 1, "reduction_factor": 2})
    reported = [(number, step, float(number)) for number in range(6) for step in range(4)]
    once, often = (a_search("random", pruner=pruner) for _ in range(2))
    for search in (once, often):
        for _ in range(6):
            search.ask()
        for number, step, value in reported:
            search.report(number, step, value)
            if search is often:
                search.should_prune(number)
                search.should_prune(number)
    decided = [once.should_prune(number) for number in range(6)]
    assert decided == [often.should_prune(number) for number in range(6)]
    assert decided == [False, True, True, True, True, True]


def test_a_search_with_hyperband_is_replayed() -> None:
    pruner = Chosen(name="hyperband", options={"min_resource": 1, "max_resource": 9, "reduction_factor": 3})
    whole = recorded(a_search("tpe", pruner=pruner), 40)
    again = a_search("tpe", pruner=pruner)
    whole.again(again, len(whole.calls))
    assert again.ask() == whole.search.ask()
    pruned = [whole.search.should_prune(number) for number in range(40)]
    assert any(pruned)
    assert pruned == [again.should_prune(number) for number in range(40)]


# --- options and registry -------------------------------------------------------------------------------


def test_every_sampler_is_found_by_its_name_and_helpers_are_none() -> None:
    assert set(base.names()) == {"grid", *samplers.CLASSES, "optuna"}
    for name in base.names():
        assert base.load(name).name == name
    assert base.load("tpe").searcher is OptunaSearch
    for helper in ("study", "pruning", "samplers", "memory", "targets", "checks"):
        with pytest.raises(SpaceError, match=f"'{helper}' is not a sampler"):
            base.load(helper)
    assert set(base.pruner_options()) == {
        "none", "median", "percentile", "successive_halving", "hyperband", "patient", "threshold", "wilcoxon", "optuna",
    }  # fmt: skip


def test_the_options_are_optunas_own_with_its_defaults() -> None:
    import inspect
    from dataclasses import asdict

    changed = {"multivariate", "group"}
    for name, class_name in samplers.CLASSES.items():
        theirs = inspect.signature(getattr(optuna.samplers, class_name)).parameters
        ours = asdict(base.load(name).options())  # type: ignore[operator]
        assert "seed" in ours
        for key, default in ours.items():
            assert key in theirs, (name, key)
            assert default == theirs[key].default or key in changed, (name, key)
    for name, conf in base.pruner_options().items():
        if name in {"none", "optuna"}:
            continue
        class_name = "".join(part.title() for part in name.split("_")) + "Pruner"
        theirs = inspect.signature(getattr(optuna.pruners, class_name)).parameters
        ours = asdict(conf())  # type: ignore[operator]
        assert set(ours) == set(theirs), name
        for key, default in ours.items():
            given = theirs[key].default
            assert default == (None if given is inspect.Parameter.empty else given), (name, key)


def test_hydra_takes_the_options_and_leaves_those_of_any_optuna_sampler_open(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    from repro_sweep.config import schema

    schema.register()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "config.yaml").write_text("a: 1\n")
    (tmp_path / "sweep" / "mine.yaml").write_text(
        "defaults: [base_sweep, sampler: optuna, executor: local, _self_]\n"
        "sampler: {_target_: a.B, n: 3, inner: {_target_: c.D}}\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = compose("config", overrides=["+sweep=mine"])
        assert config.sweep.sampler == {"_target_": "a.B", "seed": None, "n": 3, "inner": {"_target_": "c.D"}}
        config = compose(
            "config", overrides=["+sweep=default", "sweep/sampler=tpe", "sweep.sampler.n_startup_trials=3"]
        )
        assert config.sweep.sampler.n_startup_trials == 3
        with pytest.raises(Exception, match="n_startup"):
            compose(
                "config",
                overrides=["+sweep=default", "sweep/sampler=random", "sweep.sampler.n_startup_trials=3"],
            )


def test_the_names_and_options_of_samplers_are_known_without_importing_optuna() -> None:
    code = (
        "import sys; from repro_sweep.search import base; base.options(); base.pruner_options();"
        "print(base.asks_quickly_until('tpe'), base.asks_quickly_until('random'), base.asks_quickly_until('grid'));"
        "print(sorted({'hydra', 'optuna', 'omegaconf', 'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    first, second = done.stdout.splitlines()
    assert int(first.split()[0]) > 0
    assert first.split()[1:] == ["None", "None"]
    assert second == "[]"


def test_a_package_of_optunahub_is_loaded_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optunahub
    import optunahub._conf

    monkeypatch.setattr(optunahub._conf, "cache_home", lambda: str(tmp_path))
    folder = tmp_path / "github.com/optuna/optunahub-registry/main/package/samplers/mine"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(
        "import optuna\n"
        "class Mine(optuna.samplers.RandomSampler):\n    pass\n"
        "class Other(optuna.samplers.RandomSampler):\n    pass\n"
        "__all__ = ['Mine']\n"
    )
    for target in ("hub:samplers/mine", "hub:samplers/mine:Mine"):
        made = samplers.build("optuna", {"_target_": target}, 1)
        assert type(made).__name__ == "Mine"
        assert len(run(a_search("optuna", options={"_target_": target}), 3)) == 3
    with pytest.raises(
        SweepError, match=r"_target_: 'hub:samplers/mine:Others': name a class of it \(hub:samplers/mine:Mine"
    ):
        samplers.build("optuna", {"_target_": "hub:samplers/mine:Others"}, 1)


def test_targets_are_made_at_any_depth() -> None:
    with samplers.quiet():
        made = targets.instantiate(
            {
                "_target_": "optuna.samplers.NSGAIISampler",
                "crossover": {"_target_": "optuna.samplers.nsgaii.SBXCrossover", "eta": 3.0},
            },
            "sweep.sampler",
        )
    assert isinstance(made, optuna.samplers.NSGAIISampler)
    assert isinstance(made._child_generation_strategy._crossover, optuna.samplers.nsgaii.SBXCrossover)  # type: ignore[attr-defined]
    partial: Any = targets.instantiate({"_target_": "builtins.pow", "_args_": [2], "_partial_": True}, "w")
    assert partial(5) == 32
    assert targets.instantiate([{"a": {"_target_": "builtins.dict", "b": 1}}, 2], "w") == [{"a": {"b": 1}}, 2]


def test_crossover_and_reference_points_of_the_named_samplers_are_made_too() -> None:
    options = {
        "population_size": 6,
        "crossover": {"_target_": "optuna.samplers.nsgaii.BLXAlphaCrossover"},
        "reference_points": [[1.0, 0.0], [0.0, 1.0]],
    }
    space = HandSpace(a_parameter("x", FloatRange(low=0.0, high=1.0)))
    assert check(space, a_sweep("nsgaiii", objectives=TWO, options=options)) == []
    search = a_search("nsgaiii", space, objectives=TWO, options=options)
    for number in range(20):
        assert search.ask() is not None
        search.tell(number, TrialState.COMPLETE, [float(number), 1.0])


# --- before the start -----------------------------------------------------------------------------------


def refusals() -> Iterator[tuple[str, dict[str, Any], Any, str]]:
    plain_space, nested = HandSpace(), HandSpace(conditional=True)
    of = dict  # type: ignore[var-annotated]
    yield (
        "optuna",
        of(options={"_target_": "optuna.samplers.TPE"}),
        plain_space,
        (r"^sweep.sampler._target_: 'optuna.samplers.TPE': optuna.samplers has no 'TPE'$"),
    )
    yield (
        "optuna",
        of(options={"_target_": "nowhere.Sampler"}),
        plain_space,
        (r"^sweep.sampler._target_: 'nowhere.Sampler': there is no module 'nowhere'; it must be a dotted"),
    )
    yield (
        "optuna",
        of(options={"_target_": None}),
        plain_space,
        "^sweep.sampler._target_: must be a dotted name .*; got None$",
    )
    yield (
        "optuna",
        of(options={"_target_": "optuna.pruners.NopPruner"}),
        plain_space,
        ("^sweep.sampler._target_: 'optuna.pruners.NopPruner' is no sampler of Optuna's, got NopPruner$"),
    )
    yield (
        "optuna",
        of(options={"_target_": "optuna.samplers.RandomSampler", "sed": 1}),
        plain_space,
        (r"^sweep.sampler.sed: not an option of RandomSampler \(seed\)$"),
    )
    yield (
        "optuna",
        of(options={"_target_": "optuna.samplers.GridSampler"}),
        plain_space,
        ("^sweep.sampler.search_space: must be given for GridSampler$"),
    )
    yield (
        "optuna",
        of(options={"_target_": "optuna.samplers.CmaEsSampler"}),
        nested,
        "^sweep/sampler=cmaes: it cannot handle",
    )
    yield (
        "nsgaii",
        of(options={"population_size": 1}),
        plain_space,
        ("^sweep.sampler.population_size: must be at least 2, got 1$"),
    )
    yield "nsgaii", of(options={"crossover_prob": 2.0}), plain_space, "^sweep.sampler.crossover_prob: .*range"
    yield (
        "nsgaii",
        of(options={"crossover": "uniform"}),
        plain_space,
        "^sweep.sampler.crossover: 'uniform' is not a valid",
    )
    yield (
        "nsgaiii",
        of(options={"reference_points": [[1.0]]}, objectives=TWO),
        plain_space,
        ("^sweep.sampler.reference_points: each point needs 2 numbers"),
    )
    yield (
        "nsgaiii",
        of(options={"reference_points": "even"}),
        plain_space,
        "reference_points: must be a list of points",
    )
    yield "qmc", of(options={"qmc_type": "lattice"}), plain_space, "^sweep.sampler.qmc_type: .*halton"
    yield "tpe", of(options={"multivariate": False, "group": True}), plain_space, "^sweep.sampler: .*group"
    yield (
        "tpe",
        of(options={"n_ei_candidates": 0}),
        plain_space,
        "^sweep.sampler.n_ei_candidates: must be at least 1, got 0$",
    )
    yield (
        "tpe",
        of(options={"gama": 1}),
        plain_space,
        r"^sweep.sampler.gama: not an option of TPESampler \(.*gamma",
    )
    yield (
        "cmaes",
        of(options={"lr_adapt": True, "with_margin": True}),
        plain_space,
        "^sweep.sampler: .*lr_adapt",
    )
    yield (
        "cmaes",
        of(objectives=TWO),
        plain_space,
        (
            r"^sweep/sampler=cmaes: it needs one objective, got 2 \(near_0, near_2\); for several: bruteforce, gp"
        ),
    )
    for name in ("cmaes", "gp", "qmc"):
        yield (
            name,
            {},
            nested,
            (
                f"^sweep/sampler={name}: it cannot handle parameters that exist only with some choice of another: "
                "momentum, beta1, beta2; these samplers can: bruteforce, random, tpe$"
            ),
        )
    yield (
        "bruteforce",
        {},
        plain_space,
        "^sweep.params.x: sweep/sampler=bruteforce tries every value, .*-4.0 to 4.0$",
    )
    yield (
        "tpe",
        of(enqueue=({"x": 1.0}, {"y": 1})),
        plain_space,
        r"^sweep.enqueue\[1\]: 'y' is not a parameter$",
    )
    yield (
        "tpe",
        of(objectives=TWO, pruner=Chosen(name="median")),
        plain_space,
        (r"^sweep/pruner: pruning needs one objective, got 2 \(near_0, near_2\)$"),
    )
    yield (
        "tpe",
        of(objectives=TWO, repeats_pruner=Chosen(name="median")),
        plain_space,
        ("^sweep/repeats_pruner: pruning needs one"),
    )
    yield "tpe", of(pruner=Chosen(name="percentile")), plain_space, "^sweep.pruner.percentile: must be given"
    yield (
        "tpe",
        of(repeats_pruner=Chosen(name="threshold")),
        plain_space,
        ("^sweep.repeats_pruner: threshold needs lower, upper or both$"),
    )


@pytest.mark.parametrize(("sampler", "changes", "space", "line"), list(refusals()))
def test_what_cannot_be_done_is_said_in_one_line_before_the_start(
    sampler: str, changes: dict[str, Any], space: Any, line: str
) -> None:
    with pytest.raises((SweepError, SpaceError), match=line) as caught:
        check(space, a_sweep(sampler, **{"options": {}, **changes}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sampler", "missing", "line"),
    [
        ("cmaes", {"cmaes"}, "^sweep/sampler=cmaes needs the package cmaes: pip install cmaes$"),
        (
            "gp",
            {"torch", "scipy"},
            "^sweep/sampler=gp needs the packages scipy and torch: pip install scipy torch$",
        ),
        ("gp", {"torch"}, "^sweep/sampler=gp needs the package torch: pip install torch$"),
        ("qmc", {"scipy"}, "^sweep/sampler=qmc needs the package scipy: pip install scipy$"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    sampler: str, missing: set[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = samplers.find_spec
    monkeypatch.setattr(samplers, "find_spec", lambda name: None if name in missing else found(name))
    with pytest.raises(SweepError, match=line):
        check(HandSpace(), a_sweep(sampler))


def test_without_optunahub_its_pip_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    line = "^sweep.sampler._target_: hub:samplers/x needs the package optunahub: pip install optunahub$"
    with pytest.raises(SweepError, match=line):
        check(HandSpace(), a_sweep("optuna", options={"_target_": "hub:samplers/x"}))


def test_what_a_sampler_will_not_do_is_noticed() -> None:
    nested, limit = HandSpace(conditional=True), (Constraint(metric="mb", operator="<=", bound=1.0),)
    assert check(HandSpace(), a_sweep("cmaes")) == [
        "sweep/sampler=cmaes draws categorical parameters at random: c"
    ]
    assert check(nested, a_sweep("nsgaii")) == [
        "sweep/sampler=nsgaii draws at random what exists only with some choice of another: momentum, beta1, beta2"
    ]
    assert check(nested, a_sweep("random", constraints=limit, start_from=("other",))) == [
        "sweep.constraints: sweep/sampler=random does not use them to choose points",
        "sweep.start_from: sweep/sampler=random does not learn from other sweeps",
    ]
    assert (
        check(nested, a_sweep("tpe", constraints=limit, start_from=("other",), pruner=Chosen(name="median")))
        == []
    )
    assert check(DISCRETE, a_sweep("bruteforce")) == []
    assert check(nested, a_spec(Path("/nowhere"))) == []


def test_a_failure_of_somebody_elses_sampler_is_one_line() -> None:
    search = a_search("optuna", options={"_target_": "tests.test_search.Broken"})
    with pytest.raises(SweepError, match=r"^sweep.sampler: Broken failed: ZeroDivisionError: no idea$"):
        search.ask()


class Broken(Careless):
    """A sampler that fails."""

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        raise ZeroDivisionError("no idea")
