"""The table of trials that a sweep's run carries: a ranking from it is the same as from the runs, and much cheaper."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tracking_helpers import (
    START,
    Proxy,
    add_trial,
    drain,
    end,
    make_ledger,
    proxy_before,
    report,
    run_trial,
    runs_of,
    shared_server,
    start,
)

from repro_sweep.errors import TrackingError
from repro_sweep.ledger import Ledger
from repro_sweep.ranking import best_trial, leaderboard, rank, trials
from repro_sweep.records import NewReport, Reused
from repro_sweep.results import find_sweep, note_verdict, read_trials
from repro_sweep.states import FailureKind, TrialState, Verdict
from repro_sweep.tracking import table
from repro_sweep.tracking.store import read_artifact

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"  # MLflow's own use of SQLAlchemy
)


@pytest.fixture
def uri(tmp_path: Path, empty_store: Path) -> str:
    """An empty store."""
    return f"sqlite:///{shutil.copy(empty_store, tmp_path)}"


def all_kinds(ledger: Ledger) -> None:
    """Trials that have ended in every way, with every kind of number."""
    values = [0.5, math.nan, math.inf, -math.inf, 1e-300, 0.7]
    for number, value in enumerate(values):
        add_trial(ledger, number, {"lr": number / 3, "deep": {"a": [1, None, "ä"]}, "flag": number % 2 == 0})
        run_trial(ledger, number, {"accuracy": value, "loss@1": -value, "only_here": 1.0})
    add_trial(ledger, 6, {"lr": 2.0, "long": "x" * 6000}, overrides=["lr=2.0", "long=" + "x" * 6000])
    run_trial(ledger, 6, {"accuracy": 0.6})
    add_trial(ledger, 7)
    attempt = start(ledger, 7)
    report(ledger, 7, attempt, range(3))
    end(ledger, 7, attempt, state=TrialState.FAIL, kind=FailureKind.OUT_OF_MEMORY, message="killed\n'it'")
    add_trial(ledger, 8)
    attempt = start(ledger, 8)
    ledger.add_reports(attempt, [NewReport(seq=0, step=0, time=START, metrics={"told": -math.inf})])
    end(ledger, 8, attempt, {"accuracy": 0.1}, state=TrialState.PRUNED)
    add_trial(ledger, 9)
    end(ledger, 9, start(ledger, 9), state=TrialState.COMPLETE)  # without any metric
    add_trial(ledger, 10)
    elsewhere = Reused(
        run_id="f" * 32, origin="grid/3", host="node", metrics={"accuracy": 0.3}, started_at=START, ended_at=START
    )  # fmt: skip
    ledger.reuse(10, elsewhere, "code")
    add_trial(ledger, 11)  # waits
    ledger.commit()


def fields(found: list[Any]) -> list[str]:
    """All fields of trials; text, as NaN is equal to nothing."""
    names = [name for name in found[0].__slots__ if name != "metrics"]
    return [
        repr([(name, getattr(each, name)) for name in names] + sorted(each.metrics.items())) for each in found
    ]


def both_ways(uri: str, name: str = "grid") -> tuple[list[str], list[str]]:
    """The trials from the table, which must be current, and from the runs."""
    sweep = find_sweep(name, uri)
    assert sweep.stamp is not None
    return fields(read_trials(sweep)), fields(read_trials(sweep, fresh=True))


def never_searched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is noted when the runs of trials are searched."""
    from repro_sweep import results

    seen: list[str] = []
    search = results.runs_of

    def noted(client: Any, experiments: list[str], condition: str, *rest: Any, **more: Any) -> Iterator[Any]:
        if "parentRunId" in condition:
            seen.append(condition)
        return search(client, experiments, condition, *rest, **more)

    monkeypatch.setattr(results, "runs_of", noted)
    return seen


