"""Ranking several sweeps together, choosing and grouping trials, and how sure the first place is."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from tracking_helpers import START, add_trial, drain, end, make_ledger, run_trial, start

from repro_sweep.cli import rank as command
from repro_sweep.errors import TrackingError
from repro_sweep.filters import parse
from repro_sweep.ranking import best_trial, leaderboard, pareto_front, rank
from repro_sweep.significance import incomplete_beta, t_tail, welch
from repro_sweep.states import Direction, FailureKind, TrialState
from repro_sweep.sweep import Origin

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"  # MLflow's own use of SQLAlchemy
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> str:
    """Sweeps of two users over optimizers and seeds, and some that do not go with them."""
    folder = tmp_path_factory.mktemp("choices")
    uri = f"sqlite:///{shutil.copy(empty_store, folder)}"
    grid = [
        ({"optimizer": "SGD", "lr": 0.1, "nesterov": True}, (0.80, 0.90)),
        ({"optimizer": "SGD", "lr": 0.01, "nesterov": False}, (0.30, 0.32)),
        ({"optimizer": "Adam", "lr": 0.01, "betas": [0.9, 0.99]}, (0.86, 0.88)),
        ({"optimizer": "Adam", "lr": 0.001, "betas": [0.9, 0.999]}, (0.70, 0.99)),
    ]
    wide = [({"optimizer": "LBFGS", "lr": 1, "history": 10}, (0.87, 0.89))]
    bob = Origin(user="bob", host="login", command="repro-sweep")
    _fill(folder / "a", uri, grid, name="a")
    _fill(folder / "b", uri, wide, name="b")
    _fill(folder / "bobs", uri, [({"optimizer": "Rprop", "lr": 2}, (0.1, 0.2))], name="b", origin=bob,
          created_at=START - 10)  # fmt: skip
    _fill(folder / "slash", uri, [({"optimizer": "AdaGrad"}, (0.4, 0.5))], name="bob/b")
    _fill(folder / "loss", uri, wide, name="by loss", metric="loss", direction=Direction.MINIMIZE)
    _fill(folder / "down", uri, wide, name="down", direction=Direction.MINIMIZE)
    _fill(folder / "same", uri, [({"accuracy": 1, "x": 3}, (0.5, 0.6))], name="clash")
    return uri


def _fill(
    folder: Path, uri: str, points: Sequence[tuple[dict[str, object], tuple[float, ...]]], **changes: object
) -> None:
    ledger = make_ledger(folder, uri, **changes)
    number = 0
    for params, values in points:
        for seed, value in enumerate(values):
            add_trial(ledger, number, params, repeat={"seed": seed})
            run_trial(ledger, number, {"accuracy": value, "loss": 1 - value}, steps=0)
            number += 1
    add_trial(ledger, number, points[0][0], repeat={"seed": 9})
    end(
        ledger,
        number,
        start(ledger, number),
        state=TrialState.FAIL,
        kind=FailureKind.CRASH,
        message="signal 9",
    )
    ledger.close()
    drain(folder)


# --- several sweeps --------------------------------------------------------------------------------------------


def test_several_sweeps_are_ranked_together_with_a_column_that_says_which(store: str) -> None:
    frame = leaderboard(["a", "b"], uri=store)
    assert list(frame.columns[:4]) == ["rank", "sweep", "optimizer", "lr"]
    assert list(zip(frame["sweep"], frame["optimizer"], frame["lr"], strict=True)) == [
        ("b", "LBFGS", 1), ("a", "Adam", 0.01), ("a", "SGD", 0.1), ("a", "Adam", 0.001), ("a", "SGD", 0.01),
    ]  # fmt: skip
    best = best_trial(["a", "b"], uri=store)
    assert (best.sweep, best.number, best.params["optimizer"]) == ("b", 1, "LBFGS")
    best = best_trial(["b", "a"], metric="loss", direction="maximize", uri=store)
    assert (best.sweep, best.number) == ("a", 2)
    assert [trial.sweep for trial in pareto_front(["a", "b"], uri=store)] == ["b"]
    assert "sweep" not in leaderboard("a", uri=store).columns
    in_common = rank(["b", "down"], direction="maximize", uri=store)
    assert [(row.sweep, row.n) for row in in_common.rows] == [("b", 2), ("down", 2)]


def test_a_users_sweep_is_found_though_another_one_has_its_name(store: str) -> None:
    assert best_trial("b", uri=store).params["optimizer"] == "LBFGS"  # the newest one
    assert best_trial("ada/b", uri=store).params["optimizer"] == "LBFGS"
    assert (
        best_trial("bob/b", uri=store).params["optimizer"] == "AdaGrad"
    )  # the sweep that is really called so
    with pytest.raises(TrackingError, match=r"no sweep named 'bob/a' at .*: did you mean .*bob/b"):
        best_trial("bob/a", uri=store)
    with pytest.raises(TrackingError, match=r"no sweep named 'eve/b'"):
        best_trial("eve/b", uri=store)
    ranking = rank(["ada/b", "a"], uri=store)
    assert ranking.sweeps == ("ada/b", "a")
    assert ranking.rows[0].sweep == "ada/b"


def test_a_users_name_alone_finds_his_newest_sweep(tmp_path: Path, empty_store: Path) -> None:
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path)}"
    for place, user in enumerate(("eve", "bob", "bob", "ada")):
        origin = Origin(user=user, host="login", command="repro-sweep")
        point = ({"optimizer": f"{user}{place}"}, (0.5,))
        _fill(tmp_path / str(place), uri, [point], name="b", origin=origin, created_at=START + place)
    found = [best_trial(name, uri=uri).params["optimizer"] for name in ("b", "bob/b", "eve/b")]
    assert found == ["ada3", "bob2", "eve0"]


def test_sweeps_that_cannot_be_compared_are_one_line(store: str) -> None:
    with pytest.raises(
        TrackingError,
        match=r"rank by different metrics \(a: accuracy; by loss: loss\); choose one that all have with metric=…",
    ):
        rank(["a", "by loss"], uri=store)
    assert rank(["a", "by loss"], metric="accuracy", uri=store).rows[0].mean == pytest.approx(0.88)
    with pytest.raises(
        TrackingError, match=r"different directions \(a: maximize accuracy; down: minimize accuracy\)"
    ):
        rank(["a", "down"], uri=store)
    assert rank(["a", "down"], direction="minimize", uri=store).rows[0].mean == pytest.approx(0.31)
    with pytest.raises(TrackingError, match=r"no trial of sweep 'a' has a metric 'los'; did you mean loss\?"):
        rank(["a", "b"], metric="los", uri=store)
    with pytest.raises(TrackingError, match="'b' and 'ada/b' are one sweep: name each once"):
        rank(["b", "ada/b"], uri=store)
    with pytest.raises(TrackingError, match="no sweep is named"):
        rank([], uri=store)


# --- conditions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "points"),
    [
        ("optimizer=Adam", "Adam 0.01, Adam 0.001"),
        ("optimizer!=Adam", "SGD 0.1, SGD 0.01"),
        ("optimizer = 'Adam' , lr<0.01", "Adam 0.001"),
        (["optimizer=Adam", "lr<=1e-2"], "Adam 0.01, Adam 0.001"),
        ("lr>=0.01", "Adam 0.01, SGD 0.1, SGD 0.01"),
        ("lr=1e-1", "SGD 0.1"),
        ("nesterov=true", "SGD 0.1"),
        ("nesterov!=true", "Adam 0.01, Adam 0.001, SGD 0.01"),
        ("betas=[0.9, 0.99], optimizer=Adam", "Adam 0.01"),
        ("params.lr=0.001", "Adam 0.001"),
        ("accuracy>0.849", "Adam 0.01, SGD 0.1"),  # by the mean: 0.80 and 0.90 stay together
        ("metrics.loss>0.5", "SGD 0.01"),
        ("seed=1", "Adam 0.001, SGD 0.1, Adam 0.01, SGD 0.01"),
        ("seed=1, accuracy>0.89", "Adam 0.001, SGD 0.1"),
        ("optimizer>1", ""),
        ("sweep=a", "Adam 0.01, SGD 0.1, Adam 0.001, SGD 0.01"),
    ],
)
def test_conditions_choose_trials_by_params_and_points_by_metrics(
    store: str, where: str | list[str], points: str
) -> None:
    ranking = rank("a", where=where, uri=store)
    assert ", ".join(f"{row.params['optimizer']} {row.params['lr']}" for row in ranking.rows) == points
    if where == "seed=1":
        assert [row.n for row in ranking.rows] == [1] * 4
    elif where == "accuracy>0.849":
        assert [row.n for row in ranking.rows] == [2, 2]
        assert best_trial("a", where=where, direction="minimize", uri=store).number == 0


def test_conditions_that_cannot_be_understood_are_one_line(store: str) -> None:
    for where, said in {
        "optimiser=Adam": r"no trial has a param or metric 'optimiser'; did you mean optimizer\?",
        "zzz=1": r"no trial has a param or metric 'zzz'; there are: accuracy, betas, loss",
        "optimizer": r"where: 'optimizer' is no condition: write NAME=VALUE",
        "=3": r"where: '=3' is no condition",
        "lr<small": r"where: 'lr<small': 'small' is no number",
        "": r"where: '' is no condition",
    }.items():
        with pytest.raises(TrackingError, match=said):
            rank("a", where=where, uri=store)
    with pytest.raises(
        TrackingError, match=r"is a param and a metric: write params\.accuracy or metrics\.accuracy"
    ):
        rank("clash", where="accuracy=1", uri=store)
    assert len(rank("clash", where="params.accuracy=1", uri=store).rows) == 1
    assert rank("clash", where="metrics.accuracy=1", uri=store).rows == ()
    with pytest.raises(
        TrackingError, match=r"has no complete trial with a finite 'accuracy' \(no trials yet\)"
    ):
        best_trial("a", where="lr>5", uri=store)


def test_quotes_make_text_of_a_number_and_keep_commas() -> None:
    [first, second, third] = parse("""a="1,5", b='x=y' ,c!=[1, 2]""")
    assert (first.name, first.value, second.value, third.sign) == ("a", "1,5", "x=y", "!=")
    [quoted], [plain] = parse("a='1'"), parse("a=1")
    assert (quoted.holds("1"), quoted.holds(1), plain.holds("1"), plain.holds(1)) == (True, False, True, True)
    [nothing] = parse("a=null")
    assert (nothing.holds(None), nothing.holds(0), nothing.holds("null")) == (True, False, True)
    [nan], [flag] = parse("a=nan"), parse("a=1")
    assert (nan.holds(math.nan), flag.holds(True)) == (True, False)


# --- groups ----------------------------------------------------------------------------------------------------


def test_groups_are_ranked_by_the_mean_over_all_their_trials_and_say_what_their_best_point_has(
    store: str,
) -> None:
    frame = leaderboard("a", by="optimizer", uri=store)
    head = ["rank", "optimizer", "accuracy", "accuracy_std", "n", "points", "accuracy_best", "trials"]
    assert list(frame.columns[:8]) == head
    assert frame["optimizer"].to_list() == ["Adam", "SGD"]
    assert frame["accuracy"].to_list() == pytest.approx([0.8575, 0.58])
    assert frame["accuracy_best"].to_list() == pytest.approx([0.87, 0.85])
    assert (frame["n"].to_list(), frame["points"].to_list()) == ([4, 4], [2, 2])
    assert frame["fail"].to_list() == [0, 1]
    several = rank(["a", "b"], by=["sweep", "nesterov"], uri=store)
    assert several.params == ("sweep", "nesterov")
    assert [(row.params, row.n) for row in several.rows] == [
        ({"sweep": "b"}, 2), ({"sweep": "a"}, 4), ({"sweep": "a", "nesterov": True}, 2),
        ({"sweep": "a", "nesterov": False}, 2),
    ]  # fmt: skip
    seeds = rank("a", by="seed", where="optimizer=Adam", uri=store)
    assert [(row.params["seed"], row.best_mean) for row in seeds.rows] == [(1, 0.99), (0, 0.86)]
    assert seeds.test is None
    with pytest.raises(TrackingError, match=r"no trial has a param 'optimiser'; did you mean optimizer\?"):
        rank("a", by="optimiser", uri=store)


# --- how sure the first place is -------------------------------------------------------------------------------


def test_the_tail_of_students_t_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    special = pytest.importorskip("scipy.special")
    chance = random.Random(0)
    for _ in range(2000):
        t, df = 10 ** chance.uniform(-6, 4), 10 ** chance.uniform(0, 4)
        expected = 2 * float(stats.t.sf(t, df))
        assert t_tail(t, df) == pytest.approx(expected, rel=1e-9, abs=1e-300), (t, df)
        a, b, x = 10 ** chance.uniform(-1, 3), 10 ** chance.uniform(-1, 3), chance.random()
        assert incomplete_beta(a, b, x, 1 - x) == pytest.approx(
            float(special.betainc(a, b, x)), rel=1e-8, abs=1e-14
        )
    assert t_tail(0.0, 3.0) == 1.0


def test_welchs_test_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    chance = random.Random(1)
    for _ in range(200):
        one, other = (
            [chance.gauss(chance.random(), 10 ** chance.uniform(-6, 2)) for _ in range(chance.randint(2, 9))]
            for _ in range(2)
        )
        ours, theirs = welch(one, other), stats.ttest_ind(one, other, equal_var=False)
        assert ours.p == pytest.approx(float(theirs.pvalue), rel=1e-8)
        assert (ours.t, ours.df) == pytest.approx((float(theirs.statistic), float(theirs.df)), rel=1e-8)


def test_what_cannot_be_tested_is_said_in_words() -> None:
    assert welch([0.9], [0.8, 0.7]).text == (
        "first against second: not tested, as it takes two values of each, n = 1 and 2"
    )
    assert "neither varies over its repeats, though the two differ" in welch([1.0, 1.0], [0.5] * 3).text
    assert "neither varies over its repeats, and both are equal" in welch([0.1] * 3, [0.1] * 2).text
    assert welch([0.3, 0.1 + 0.2, 0.3], [0.9, 0.9]).p is None  # no more than the last digit
    one_sided = welch([1.0, 1.0, 1.0], [0.5, 0.6, 0.7])
    assert (one_sided.df, one_sided.p) == (pytest.approx(2), pytest.approx(0.0202, abs=1e-4))


def test_the_first_point_is_tested_against_the_second_one(
    store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    test = rank("a", top=1, uri=store).test
    assert test is not None
    assert (test.n, test.p) == ((2, 2), welch([0.86, 0.88], [0.80, 0.90]).p)
    assert command.main(["a", "--uri", store]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"first against second: Welch's t-test, p = {test.p:.2g}, n = 2 and 2"
    )
    assert rank("b", uri=store).test is None  # one point


def test_the_command_takes_sweeps_conditions_and_groups(
    store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["a", "b", "--uri", store, "--where", "lr>=0.01", "--where", "optimizer!=SGD"]
    assert command.main([*arguments, "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a, b: accuracy, maximize"
    assert lines[1].split()[:3] == ["#", "sweep", "optimizer"]
    assert [line.split()[:3] for line in lines[2:4]] == [["1", "b", "LBFGS"], ["2", "a", "Adam"]]
    assert command.main([*arguments, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["sweeps"], found["points"][1]["sweep"]) == (["a", "b"], "a")
    assert found["first_against_second"]["test"] == "Welch's t-test"
    assert found["first_against_second"]["n"] == [2, 2]
    assert command.main(["a", "b", "--uri", store, "--by", "optimizer", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["params.optimizer"], row["points"]) for row in rows] == [
        ("LBFGS", "1"), ("Adam", "2"), ("SGD", "2"),
    ]  # fmt: skip
    assert command.main(["a", "--uri", store, "--by", "optimizer"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:7] == ["#", "optimizer", "accuracy", "n", "points", "best", "point"]
    assert lines[2].split()[:8] == ["1", "Adam", "0.8575", "±", "0.1195", "4", "2", "0.8700"]
