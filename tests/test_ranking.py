"""Ranking: what a sweep has found, read back from MLflow alone."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import environment
from omegaconf import OmegaConf
from tracking_helpers import (
    CONFIG,
    START,
    add_trial,
    drain,
    end,
    make_ledger,
    run_trial,
    runs_of,
    start,
)

from repro_sweep.cli import rank as command
from repro_sweep.cli import summary
from repro_sweep.errors import TrackingError
from repro_sweep.ledger import Ledger
from repro_sweep.ranking import best_trial, leaderboard, pareto_front, rank, trials
from repro_sweep.records import NewReport
from repro_sweep.standings import (
    Entry,
    Row,
    columns,
    front_of,
    non_dominated_fronts,
    rank_points,
    usual_direction,
)
from repro_sweep.states import Direction, FailureKind, TrialState
from repro_sweep.sweep import Budget, Chosen, Constraint, Objective, SearchSpec, SpaceSpec

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"  # MLflow's own use of SQLAlchemy
)

MAXIMIZE, MINIMIZE = Direction.MAXIMIZE, Direction.MINIMIZE


# --- the order of rows -----------------------------------------------------------------------------------------


def entry(number: int, point: str, value: float | None, state: TrialState = TrialState.COMPLETE) -> Entry:
    """A trial of a point that a letter stands for."""
    return Entry(number=number, params={"point": point}, state=state, value=value)


def order(rows: list[Row]) -> str:
    """The points' letters, best first."""
    return "".join(str(row.params["point"]) for row in rows)


def test_points_are_ranked_by_their_mean_over_repeats() -> None:
    entries = [
        entry(0, "a", 1.0),
        entry(1, "a", 2.0),
        entry(2, "b", 1.8),
        entry(3, "b", 1.6),
        entry(4, "c", 1.9),
    ]
    rows = rank_points(entries, MAXIMIZE)
    assert order(rows) == "cba"
    assert [row.rank for row in rows] == [1, 2, 3]
    assert [row.n for row in rows] == [1, 2, 2]
    assert rows[1].mean == pytest.approx(1.7)
    assert rows[1].std == pytest.approx(float(np.std([1.8, 1.6], ddof=1)))
    assert rows[0].std is None
    assert rows[2].trials == (0, 1)
    assert order(rank_points(entries, MINIMIZE)) == "abc"


@pytest.mark.parametrize("value", [354 / 359, 0.1, 1e300, -3.3e-7])
def test_equal_repeats_have_no_spread_at_all(value: float) -> None:
    (row,) = rank_points([entry(number, "a", value) for number in range(3)], MAXIMIZE)
    assert (row.mean, row.std) == (value, 0.0)


def test_the_best_trial_of_a_point_depends_on_the_direction_and_ties_go_to_the_first() -> None:
    entries = [entry(0, "a", 2.0), entry(1, "a", 1.0), entry(2, "a", 2.0), entry(3, "a", 1.0)]
    assert rank_points(entries, MAXIMIZE)[0].best == 0
    assert rank_points(entries, MINIMIZE)[0].best == 1


@pytest.mark.parametrize("direction", Direction)
def test_failed_and_non_finite_points_are_always_last_and_have_no_rank(direction: Direction) -> None:
    entries = [
        entry(0, "f", None, TrialState.FAIL),
        entry(1, "n", math.nan),
        entry(2, "i", math.inf),
        entry(3, "j", -math.inf),
        entry(4, "x", 1.0),
        entry(5, "m", 1.0),
        entry(6, "m", math.nan),
        entry(7, "p", 9.0, TrialState.PRUNED),
        entry(8, "w", None, TrialState.WAITING),
    ]
    rows = rank_points(entries, direction)
    assert order(rows) == "xnijm" + "fpw"
    assert [row.rank for row in rows] == [1, *[None] * 7]
    assert [row.best for row in rows[:6]] == [4, None, None, None, 5, None]