def test_the_table_says_all_that_the_runs_say(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = make_ledger(tmp_path / "sweep", uri)
    all_kinds(ledger)
    drain(tmp_path / "sweep")
    searched = never_searched(monkeypatch)
    found = trials("grid", uri=uri)
    assert searched == []
    assert [trial.state for trial in found[6:]] == [
        "COMPLETE",
        "FAIL",
        "PRUNED",
        "COMPLETE",
        "COMPLETE",
        "WAITING",
    ]
    assert (found[10].reused_from, found[10].metrics["accuracy"]) == ("f" * 32, 0.3)
    assert math.isnan(found[1].metrics["accuracy"])
    assert (found[2].metrics["accuracy"], found[2].metrics["loss@1"]) == (math.inf, -math.inf)
    assert found[6].params["long"] == "x" * 6000
    assert (found[8].metrics, found[9].metrics) == ({"accuracy": 0.1, "told": -math.inf}, {})
    from_table, from_runs = both_ways(uri)
    assert len(searched) == 1
    assert from_table == from_runs
    assert best_trial("grid", uri=uri).number == 5


def test_metrics_that_a_task_has_logged_itself_are_in_the_table(tmp_path: Path, uri: str) -> None:
    import mlflow

    ledger = make_ledger(tmp_path / "sweep", uri)
    add_trial(ledger, 0)
    attempt = start(ledger, 0)
    drain(tmp_path / "sweep")
    mlflow.MlflowClient(uri).log_metric(runs_of(uri)[0].info.run_id, "own", 4.0)
    end(ledger, 0, attempt, {"accuracy": 0.5})
    drain(tmp_path / "sweep")
    assert find_sweep("grid", uri).stamp is not None
    assert trials("grid", uri=uri)[0].metrics == {"accuracy": 0.5, "own": 4.0}


def test_a_metric_that_was_logged_when_all_was_over_is_found_in_the_runs(tmp_path: Path, uri: str) -> None:
    import mlflow

    ledger = make_ledger(tmp_path / "sweep", uri)
    for number in range(2):
        add_trial(ledger, number)
        run_trial(ledger, number, {"accuracy": 0.5})
    drain(tmp_path / "sweep")
    mlflow.MlflowClient(uri).log_metric(runs_of(uri)[1].info.run_id, "test_accuracy", 0.25)
    assert best_trial("grid", metric="test_accuracy", uri=uri).number == 1
    assert rank("grid", where="test_accuracy>0.1", uri=uri).rows[0].trials == (1,)
    with pytest.raises(TrackingError, match="has a metric 'nothing'"):
        rank("grid", metric="nothing", uri=uri)


def test_a_run_that_was_deleted_or_restored_later_counts_as_mlflow_says(tmp_path: Path, uri: str) -> None:
    import mlflow

    ledger = make_ledger(tmp_path / "sweep", uri)
    for number in range(3):
        add_trial(ledger, number)
        run_trial(ledger, number, {"accuracy": number / 10})
    drain(tmp_path / "sweep")
    client = mlflow.MlflowClient(uri)
    best = best_trial("grid", uri=uri)
    client.delete_run(best.run_id)
    assert (best.number, best_trial("grid", uri=uri).number) == (2, 1)
    assert len(rank("grid", uri=uri).rows) == 2
    client.restore_run(best.run_id)
    assert best_trial("grid", uri=uri).number == 2


def test_a_verdict_of_later_is_known_and_the_table_stays_current(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = make_ledger(tmp_path / "sweep", uri)
    for number in range(2):
        add_trial(ledger, number)
        run_trial(ledger, number, {"accuracy": 0.5})
    drain(tmp_path / "sweep")
    note_verdict(trials("grid", uri=uri)[1], Verdict.EXACT, "a" * 32)
    searched = never_searched(monkeypatch)
    assert [trial.reproduced for trial in trials("grid", uri=uri)] == [None, Verdict.EXACT]
    assert searched == []
    from_table, from_runs = both_ways(uri)
    assert from_table == from_runs


def test_a_sweep_that_goes_on_has_no_table_until_it_is_over_again(tmp_path: Path, uri: str) -> None:
    from repro_sweep.tracking.mlflow import MlflowTracker

    ledger = make_ledger(tmp_path / "sweep", uri)
    add_trial(ledger, 0)
    run_trial(ledger, 0, {"accuracy": 0.1})
    drain(tmp_path / "sweep")
    assert find_sweep("grid", uri).stamp is not None
    add_trial(ledger, 1)
    run_trial(ledger, 1, {"accuracy": 0.2})
    tracker = MlflowTracker(tmp_path / "sweep")
    try:
        while tracker.progress.left:
            tracker.sync()
    finally:
        tracker.close()
    assert runs_of(uri, sweep=True)[0].data.tags[table.TAG] == ""
    assert find_sweep("grid", uri).stamp is None  # running, as far as anybody knows
    assert best_trial("grid", uri=uri).number == 1
    drain(tmp_path / "sweep")
    assert find_sweep("grid", uri).stamp is not None
    assert best_trial("grid", uri=uri).number == 1


def spoilt(what: str) -> Callable[[str], None]:
    """Spoils the table of a store's only sweep in some way."""

    def spoil(uri: str) -> None:
        import mlflow

        client = mlflow.MlflowClient(uri)
        run = runs_of(uri, sweep=True)[0]
        file = Path(run.info.artifact_uri.removeprefix("file://")) / table.ARTIFACT
        stamp = run.data.tags[table.TAG]
        if what == "cut off":
            file.write_bytes(file.read_bytes()[:-9])
        elif what == "missing":
            file.unlink()
        elif what == "of an older version":
            client.delete_tag(run.info.run_id, table.TAG)
        elif what == "of a later version":
            client.set_tag(run.info.run_id, table.TAG, stamp.replace('"version":1', '"version":2'))
        elif what == "nonsense":
            client.set_tag(run.info.run_id, table.TAG, "[1]")
        elif what == "left by a version that knows of none":
            client.set_tag(run.info.run_id, "repro_sweep.counts", '{"COMPLETE":2}')

    return spoil


@pytest.mark.parametrize(
    "what",
    [
        "cut off", "missing", "of an older version", "of a later version", "nonsense",
        "left by a version that knows of none",
    ],
)  # fmt: skip
def test_a_table_that_is_not_whole_or_not_current_is_not_used(
    tmp_path: Path, uri: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = make_ledger(tmp_path / "sweep", uri)
    add_trial(ledger, 0)
    run_trial(ledger, 0, {"accuracy": 0.1})
    drain(tmp_path / "sweep")
    before = fields(trials("grid", uri=uri))
    spoilt(what)(uri)
    searched = never_searched(monkeypatch)
    assert fields(trials("grid", uri=uri)) == before
    assert len(searched) == 1


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real MLflow server."""
    return shared_server(request.config, tmp_path_factory)


def requests_of(proxy: Proxy, call: Callable[[], object]) -> list[str]:
    """What a call asks the server for, without the names of runs."""
    proxy.seen.clear()
    call()
    return sorted(f"{method} {path.rpartition('/artifacts/')[2]}" for method, path in proxy.seen)


def test_the_number_of_requests_does_not_grow_with_the_number_of_trials(tmp_path: Path, server: str) -> None:
    for count in (3, 60):
        name = f"of_{count}"
        ledger = make_ledger(tmp_path / name, server, name=name, experiment="requests")
        for number in range(count):
            add_trial(ledger, number)
            run_trial(ledger, number, {"accuracy": number / 10}, steps=1)
        drain(tmp_path / name)
    with proxy_before(server) as proxy:
        asked = {
            count: [
                requests_of(proxy, lambda name=name: best_trial(name, uri=proxy.uri)),
                requests_of(proxy, lambda name=name: rank(name, top=2, uri=proxy.uri)),
                requests_of(proxy, lambda name=name: leaderboard(name, uri=proxy.uri)),
            ]
            for count, name in ((3, "of_3"), (60, "of_60"))
        }
        both = requests_of(proxy, lambda: rank(["of_3", "of_60"], uri=proxy.uri))
    assert asked[3] == asked[60]
    searches = ["POST /api/2.0/mlflow/runs/search"] * 2
    assert asked[60] == [[f"GET {table.ARTIFACT}", *experiments(asked[60][0]), *searches]] * 3
    assert len(both) == 2 * len(asked[60][0])
    sweep = find_sweep("of_60", server)
    content = read_artifact(sweep.artifact_uri, table.ARTIFACT, server)
    assert len(content) < 60 * 200


def experiments(asked: list[str]) -> list[str]:
    """The one question for the experiments, however this version of MLflow asks it."""
    found = [each for each in asked if "experiments/search" in each]
    assert len(found) == 1
    return found


def test_a_server_that_does_not_give_the_table_away_is_asked_for_the_runs(
    tmp_path: Path, server: str
) -> None:
    ledger = make_ledger(tmp_path / "sweep", server, name="refused", experiment="refused")
    for number in range(2):
        add_trial(ledger, number)
        run_trial(ledger, number, {"accuracy": number / 10}, steps=1)
    drain(tmp_path / "sweep")
    with proxy_before(server) as proxy:
        proxy.spoil = lambda _method, path: 403 if "mlflow-artifacts" in path else None
        assert best_trial("refused", uri=proxy.uri).number == 1
        assert any("mlflow-artifacts" in path for _, path in proxy.seen)
