"""The report: a page of its own about a sweep, from its ledger alone, with Optuna's figures or why there is none."""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import pytest
from tracking_helpers import START, end, make_ledger, start

from repro_sweep.cli import main as cli
from repro_sweep.ledger import Ledger
from repro_sweep.records import NewReport, NewTrial
from repro_sweep.reporting import FILE_NAME, study_of, write_report
from repro_sweep.states import Direction, FailureKind, TrialState
from repro_sweep.sweep import Budget, Chosen, Constraint, Objective, SearchSpec, SpaceSpec
from repro_sweep.tracking.upload import REPORT

FIGURES = [
    "Optimization history",
    "Parameter importances",
    "Parallel coordinates",
    "Slices",
    "Intermediate values of accuracy",
]
TWO = (
    Objective(metric="accuracy", direction=Direction.MAXIMIZE),
    Objective(metric="latency", direction=Direction.MINIMIZE),
)


class Page(HTMLParser):
    """What a browser would see of a page: headings, figures, texts, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.figures: list[str] = []
        self.cells: list[str] = []
        self.loads: list[str] = []
        self.scripts = 0
        self.text = ""
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self._open.append(tag)
        self.scripts += tag == "script"
        for key, value in attrs:
            if key in {"src", "href", "srcset", "data", "action"}:
                self.loads.append(str(value))
            if key == "class" and value == "plotly-graph-div":
                self.figures.append(self.headings[-1])
        if tag in {"h1", "h2"}:
            self.headings.append("")
        if tag in {"td", "th"}:
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside in {"h1", "h2"}:
            self.headings[-1] += data
        if inside in {"td", "th"}:
            self.cells[-1] += data
        if inside not in {"script", "style"}:
            self.text += data


def put(
    ledger: Ledger,
    number: int,
    params: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
    *,
    seed: int = 0,
    state: TrialState | None = TrialState.COMPLETE,
    curve: Mapping[int, float] | None = None,
) -> None:
    """A trial of a point; None as its state leaves it running."""
    overrides = (*(f"{key}={value}" for key, value in params.items()), f"seed={seed}")
    trial = NewTrial(
        number=number, identity=f"{number:064x}", directory=f"trials/{number}", overrides=overrides, params=params,
        repeat={"seed": seed}, config="a: 1\n", point=str(sorted(params.items())),
    )  # fmt: skip
    ledger.add_trials([trial])
    if state is not TrialState.WAITING:
        attempt = start(ledger, number)
        reports = [
            NewReport(seq=seq, step=step, time=START, metrics={"accuracy": value})
            for seq, (step, value) in enumerate((curve or {}).items())
        ]
        ledger.add_reports(attempt, reports)
        if state is not None:
            kind = FailureKind.CRASH if state is TrialState.FAIL else None
            end(ledger, number, attempt, metrics, state=state, kind=kind)
    ledger.commit()


def searched(*constraints: Constraint) -> SearchSpec:
    """A search with constraints."""
    return SearchSpec(
        sampler=Chosen(name="nsgaii"),
        seed=3,
        space=SpaceSpec(),
        budget=Budget(trials=9),
        constraints=constraints,
    )


def fill(ledger: Ledger, points: int) -> None:
    """Points of two seeds each, with a conditional parameter, reports, and some that were pruned or failed."""
    for index in range(points):
        params: dict[str, Any] = {"optimizer": "Adam" if index % 2 else "SGD", "lr": 10 ** -(1 + index % 5)}
        params |= {"beta1": round(0.9 + index / 1000, 3)} if index % 2 else {"momentum": index / points}
        value = 0.5 + index / 100 - params["lr"]
        state = {3: TrialState.PRUNED, 7: TrialState.FAIL}.get(index % 10, TrialState.COMPLETE)
        for seed in range(2):
            metrics = {"accuracy": value + seed / 1000, "latency": 10.0 + index % 7}
            curve = {step: value * step / 5 for step in range(2 if state is TrialState.PRUNED else 5)}
            put(ledger, 2 * index + seed, params, metrics, seed=seed, state=state, curve=curve)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """The ledger of a sweep."""
    return make_ledger(tmp_path / "multirun" / "grid", "sqlite:////nowhere/mlflow.db")


def page_of(ledger: Ledger) -> Page:
    """The page of a sweep, written and read."""
    path = write_report(ledger, ledger.path.parent)
    assert path == ledger.path.parent / FILE_NAME
    return Page(path.read_text(encoding="utf-8"))


# --- the page --------------------------------------------------------------------------------------------------


def test_a_report_has_all_figures_in_one_file_that_loads_nothing(ledger: Ledger) -> None:
    fill(ledger, 40)
    page = page_of(ledger)
    text = (ledger.path.parent / FILE_NAME).read_text(encoding="utf-8")
    assert page.figures == FIGURES
    assert page.loads == []
    assert text.count("plotly.js v") == 1  # the library's own banner
    assert "default-src 'none'" in text
    assert not re.search(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", text)
    assert (ledger.path.parent / FILE_NAME).stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in ledger.path.parent.glob(".report*")) == []


def test_a_report_says_what_is_sought_how_far_it_is_and_what_is_best(ledger: Ledger) -> None:
    fill(ledger, 40)
    put(ledger, 80, {"optimizer": "SGD", "lr": 1e-9}, state=None)
    put(ledger, 81, {"optimizer": "SGD", "lr": 1e-8}, state=TrialState.WAITING)
    page = page_of(ledger)
    assert page.headings[:3] == ["grid", "Best point", "Leaderboard"]
    assert "Maximize accuracy. Sampler: grid." in page.text
    assert "82 trials of 42 points: 1 waiting, 1 running, 64 complete, 8 pruned, 8 fail." in page.text
    assert "accuracy 0.8905 ± 0.0007, trials 78, 79; trial 79 is the best of them" in page.text
    assert "optimizer=Adam\nlr=1e-05\nbeta1=0.939\nseed=1" in page.text
    rows = [page.cells[start : start + 9] for start in range(0, len(page.cells), 9)]
    assert rows[0] == ["#", "accuracy", "n", "states", "trials", "optimizer", "lr", "momentum", "beta1"]
    assert rows[1] == ["1", "0.8905 ± 0.0007", "2", "2 COMPLETE", "78, 79", "Adam", "1e-05", "", "0.939"]
    assert ["-", "-", "0", "2 PRUNED (0.5299, 0.5309)", "6, 7", "Adam", "0.0001", "", "0.903"] in rows
    assert len(rows) == 1 + 42


def test_of_very_many_points_the_best_are_listed_and_the_others_counted(ledger: Ledger) -> None:
    for number in range(57):
        put(ledger, number, {"a": number}, {"accuracy": number})
    page = page_of(ledger)
    assert page.cells[6:12] == ["1", "56.0000", "1", "1 COMPLETE", "56", "56"]
    assert len(page.cells) == 6 * 51
    assert "7 more: repro-sweep rank grid" in page.text


def test_the_same_ledger_gives_the_same_report_and_a_new_one_takes_its_place(ledger: Ledger) -> None:
    fill(ledger, 12)
    path = write_report(ledger, ledger.path.parent)
    before = path.read_bytes()
    inode = path.stat().st_ino
    assert write_report(ledger, ledger.path.parent).read_bytes() == before
    assert path.stat().st_ino != inode  # renamed, never half written
    put(ledger, 90, {"optimizer": "SGD", "lr": 0.5}, {"accuracy": 5.0})
    assert write_report(ledger, ledger.path.parent).read_bytes() != before


def test_a_reader_of_the_ledger_is_all_that_a_report_needs(ledger: Ledger) -> None:
    fill(ledger, 5)
    before = ledger.path.read_bytes()
    with contextlib.closing(Ledger.open(ledger.path.parent, readonly=True)) as reader:
        assert page_of(reader).headings[0] == "grid"
    assert ledger.path.read_bytes() == before


def test_names_and_values_that_look_like_html_are_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><b>&amp;"
    metric = "<img src=http://evil/>"
    ledger = make_ledger(tmp_path / "s", "sqlite:////x", name=evil, metric=metric, sampler=evil)
    for number in range(12):
        params = {f"lr{evil}": number, "kind": f"{evil}{number % 2}", "odd": ["</script>", number]}
        put(ledger, number, params, {metric: number * 1.0})
    page = page_of(ledger)
    assert page.headings[0] == evil
    assert page.loads == []
    assert page.figures == FIGURES[:4]
    assert f"lr{evil}" in page.cells
    text = (tmp_path / "s" / FILE_NAME).read_text()
    library = 2  # plotly's settings and plotly itself
    assert page.scripts == library + len(page.figures)
    assert "alert(1)</script>" not in text
    assert "<img src" not in text
    assert "\\u003cscript" not in text  # plotly's labels are HTML of a kind: there it is text as well
    assert "\\u003cimg" not in text


@pytest.mark.parametrize(
    ("points", "figures", "said"),
    [
        ([], [], ["No point is complete yet."]),
        ([({"a": 1}, TrialState.WAITING, 0.0)], [], ["No point is complete yet.", "1 trials"]),
        ([({"a": 1}, TrialState.COMPLETE, 0.5)], ["Optimization history"], ["two complete points; there is one"]),
        (
            [({"a": index}, TrialState.COMPLETE, index / 2) for index in range(12)],
            ["Optimization history", "Parallel coordinates", "Slices"],
            ["Only one parameter varies: a.", "No trial has reported accuracy yet."],
        ),
        (
            [({"a": index, "b": -index}, TrialState.COMPLETE, 0.5) for index in range(12)],
            ["Optimization history", "Parallel coordinates", "Slices"],
            ["All complete points have the same value."],
        ),
        (
            [({"a": index, "b": -index}, TrialState.COMPLETE, index) for index in range(2)],
            FIGURES[:4],
            ["From 2 points, it is no more than a hint."],
        ),
        ([({"a": 1}, TrialState.FAIL, 0.0)] * 1, [], ["No point is complete yet.", "1 fail"]),
        (
            [({"a": index}, TrialState.COMPLETE, math.nan) for index in range(3)],
            [],
            ["No point is complete yet."],
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_yet_is_a_sentence(
    ledger: Ledger, points: list[Any], figures: list[str], said: list[str]
) -> None:
    for number, (params, state, value) in enumerate(points):
        put(ledger, number, params, {"accuracy": value}, state=state)
    page = page_of(ledger)
    assert page.figures == figures
    assert [name for name in FIGURES if name in page.headings] == FIGURES
    for sentence in said:
        assert sentence in page.text


def test_one_report_for_each_trial_is_nothing_to_follow(ledger: Ledger) -> None:
    for number in range(3):
        put(ledger, number, {"a": number}, {"accuracy": number}, curve={4: 0.5})
    page = page_of(ledger)
    assert "No trial has reported accuracy at more than one step." in page.text
    assert FIGURES[-1] not in page.figures


def test_of_several_objectives_there_is_a_front_and_a_history_of_each(tmp_path: Path) -> None:
    search = searched(Constraint(metric="latency", operator="<=", bound=15))
    ledger = make_ledger(tmp_path / "s", "sqlite:////x", objectives=TWO, search=search, sampler="nsgaii")
    fill(ledger, 40)
    page = page_of(ledger)
    assert page.figures == [
        "Pareto front",
        "Parallel coordinates",
        "Optimization history of accuracy",
        "Parameter importances for accuracy",
        "Slices of accuracy",
        "Optimization history of latency",
        "Parameter importances for latency",
        "Slices of latency",
        "Intermediate values of accuracy",
    ]
    assert "Maximize accuracy, minimize latency. Sampler: nsgaii. Constraints: latency <= 15." in page.text
    assert re.search(
        r"Pareto front of accuracy \(maximize\) and latency \(minimize\): \d+ points\.", page.text
    )
    assert "Grey points violate a constraint." in page.text


def test_of_four_objectives_no_front_is_drawn(tmp_path: Path) -> None:
    four = (
        *TWO,
        Objective(metric="c", direction=Direction.MINIMIZE),
        Objective(metric="d", direction=Direction.MINIMIZE),
    )
    ledger = make_ledger(tmp_path / "s", "sqlite:////x", objectives=four)
    for number in range(4):
        put(
            ledger,
            number,
            {"a": number},
            {"accuracy": number, "latency": number, "c": 1.0 - number, "d": 0.0},
        )
    page = page_of(ledger)
    assert "It is drawn of two or three objectives; there are 4." in page.text
    assert "Optimization history of d" in page.figures


def test_when_all_points_are_infeasible_none_is_called_the_best(tmp_path: Path) -> None:
    ledger = make_ledger(
        tmp_path / "s", "sqlite:////x", search=searched(Constraint(metric="latency", operator="<=", bound=5))
    )
    for number in range(3):
        put(ledger, number, {"a": number}, {"accuracy": number, "latency": 6.0 + number})
    page = page_of(ledger)
    assert "Every complete point violates a constraint." in page.text
    assert "infeasible: latency 8 > 5" in page.text


# --- the study -------------------------------------------------------------------------------------------------


def test_a_study_has_a_trial_for_each_point_with_the_mean_of_its_repeats(ledger: Ledger) -> None:
    put(ledger, 0, {"lr": 0.1, "n": 4}, {"accuracy": 0.5}, curve={0: 0.1, 1: 0.5})
    put(ledger, 1, {"lr": 0.001, "n": 8}, {"accuracy": 0.2}, state=TrialState.PRUNED, curve={0: 0.3, 3: 0.2})
    put(ledger, 2, {"lr": 0.1, "n": 4}, {"accuracy": 0.7}, seed=1, curve={0: 0.3, 2: 0.9})
    put(ledger, 3, {"lr": 0.01, "n": 8}, state=TrialState.FAIL)
    put(ledger, 4, {"lr": 0.02, "n": 8}, state=None, curve={0: 0.4})
    put(ledger, 5, {"lr": 0.03, "n": 8}, state=TrialState.WAITING)
    study = study_of(ledger)
    found = study.get_trials()
    assert [trial.state.name for trial in found] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING"]
    assert found[0].value == pytest.approx(0.6)
    assert found[0].intermediate_values == pytest.approx({0: 0.2, 1: 0.5, 2: 0.9})
    assert (found[1].value, found[1].intermediate_values) == (0.2, {0: 0.3, 3: 0.2})
    assert found[3].intermediate_values == {0: 0.4}
    assert study.direction.name == "MAXIMIZE"
    assert study.best_trial.number == 0


def test_domains_are_inferred_from_the_values(ledger: Ledger) -> None:
    values: dict[str, list[Any]] = {
        "few decades": [0.1, 10.0, 1],
        "many decades": [1e-4, 0.5, 1],
        "whole": [1, 3, 2],
        "whole log": [1, 1000, 10],
        "from zero": [0, 1000.5, 1],
        "words": ["b", "a", "b"],
        "mixed": [1, "auto", None],
        "flags": [True, False, True],
        "lists": [[1, 2], {"a": 1}, [1, 2]],
    }
    for number in range(3):
        params = {name: each[number] for name, each in values.items()}
        put(ledger, number, params | ({"only": 2} if number else {}), {"accuracy": 0.5})
    found = study_of(ledger).get_trials()
    log_float, log_int = (
        optuna.distributions.FloatDistribution(1e-4, 1.0, log=True),
        optuna.distributions.IntDistribution(1, 1000, log=True),
    )
    assert found[0].distributions == {
        "few decades": optuna.distributions.FloatDistribution(0.1, 10.0),
        "many decades": log_float,
        "whole": optuna.distributions.IntDistribution(1, 3),
        "whole log": log_int,
        "from zero": optuna.distributions.FloatDistribution(0.0, 1000.5),
        "words": optuna.distributions.CategoricalDistribution(("b", "a")),
        "mixed": optuna.distributions.CategoricalDistribution(("1", "auto", "None")),
        "flags": optuna.distributions.CategoricalDistribution(("True", "False")),
        "lists": optuna.distributions.CategoricalDistribution(("[1, 2]", '{"a": 1}')),
    }
    assert "only" not in found[0].params
    assert found[1].params["only"] == 2


def test_a_study_knows_all_objectives_and_the_constraints(tmp_path: Path) -> None:
    search = searched(
        Constraint(metric="latency", operator="<=", bound=15),
        Constraint(metric="gone", operator=">=", bound=1),
    )
    ledger = make_ledger(tmp_path / "s", "sqlite:////x", objectives=TWO, search=search)
    put(ledger, 0, {"a": 1}, {"accuracy": 0.5, "latency": 20.0, "gone": 3.0})
    put(ledger, 1, {"a": 2}, {"accuracy": 0.4, "latency": 10.0, "gone": 1.0})
    put(ledger, 2, {"a": 3}, {"accuracy": 0.4, "latency": 10.0})
    study = study_of(ledger)
    assert [each.name for each in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    found = study.get_trials()
    assert found[0].values == [0.5, 20.0]
    assert list(found[0].constraints.values()) == [5.0, -2.0]
    assert list(found[2].constraints.values()) == [-5.0, math.inf]
    assert [trial.number for trial in study.best_trials] == [1]


def test_a_step_that_an_attempt_reports_again_has_its_last_value(ledger: Ledger) -> None:
    put(ledger, 0, {"a": 1}, state=None, curve={0: 0.1, 1: 0.2})
    ledger.add_reports("0-0", [NewReport(seq=2, step=1, time=START, metrics={"accuracy": 0.9}),
                               NewReport(seq=3, step=2, time=START, metrics={"accuracy": math.nan})])  # fmt: skip
    ledger.commit()
    assert study_of(ledger).get_trials()[0].intermediate_values == {0: 0.1, 1: 0.9}


def test_figures_of_very_many_points_show_some_and_say_so(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repro_sweep.reporting import figures

    for limit in ("_MOST_IMPORTANCE", "_MOST_SLICES", "_MOST_LINES", "_MOST_CURVES"):
        monkeypatch.setattr(figures, limit, 20)
    fill(ledger, 50)
    text = page_of(ledger).text
    found = re.findall(r"(\d+) of (\d+) points: the best, and others evenly spread", text)
    assert len(found) == 4
    assert {total for _, total in found} == {"40", "50"}
    assert all(10 < int(shown) <= 20 for shown, _ in found)


def test_reports_are_read_of_some_points_where_there_are_too_many(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repro_sweep.reporting import study

    monkeypatch.setattr(study, "_MOST_REPORTS", 100)
    fill(ledger, 40)
    with_reports = [bool(trial.intermediate_values) for trial in study_of(ledger).get_trials()]
    assert 3 < sum(with_reports) < 20
    assert re.search(r"\d+ of 40 points", page_of(ledger).text)


# --- how it is started -----------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The process that a sweep starts at its end."""
    command = [sys.executable, "-m", "repro_sweep.reporting", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_process_of_its_own_writes_the_report_and_says_what_it_took(ledger: Ledger) -> None:
    fill(ledger, 12)
    done = run(str(ledger.path.parent))
    assert (done.returncode, done.stderr) == (0, "")
    assert 0.1 < float(done.stdout) < 60
    assert Page((ledger.path.parent / FILE_NAME).read_text()).figures == FIGURES


def test_what_keeps_a_report_from_being_written_is_one_line(tmp_path: Path) -> None:
    done = run(str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"no report: {tmp_path}: there is no sweep here (no ledger.db)\n"
    assert run().returncode == 1


def test_the_command_writes_the_report_and_prints_its_path(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(ledger, 3)
    monkeypatch.chdir(tmp_path)
    assert cli._dispatch("report", ["report", "grid"]) == 0
    printed = capsys.readouterr()
    assert Path(printed.out.strip()) == tmp_path / "multirun/grid" / FILE_NAME
    assert Path(printed.out.strip()).is_file()
    assert cli._dispatch("report", ["report", "gird"]) == 2
    assert "there is no sweep 'gird' in multirun/; did you mean 'grid'?" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_one_line(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ledger.path.parent.chmod(0o500)
    try:
        assert cli._dispatch("report", ["report", "grid"]) == 2
    finally:
        ledger.path.parent.chmod(0o700)
    assert "report.html: cannot be written (Permission denied)" in capsys.readouterr().err


def test_the_tracker_knows_the_report_by_its_name() -> None:
    assert REPORT == FILE_NAME


def test_optuna_and_plotly_are_imported_when_something_is_drawn() -> None:
    code = (
        "import sys\nimport repro_sweep.reporting, repro_sweep.reporting.__main__, repro_sweep.cli.report\n"
        "assert not {'optuna', 'plotly', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