def test_a_point_with_one_failed_repeat_is_ranked_by_the_others_and_says_so() -> None:
    rows = rank_points(
        [entry(0, "a", 1.0), entry(1, "a", None, TrialState.FAIL), entry(2, "b", 0.5)], MAXIMIZE
    )
    assert order(rows) == "ab"
    assert (rows[0].n, rows[0].states[TrialState.FAIL], rows[0].states[TrialState.COMPLETE]) == (1, 1, 1)


def test_ties_are_in_the_order_of_trial_numbers_however_they_arrive() -> None:
    entries = [entry(number, letter, 1.0) for number, letter in enumerate("dacb")]
    assert order(rank_points(entries, MAXIMIZE)) == order(rank_points(reversed(entries), MINIMIZE)) == "dacb"


def test_means_of_huge_values_do_not_overflow() -> None:
    (row,) = rank_points([entry(0, "a", 1.7e308), entry(1, "a", 1.7e308), entry(2, "a", 1.6e308)], MAXIMIZE)
    assert row.mean == pytest.approx(1.7e308 / 3 + 1.7e308 / 3 + 1.6e308 / 3)
    assert row.std is not None
    assert math.isfinite(row.std)


def test_equal_params_are_one_point_whatever_their_order() -> None:
    first = Entry(number=0, params={"a": 1, "b": [1, 2]}, state=TrialState.COMPLETE, value=1.0)
    second = dataclasses.replace(first, number=1, params={"b": [1, 2], "a": 1})
    third = dataclasses.replace(first, number=2, params={"a": 1, "c": None})
    rows = rank_points([third, second, first], MAXIMIZE)
    assert [row.trials for row in rows] == [(0, 1), (2,)]
    assert columns(rows) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("val_loss", MINIMIZE),
        ("loss", MINIMIZE),
        ("valLoss", MINIMIZE),
        ("test/RMSE", MINIMIZE),
        ("fit_time", MINIMIZE),
        ("accuracy", MAXIMIZE),
        ("glossiness", MAXIMIZE),
        ("maes_score", MAXIMIZE),
    ],
)
def test_losses_errors_and_times_are_minimised_unless_told_otherwise(
    metric: str, direction: Direction
) -> None:
    assert usual_direction(metric) is direction


# --- several objectives, constraints ---------------------------------------------------------------------------


def both(number: int, first: float, second: float, *, limit: float | None = None) -> Entry:
    """A trial with values of two objectives, and of a metric with a constraint."""
    return Entry(
        number=number, params={"point": chr(97 + number)}, state=TrialState.COMPLETE, value=first, more=(second,),
        constrained=(limit,),
    )  # fmt: skip


def slow_fronts(points: list[tuple[float, ...]]) -> list[int]:
    """Non-dominated sorting as it is defined."""

    def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return one != other and all(mine <= its for mine, its in zip(one, other, strict=True))

    fronts = [0] * len(points)
    left, front = set(range(len(points))), 0
    while left:
        first = {each for each in left if not any(dominates(points[other], points[each]) for other in left)}
        for each in first:
            fronts[each] = front
        left -= first
        front += 1
    return fronts


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_fronts_are_those_of_the_definition_with_ties_and_equal_points(objectives: int) -> None:
    chance = random.Random(objectives)
    for size in (0, 1, 2, 60):
        for spread in (1, 5, 1000):
            points = [
                tuple(float(chance.randint(-spread, spread)) for _ in range(objectives)) for _ in range(size)
            ]
            assert non_dominated_fronts(points) == slow_fronts(points)


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [2, 3])
def test_ten_thousand_points_are_sorted_within_seconds(objectives: int) -> None:
    chance = random.Random(1)
    for points in (
        [tuple(chance.random() for _ in range(objectives)) for _ in range(10_000)],
        [(float(index),) * objectives for index in range(10_000)],  # a front for each
    ):
        began = time.process_time()
        fronts = non_dominated_fronts(points)
        assert time.process_time() - began < 20
        assert len(fronts) == 10_000
    assert fronts == list(range(10_000))


def test_the_pareto_front_comes_first_and_each_front_has_one_rank() -> None:
    entries = [
        both(0, 0.9, 50), both(1, 0.8, 10), both(2, 0.7, 20), both(3, 0.95, 80), both(4, 0.6, 60), both(5, 0.8, 10),
    ]  # fmt: skip
    rows = rank_points(entries, MAXIMIZE, more=[MINIMIZE])
    assert [(str(row.params["point"]), row.rank) for row in rows] == [
        ("d", 1), ("a", 1), ("b", 1), ("f", 1), ("c", 2), ("e", 3),
    ]  # fmt: skip
    assert rows[0].means == (0.95, 80)
    assert order(rank_points(entries, MINIMIZE, more=[MAXIMIZE])) == "ed" + "ca" + "bf"
    assert order(front_of(rows)) == "dabf"


def test_a_point_that_lacks_an_objective_has_no_rank() -> None:
    entries = [
        both(0, 0.9, 50),
        both(1, 0.99, math.nan),
        dataclasses.replace(both(2, 0.99, 0), more=(None,)),
        dataclasses.replace(both(3, 0.99, 0), state=TrialState.PRUNED),
    ]
    rows = rank_points(entries, MAXIMIZE, more=[MINIMIZE])
    assert [row.rank for row in rows] == [1, None, None, None]
    assert order(rows) == "abcd"
    assert rows[2].means == (None, None)
    assert rows[3].last == (0.99,)


LIMIT = Constraint(metric="latency_ms", operator="<=", bound=50)


def test_infeasible_points_are_ranked_after_all_feasible_ones_and_say_why() -> None:
    entries = [
        both(0, 0.9, 0, limit=61.25), both(1, 0.5, 0, limit=50), both(2, 0.7, 0, limit=None),
        both(3, 0.8, 0, limit=math.nan), both(4, 0.6, 0, limit=1),
    ]  # fmt: skip
    rows = rank_points(
        [dataclasses.replace(each, more=()) for each in entries], MAXIMIZE, constraints=[LIMIT]
    )
    assert order(rows) == "eb" + "adc"
    assert [row.rank for row in rows] == [1, 2, 3, 4, 5]
    assert [row.infeasible for row in rows] == [
        (), (), ("latency_ms 61.25 > 50",), ("latency_ms nan",), ("no latency_ms",),
    ]  # fmt: skip
    assert [row.violations for row in rows] == [(-49,), (0,), (11.25,), (math.inf,), (math.inf,)]
    fronts = rank_points(entries, MAXIMIZE, more=[MINIMIZE], constraints=[LIMIT])
    assert [(str(row.params["point"]), row.rank) for row in fronts] == [
        ("e", 1), ("b", 2), ("a", 3), ("d", 4), ("c", 5),
    ]  # fmt: skip


def test_a_constraint_is_about_the_mean_over_repeats() -> None:
    repeats = [
        both(0, 1.0, 0, limit=60),
        dataclasses.replace(both(1, 1.0, 0, limit=30), params={"point": "a"}),
    ]
    (row,) = rank_points(repeats, MAXIMIZE, more=[MINIMIZE], constraints=[LIMIT])
    assert (row.infeasible, row.violations, row.n) == ((), (-5.0,), 2)
    least = Constraint(metric="latency_ms", operator=">=", bound=46)
    (row,) = rank_points(repeats, MAXIMIZE, more=[MINIMIZE], constraints=[least])
    assert row.infeasible == ("latency_ms 45 < 46",)


# --- read from MLflow -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> str:
    """A store with a small sweep: two optimizers (one with a parameter of its own) over two seeds, and odd cases."""
    folder = tmp_path_factory.mktemp("ranking")
    uri = f"sqlite:///{shutil.copy(empty_store, folder)}"
    old = make_ledger(folder / "old", uri, created_at=START - 10)
    add_trial(old, 0)
    run_trial(old, 0, {"accuracy": 1.0})
    drain(folder / "old")
    _fill(make_ledger(folder / "grid", uri))
    drain(folder / "grid")
    empty = make_ledger(folder / "empty", uri, name="empty")
    add_trial(empty, 0)
    drain(folder / "empty")
    return uri


def _fill(ledger: Ledger) -> None:
    values = {("SGD", None): (0.80, 0.90), ("Adam", 0.9): (0.86, 0.88), ("Adam", 0.95): (math.nan, 0.99)}
    number = 0
    for (optimizer, beta), accuracies in values.items():
        for seed, accuracy in enumerate(accuracies):
            params = {"optimizer": optimizer} | ({} if beta is None else {"optimizer.beta1": beta})
            add_trial(ledger, number, params, repeat={"seed": seed}, config=f"{CONFIG}seed: {seed}\n")
            run_trial(ledger, number, {"accuracy": accuracy, "val_loss": 1 - accuracy, "acc@5": 0.5})
            number += 1
    add_trial(ledger, number, {"optimizer": "LBFGS"})
    attempt = start(ledger, number)
    end(ledger, number, attempt, state=TrialState.FAIL, kind=FailureKind.CRASH, message="signal 11")
    add_trial(ledger, number + 1, {"optimizer": "none"})


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another machine, so to speak; and reading leaves no traces there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "mlflow.db"], [tmp_path / "other.db"])


def test_trials_lists_every_trial_of_the_newest_sweep_whatever_its_state(store: str) -> None:
    found = trials("grid", uri=store)
    assert [trial.number for trial in found] == list(range(8))
    assert [trial.state for trial in found] == [TrialState.COMPLETE] * 6 + [
        TrialState.FAIL,
        TrialState.WAITING,
    ]
    assert found[2].params == {"optimizer": "Adam", "optimizer.beta1": 0.9}
    assert found[3].repeat == {"seed": 1}
    assert found[3].overrides == ("optimizer=Adam", "optimizer.beta1=0.9", "seed=1")
    assert found[3].metrics["accuracy"] == 0.88
    assert found[3].metrics["acc@5"] == 0.5
    assert math.isnan(found[4].metrics["accuracy"])
    assert found[6].failure is not None
    assert (found[6].failure.kind, found[6].failure.message) == (FailureKind.CRASH, "signal 11")
    assert found[0].failure is None
    assert found[0].identity == f"{0:064x}"
    assert {trial.run_id for trial in found} <= {run.info.run_id for run in runs_of(store)}


def test_the_config_and_the_artifacts_of_a_trial_need_no_more_than_mlflow(store: str) -> None:
    trial = trials("grid", uri=store)[1]
    assert trial.config == OmegaConf.create(f"{CONFIG}seed: 1\n")
    assert trial.config.optimizer.betas == [0.9, 0.999]
    assert trial.artifact("trial.log").read_text() == "log of trial 1\n"
    assert trial.artifact("repro_sweep").is_dir()
    with pytest.raises(
        TrackingError, match=r"trial 1 has no artifact 'model\.pt': it has repro_sweep, trial\.log"
    ):
        trial.artifact("model.pt")


def test_no_copy_of_an_artifact_outlives_the_process_that_asked_for_it(store: str, tmp_path: Path) -> None:
    run_id = trials("grid", uri=store)[1].run_id
    code = (
        "import sys; from repro_sweep.results import artifact_of\n"
        "print(artifact_of(sys.argv[1], 'trial.log', sys.argv[2]).read_text(), end='')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, run_id, store],
        env=environment({"TMPDIR": str(tmp_path)}), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "log of trial 1\n"
    assert list(tmp_path.iterdir()) == []


def test_the_best_trial_is_the_best_one_of_the_point_with_the_best_mean(store: str) -> None:
    best = best_trial("grid", uri=store)
    assert (best.number, best.metrics["accuracy"]) == (3, 0.88)  # not 1 with its 0.90: its mean is worse
    assert best_trial("grid", metric="accuracy", direction="minimize", uri=store).number == 0
    assert best_trial("grid", metric="val_loss", uri=store).number == 3


def test_the_leaderboard_has_a_row_for_each_point_with_mean_and_deviation(store: str) -> None:
    frame = leaderboard("grid", uri=store)
    assert list(frame.columns[:7]) == [
        "rank",
        "optimizer",
        "optimizer.beta1",
        "accuracy",
        "accuracy_std",
        "n",
        "trials",
    ]
    assert list(frame.columns[7:]) == ["waiting", "running", "complete", "pruned", "fail"]
    assert frame["optimizer"].to_list() == ["Adam", "SGD", "Adam", "LBFGS", "none"]
    assert frame["rank"].isna().to_list() == [False, False, True, True, True]
    assert frame["accuracy"].iloc[0] == pytest.approx(0.87)
    assert frame["accuracy_std"].iloc[0] == pytest.approx(float(np.std([0.86, 0.88], ddof=1)))
    assert frame["trials"].iloc[1] == (0, 1)
    assert frame["n"].to_list() == [2, 2, 2, 0, 0]
    assert frame["fail"].sum() == frame["waiting"].sum() == 1
    assert math.isnan(frame["optimizer.beta1"].iloc[1])
    assert len(leaderboard("grid", top=2, uri=store)) == 2
    assert leaderboard("grid", metric="acc@5", uri=store)["acc@5"].iloc[0] == 0.5


def test_the_ranking_is_to_be_had_without_pandas_and_says_its_direction(store: str) -> None:
    ranking = rank("grid", metric="val_loss", top=1, uri=store)
    assert (ranking.sweep, ranking.metric, ranking.direction) == ("grid", "val_loss", MINIMIZE)
    assert ranking.params == ("optimizer", "optimizer.beta1")
    assert [row.trials for row in ranking.rows] == [(2, 3)]


def test_the_store_is_found_through_the_environment_or_in_this_folder(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrackingError, match="no MLflow store: MLFLOW_TRACKING_URI is not set"):
        trials("grid")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert len(trials("grid")) == 8
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (tmp_path / "mlflow.db").symlink_to(store.removeprefix("sqlite:///"))
    assert best_trial("grid").number == 3


def test_mistakes_are_one_line_that_says_what_there_is(store: str) -> None:
    with pytest.raises(TrackingError, match=r"no sweep named 'gird' at .*: did you mean grid\?$"):
        trials("gird", uri=store)
    with pytest.raises(TrackingError, match=r"no sweep named \"it's\""):
        trials("it's", uri=store)
    with pytest.raises(
        TrackingError, match=r"no trial of sweep 'grid' has a metric 'acuracy'; did you mean accuracy"
    ):
        leaderboard("grid", metric="acuracy", uri=store)
    with pytest.raises(TrackingError, match="'up' is neither 'maximize' nor 'minimize'"):
        leaderboard("grid", direction="up", uri=store)
    with pytest.raises(TrackingError, match=r"sweep 'empty' has no complete trial .* \(1 WAITING\)"):
        best_trial("empty", uri=store)
    assert leaderboard("empty", uri=store)["rank"].isna().all()


def test_reading_never_creates_a_store(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"there is no MLflow store$"):
        trials("grid", uri="sqlite:///nothing.db")
    (tmp_path / "other.db").touch()
    with pytest.raises(TrackingError, match="but no MLflow store"):
        trials("grid", uri="sqlite:///other.db")
    assert (tmp_path / "other.db").stat().st_size == 0


def test_reading_changes_nothing_in_the_store(store: str) -> None:
    path = Path(store.removeprefix("sqlite:///"))
    before = path.read_bytes()
    best_trial("grid", uri=store)
    leaderboard("grid", uri=store)
    assert path.read_bytes() == before


def test_a_server_that_is_down_is_one_line_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"^http://127\.0\.0\.1:9: .*[Cc]onnection") as caught:
        trials("grid", uri="http://127.0.0.1:9")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


OBJECTIVES = (
    Objective(metric="accuracy", direction=MAXIMIZE),
    Objective(metric="latency_ms", direction=MINIMIZE),
)


@pytest.fixture(scope="module")
def searches(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> str:
    """Sweeps with two objectives, with and without a constraint."""
    folder = tmp_path_factory.mktemp("objectives")
    uri = f"sqlite:///{shutil.copy(empty_store, folder)}"
    limits = {"free": None, "limited": 50.0, "hopeless": 1.0}
    for name, bound in limits.items():
        constraints = () if bound is None else (Constraint(metric="latency_ms", operator="<=", bound=bound),)
        search = SearchSpec(
            sampler=Chosen(name="nsgaii"), seed=1, space=SpaceSpec(), budget=Budget(), constraints=constraints
        )
        ledger = make_ledger(
            folder / name, uri, name=name, objectives=OBJECTIVES, search=search, sampler="nsgaii"
        )
        for number, (accuracy, latency) in enumerate([(0.9, 61), (0.8, 40), (0.7, 45), (0.6, 10), (0.5, 99)]):
            add_trial(ledger, number, {"lr": number})
            run_trial(ledger, number, {"accuracy": accuracy, "latency_ms": latency})
        add_trial(ledger, 5, {"lr": 5})
        end(ledger, 5, start(ledger, 5), {"accuracy": 0.31}, state=TrialState.PRUNED)
        ledger.close()
        drain(folder / name)
    return uri


def test_several_objectives_are_ranked_by_their_pareto_front(searches: str) -> None:
    ranking = rank("free", uri=searches)
    assert ranking.objectives == OBJECTIVES
    assert ranking.front == 3
    assert [(row.trials[0], row.rank) for row in ranking.rows] == [
        (0, 1), (1, 1), (3, 1), (2, 2), (4, 3), (5, None),
    ]  # fmt: skip
    frame = leaderboard("free", uri=searches)
    columns = ["rank", "lr", "accuracy", "accuracy_std", "latency_ms", "latency_ms_std", "n", "trials"]
    assert list(frame.columns) == [*columns, "waiting", "running", "complete", "pruned", "fail"]
    assert frame["latency_ms"].to_list()[:5] == [61, 40, 10, 45, 99]
    assert [trial.number for trial in pareto_front("free", uri=searches)] == [0, 1, 3]
    assert [trial.number for trial in pareto_front("limited", uri=searches)] == [1, 3]


def test_one_metric_of_several_ranks_alone_with_its_own_direction(searches: str) -> None:
    ranking = rank("free", metric="latency_ms", uri=searches)
    assert [(each.metric, each.direction) for each in ranking.objectives] == [("latency_ms", MINIMIZE)]
    assert [row.rank for row in ranking.rows] == [1, 2, 3, 4, 5, None]
    assert [row.trials[0] for row in ranking.rows] == [3, 1, 2, 0, 4, 5]
    assert best_trial("free", metric="accuracy", uri=searches).number == 0
    with pytest.raises(
        TrackingError, match=r"several objectives; choose one with metric=… \(accuracy, latency_ms\)"
    ):
        best_trial("free", uri=searches)
    with pytest.raises(TrackingError, match="direction: sweep 'free' has several objectives"):
        rank("free", direction="minimize", uri=searches)


def test_an_infeasible_point_is_never_the_best(searches: str) -> None:
    ranking = rank("limited", uri=searches)
    assert [(row.trials[0], row.rank, row.infeasible) for row in ranking.rows][:5] == [
        (1, 1, ()), (3, 1, ()), (2, 2, ()), (0, 3, ("latency_ms 61 > 50",)), (4, 4, ("latency_ms 99 > 50",)),
    ]  # fmt: skip
    assert best_trial("limited", metric="accuracy", uri=searches).number == 1
    said = leaderboard("limited", uri=searches)["infeasible"]
    assert said.isna().to_list() == [True, True, True, False, False, True]
    assert said[3] == "latency_ms 61 > 50"
    with pytest.raises(
        TrackingError, match=r"violates a constraint \(the first in rank, trial 0: latency_ms 61 > 1\)"
    ):
        best_trial("hopeless", metric="accuracy", uri=searches)
    with pytest.raises(TrackingError, match=r"every point of sweep 'hopeless' .* violates a constraint"):
        pareto_front("hopeless", uri=searches)


def test_the_front_of_one_objective_is_the_best_trial(store: str) -> None:
    assert [trial.number for trial in pareto_front("grid", uri=store)] == [3]


def test_the_command_shows_all_objectives_in_every_format(
    searches: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["limited", "--uri", searches, "--top", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "limited: Pareto front of accuracy (maximize) and latency_ms (minimize): 2 points"
    assert lines[1].split() == ["#", "lr", "accuracy", "latency_ms", "n", "trials"]
    assert lines[2].split() == ["1", "1", "0.8000", "40.0000", "1", "1"]
    assert lines[5].split(maxsplit=6)[-1] == "infeasible: latency_ms 61 > 50"
    assert command.main(["limited", "--uri", searches, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["objectives"][1] == {"metric": "latency_ms", "direction": "minimize"}
    assert found["constraints"] == [{"metric": "latency_ms", "operator": "<=", "bound": 50.0}]
    assert found["points"][3]["means"] == {"accuracy": 0.9, "latency_ms": 61.0}
    assert found["points"][3]["infeasible"] == ["latency_ms 61 > 50"]
    assert (found["points"][5]["mean"], found["points"][5]["last_values"]) == (None, [0.31])
    assert command.main(["limited", "--uri", searches, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["mean.latency_ms"] for row in rows] == ["40.0", "10.0", "45.0", "61.0", "99.0", ""]
    assert (rows[0]["mean"], rows[0]["mean.accuracy"], rows[3]["infeasible"]) == (
        "0.8",
        "0.8",
        "latency_ms 61 > 50",
    )
    assert command.main(["free", "--uri", searches, "--metric", "latency_ms"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("free: latency_ms, minimize\n")
    assert "1 PRUNED" in text


def test_a_pruned_point_shows_its_last_value(searches: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["free", "--uri", searches, "--metric", "accuracy"]) == 0
    last = capsys.readouterr().out.splitlines()[-2]
    assert last.split(maxsplit=5) == ["-", "5", "-", "0", "5", "1 PRUNED (0.3100)"]


def test_the_summary_of_a_sweep_with_several_objectives_shows_its_front(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path_factory.mktemp("summary")
    ledger = make_ledger(folder, "sqlite:////x", objectives=OBJECTIVES)
    for number, latency in enumerate((10, 20, 5)):
        add_trial(ledger, number, {"lr": number})
        run_trial(ledger, number, {"accuracy": 0.5 + number / 10 * (number < 2), "latency_ms": latency})
    summary.show(ledger, folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "Pareto front of accuracy (maximize) and latency_ms (minimize): 2 points:"
    assert [line.split()[:2] for line in lines[3:6]] == [["1", "1"], ["1", "2"], ["2", "0"]]


def test_infinities_are_infinities_again(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> None:
    folder = tmp_path_factory.mktemp("infinite")
    uri = f"sqlite:///{shutil.copy(empty_store, folder)}"
    ledger = make_ledger(folder / "sweep", uri, direction=MINIMIZE)
    for number in range(2):
        add_trial(ledger, number)
        attempt = start(ledger, number)
        ledger.add_reports(
            attempt, [NewReport(seq=0, step=0, time=START, metrics={"only_reported": -math.inf})]
        )
        end(ledger, number, attempt, {"accuracy": -math.inf if number else 3.0})
    drain(folder / "sweep")
    found = trials("grid", uri=uri)
    assert found[0].metrics == {"accuracy": 3.0, "only_reported": -math.inf}
    assert best_trial("grid", uri=uri).number == 0
    assert rank("grid", uri=uri).rows[1].mean == -math.inf


def test_trials_with_equal_params_but_other_configs_are_not_averaged() -> None:
    """Such as before and after an override of a key that the sweep does not vary."""
    entries = [
        Entry(number=0, params={"lr": 0.1}, state=TrialState.COMPLETE, value=0.2, point="short"),
        Entry(number=1, params={"lr": 0.1}, state=TrialState.COMPLETE, value=0.4, point="short"),
        Entry(number=2, params={"lr": 0.1}, state=TrialState.COMPLETE, value=0.9, point="long"),
    ]
    rows = rank_points(entries, Direction.MAXIMIZE)
    assert [(row.trials, row.n) for row in rows] == [((2,), 1), ((0, 1), 2)]
