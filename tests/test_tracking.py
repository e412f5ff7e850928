"""The tracker: a projection of the ledger into MLflow that loses nothing and doubles nothing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import cast
from urllib.parse import unquote

import pytest
from helpers import environment, eventually
from omegaconf import OmegaConf
from tracking_helpers import (
    CONFIG,
    START,
    Proxy,
    add_trial,
    assert_equal_to_ledger,
    drain,
    end,
    make_ledger,
    next_coordinator,
    points_in,
    points_of_ledger,
    proxy_before,
    report,
    run_trial,
    runs_of,
    shared_server,
    start,
)

from repro_sweep.cli import uploading
from repro_sweep.errors import TrackingError
from repro_sweep.ranking import trials
from repro_sweep.records import Attempt, NewReport, Trial
from repro_sweep.results import find_sweep
from repro_sweep.states import Direction, FailureKind, TrialState
from repro_sweep.sweep import Budget, Chosen, Constraint, Objective, SearchSpec, SpaceSpec
from repro_sweep.tracking import child, encoding
from repro_sweep.tracking import mlflow as projection
from repro_sweep.tracking.base import Progress
from repro_sweep.tracking.encoding import Curve, Point, params_of, safe_key
from repro_sweep.tracking.mlflow import MlflowTracker, check_writable, resolve_uri
from repro_sweep.tracking.process import TrackerProcess
from repro_sweep.tracking.sent import SentLog
from repro_sweep.tracking.store import FoundRun, Store, artifact_name, batches, prepare_environment
from repro_sweep.tracking.upload import REPORT

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"  # MLflow's own use of SQLAlchemy
)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another process brings about."""
    for _ in range(2400):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not happen")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow reads its limits from the environment at every call; as in the tracker's own process."""
    before = dict(os.environ)
    prepare_environment()
    yield
    for name in set(os.environ) - set(before):
        monkeypatch.delenv(name)
    os.environ.update(before)


@pytest.fixture
def uri(tmp_path: Path, empty_store: Path) -> str:
    """An embedded store of one test's own."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep's directory that does not exist yet."""
    return tmp_path / "multirun" / "grid"


@pytest.fixture
def server(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real MLflow server."""
    return shared_server(pytestconfig, tmp_path_factory)


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    """A proxy before the real server."""
    with proxy_before(server) as standing:
        yield standing


# --- which store -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("configured", "environment", "expected"),
    [
        (None, None, "sqlite:////work/mlflow.db"),
        ("", "", "sqlite:////work/mlflow.db"),
        (None, "http://server:5000/", "http://server:5000"),
        ("https://a/b", "http://server:5000", "https://a/b"),
        ("sqlite:///runs/m.db", None, "sqlite:////work/runs/m.db"),
        ("sqlite:////abs/m.db?timeout=3", None, "sqlite:////abs/m.db?timeout=3"),
        ("sqlite:///../m.db", None, "sqlite:////m.db"),
        ("postgresql+psycopg2://u@db/mlflow", None, "postgresql+psycopg2://u@db/mlflow"),
    ],
)
def test_the_uri_is_the_configured_one_else_the_environments_else_a_file_here(
    configured: str | None, environment: str | None, expected: str
) -> None:
    environ = {} if environment is None else {"MLFLOW_TRACKING_URI": environment}
    assert resolve_uri(configured, Path("/work"), environ) == expected


@pytest.mark.parametrize(
    "uri",
    [
        "mlruns",
        "file:///tmp/mlruns",
        "http://",
        "http://host:port",
        "http://a b",
        "ftp://x/y",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite:///a%20b.db",
        "postgresql:///nohost",
    ],
)
def test_a_uri_that_cannot_be_used_is_one_clear_line(uri: str) -> None:
    with pytest.raises(TrackingError, match=r"^sweep\.tracking\.uri: ") as caught:
        resolve_uri(uri, Path("/work"), {})
    assert "\n" not in str(caught.value)
    assert "allowed are" in str(caught.value) or "sqlite" in str(caught.value)


def test_a_malformed_uri_of_the_environment_names_the_variable_and_hides_the_password() -> None:
    with pytest.raises(TrackingError, match=r"^MLFLOW_TRACKING_URI: ") as caught:
        resolve_uri(None, Path("/work"), {"MLFLOW_TRACKING_URI": "oracle://scott:tiger@db/x"})
    assert "tiger" not in str(caught.value)


def test_a_store_that_is_no_mlflow_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "text.db"
    text.write_text("not a database, but long enough to be looked at as one" * 100)
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "file").touch()
    for path in ("text.db", "folder.db", "file/mlflow.db"):
        with pytest.raises(TrackingError, match=r"^/"):
            check_writable(f"sqlite:///{tmp_path}/{path}")
    check_writable(f"sqlite:///{tmp_path}/new/mlflow.db")
    check_writable("http://127.0.0.1:1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.db", "text.db"]


def test_resolving_the_uri_does_not_import_mlflow() -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from repro_sweep.tracking.mlflow import check_writable, resolve_uri\n"
        "import repro_sweep.tracking.process, repro_sweep.tracking.inside, repro_sweep.ranking\n"
        "check_writable(resolve_uri(None, Path('/tmp'), {}))\n"
        "assert not {'mlflow', 'sqlalchemy', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("spared", ["pandas", "fastapi"])
def test_the_tracker_s_mlflow_needs_no_pandas_and_one_that_cannot_do_without_something_gets_it(
    spared: str,
) -> None:
    """This MLflow can't do without FastAPI. What was spared can still be imported afterwards."""
    code = (
        "import importlib, sys\n"
        "from repro_sweep.tracking.store import import_mlflow\n"
        f"import_mlflow(['{spared}'])\n"
        "from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore\n"
        f"print('{spared}' in sys.modules)\n"
        f"importlib.import_module('{spared}')\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    assert done.stdout.split() == [str(spared == "fastapi")]


# --- how it looks ------------------------------------------------------------------------------------------------


def test_params_are_the_leaves_of_the_config_as_mlflow_clients_log_them() -> None:
    assert params_of(CONFIG) == {
        "model.name": "lstm",
        "model.hidden": "64",
        "optimizer.name": "Adam",
        "optimizer.lr": "0.01",
        "optimizer.betas": "[0.9, 0.999]",
        "tiny": "1e-05",
        "nothing": "None",
        "shuffle": "True",
    }


def test_params_follow_references_and_leave_out_what_may_be_secret() -> None:
    config = "a: {b: 3}\nc: ${a.b}\nd: x-${c}-y\nloop: ${loop}\n"
    config += "secret: ${oc.env:PASSWORD}\nvia: ${secret}\nlist: ['${c}']\n"
    assert params_of(config) == {"a.b": "3", "c": "3", "d": "x-3-y"}


def test_params_read_scalars_as_omegaconf_does() -> None:
    config = "a: 1e-3\nb: 2024-01-01\nc: 0x10\nd: .inf\ne: 'yes'\nf: yes\ng: 1_000\nh: '1e3'\ni: 5e5\n"
    plain = OmegaConf.to_container(OmegaConf.create(config))
    assert isinstance(plain, dict)
    assert params_of(config) == {str(key): str(value) for key, value in plain.items()}


def test_params_of_the_same_dotted_name_are_told_apart() -> None:
    params = params_of("a:\n  b: 1\na.b: 2\n'a b!': 3\n'a b?': 4\n")
    assert sorted(params.values()) == ["1", "2", "3", "4"]


def test_long_values_are_cut_with_a_mark_that_tells_them_apart() -> None:
    params = params_of(f"a: {'x' * 7000}y\nb: {'x' * 7000}z\n")
    assert all(len(value) <= 6000 for value in params.values())
    assert params["a"] != params["b"]
    assert "7001 characters" in params["a"]


ODD = [
    "",
    ".",
    "..",
    "a/../b",
    "/a",
    "a//b",
    "a/",
    "acc@5",
    "acc@1",
    "ü/λ",
    "a\n",
    "\x00",
    "\ud800",
    "x" * 251,
    "a b",
    "a:b",
    "./a",
]


def test_every_name_becomes_one_that_mlflow_takes_and_no_two_become_the_same() -> None:
    from mlflow.utils.validation import _validate_metric, _validate_param

    for name in ODD:
        _validate_metric(safe_key(name), 1.0, 0, 0)
        _validate_param(safe_key(name), "1")
    assert len({safe_key(name) for name in ODD}) == len(ODD)
    assert safe_key("val/accuracy top-1") == "val/accuracy top-1"


def test_file_names_that_no_url_can_hold_are_stored_under_others() -> None:
    odd = ["a#b.txt", "a?b.txt", "100%.png", "new\nline.txt", " lead", "a:b.txt", "x\udcff.bin"]
    stored = {artifact_name(f"folder/{name}") for name in odd}
    assert len(stored) == len(odd)
    assert all(name.startswith("folder/") for name in stored)
    assert artifact_name("folder/model best.pt") == "folder/model best.pt"


def test_batches_stay_within_mlflows_limits_and_lose_nothing() -> None:
    points = [Point(f"m{index % 7}", float(index), index, index) for index in range(2500)]
    params = {f"p{index}": "é" * 6000 for index in range(250)}
    tags = {f"t{index}": "x" * 5000 for index in range(120)}
    all_batches = list(batches(points, params, tags))
    for some_points, some_params, some_tags in all_batches:
        assert len(some_points) <= 1000
        assert len(some_params) <= 100
        assert len(some_tags) <= 100
        assert len(some_points) + len(some_params) + len(some_tags) <= 1000
        size = len(json.dumps([[point.key, point.value, point.at_ms, point.step] for point in some_points]))
        assert size + len(json.dumps([some_params, some_tags])) < 1_000_000
    assert [point for each in all_batches for point in each[0]] == points
    assert dict(pair for each in all_batches for pair in each[1]) == params
    assert dict(pair for each in all_batches for pair in each[2]) == tags


def test_ten_thousand_points_take_eleven_requests_with_all_else_that_a_trial_has() -> None:
    points = [Point(f"metric{index % 5}", float(index), index, index // 5) for index in range(10_000)]
    params, tags = ({f"{kind}{index}": "x" * 40 for index in range(30)} for kind in "pt")
    assert len(list(batches(points, params, tags))) == 11
    assert len(list(batches(points[:900], params, tags))) == 1


def test_final_metrics_come_after_all_reported_ones_and_repeat_none() -> None:
    curve = Curve()
    curve.add([Point("a", 1.0, 5000, 7), Point("b", math.nan, 5000, 7)])
    curve.add([Point("a", 2.0, 6000, 3)])
    final = curve.final({"a": 1.0, "b": math.nan, "c": math.inf}, ended_at=2.0)
    assert final == [Point("c", math.inf, 6000, 7)]
    assert Curve().final({"a": 1.0}, ended_at=2.0) == [Point("a", 1.0, 2000, 0)]


def test_only_the_latest_of_very_many_attempts_fit_the_history() -> None:
    trial = Trial(
        number=0,
        identity="i",
        directory="d",
        overrides=(),
        params={},
        repeat={},
        config="",
        state=TrialState.FAIL,
        attempt="a",
        change=0,
    )
    attempts = [
        Attempt(
            id=str(ordinal),
            trial=0,
            ordinal=ordinal,
            worker="w",
            slot=0,
            host=f"node{ordinal}",
            state=TrialState.FAIL,
            kind=FailureKind.PREEMPTED,
            message="m" * 5000,
            metrics={},
            started_at=START,
            ended_at=START,
        )
        for ordinal in range(1000)
    ]
    tags = encoding.state_tags(trial, attempts)
    history = json.loads(tags["repro_sweep.attempt_history"])
    assert 10 < len(history) < 1000
    assert history[-1]["host"] == "node999"
    assert tags["repro_sweep.attempts"] == "1000"
    assert len(tags["repro_sweep.failure_message"]) <= 1000


# --- the projection, embedded -------------------------------------------------------------------------------------


def test_a_finished_sweep_is_in_mlflow_with_all_that_is_known_of_it(sweep: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new folder/mlflow.db"
    ledger = make_ledger(sweep, uri)
    for number in range(3):
        add_trial(ledger, number, repeat={"seed": number})
    run_trial(ledger, 0, {"accuracy": 0.9, "acc@5": 0.99})
    attempt = start(ledger, 1)
    end(
        ledger,
        1,
        attempt,
        state=TrialState.FAIL,
        kind=FailureKind.EXCEPTION,
        message="ValueError: no\x00" + "x" * 9000,
    )
    attempt = start(ledger, 2)
    report(ledger, 2, attempt, range(2))
    end(ledger, 2, attempt, {"accuracy": 2.001, "loss": 0.5}, state=TrialState.PRUNED)
    plots = sweep / "trials/0/artifacts/plots"
    plots.mkdir()
    (plots / "loss.png").write_bytes(b"png")
    drain(sweep)

    parent, runs = runs_of(uri, sweep=True)[0], runs_of(uri)
    assert [run.info.status for run in runs] == ["FINISHED", "FAILED", "FINISHED"]
    assert (runs[2].data.tags["repro_sweep.state"], runs[2].data.metrics["accuracy"]) == ("PRUNED", 2.001)
    assert parent.info.status == "FAILED"
    assert (parent.info.start_time, runs[0].info.start_time, runs[0].info.end_time) == (
        START * 1000,
        START * 1000,
        START * 1000 + 100_000,
    )
    assert json.loads(parent.data.tags["repro_sweep.counts"]) == {"COMPLETE": 1, "PRUNED": 1, "FAIL": 1}
    expected = {
        "mlflow.parentRunId": parent.info.run_id,
        "mlflow.runName": "0 optimizer.lr=0.0 seed=0",
        "mlflow.user": "ada",
        "mlflow.source.git.commit": "c" * 40,
        "repro_sweep.kind": "trial",
        "repro_sweep.sweep": "grid",
        "repro_sweep.trial": "0",
        "repro_sweep.state": "COMPLETE",
        "repro_sweep.attempts": "1",
        "repro_sweep.host": "node",
        "repro_sweep.params": '{"optimizer.lr":0.0}',
        "repro_sweep.overrides": '["optimizer.lr=0.0","seed=0"]',
    }
    assert expected.items() <= runs[0].data.tags.items()
    assert runs[0].data.params == params_of(CONFIG)
    assert runs[0].data.metrics[safe_key("acc@5")] == 0.99
    assert runs[0].data.metrics["accuracy"] == 0.9
    assert runs[1].data.tags["repro_sweep.failure_kind"] == "EXCEPTION"
    assert runs[1].data.tags["repro_sweep.failure_message"].startswith("ValueError: no\\x00xx")
    folder = Path(unquote(runs[0].info.artifact_uri.removeprefix("file://")))
    assert folder.is_relative_to(tmp_path / "new folder/mlartifacts")
    assert (folder / "repro_sweep/config.yaml").read_text() == CONFIG
    assert (folder / "trial.log").read_text() == "log of trial 0\n"
    assert (folder / "plots/loss.png").read_bytes() == b"png"
    for run in runs:
        assert set(points_in(uri, run)) == points_of_ledger(ledger, int(run.data.tags["repro_sweep.trial"]))


def test_a_sweep_of_pruned_and_complete_trials_has_ended_well(sweep: Path, uri: str) -> None:
    ledger = make_ledger(sweep, uri)
    for number in range(2):
        add_trial(ledger, number)
    run_trial(ledger, 0, {"accuracy": 0.5})
    end(ledger, 1, start(ledger, 1), {"accuracy": 0.1}, state=TrialState.PRUNED)
    drain(sweep)
    assert runs_of(uri, sweep=True)[0].info.status == "FINISHED"
    assert trials("grid", uri=uri)[1].state is TrialState.PRUNED
    assert trials("grid", uri=uri)[1].metrics == {"accuracy": 0.1}


OBJECTIVES = (
    Objective(metric="accuracy", direction=Direction.MAXIMIZE),
    Objective(metric="latency@1", direction=Direction.MINIMIZE),
)
SEARCH = SearchSpec(
    sampler=Chosen(name="tpe", options={"multivariate": True}),
    seed=7,
    space=SpaceSpec(),
    budget=Budget(trials=40, hours=1.5),
    constraints=(Constraint(metric="latency@1", operator="<=", bound=50.0),),
)


def test_the_run_of_a_search_says_what_is_sought_and_how(sweep: Path, uri: str) -> None:
    pruner = Chosen(name="median", options={"n_warmup_steps": 3})
    make_ledger(sweep, uri, objectives=OBJECTIVES, search=SEARCH, pruner=pruner, sampler="tpe")
    drain(sweep)
    (parent,) = runs_of(uri, sweep=True)
    assert parent.data.params == {
        "sampler": "tpe",
        "sampler.multivariate": "True",
        "seed": "7",
        "budget.trials": "40",
        "budget.hours": "1.5",
        "objectives": "maximize accuracy, minimize latency@1",
        "constraints": "latency@1 <= 50",
        "pruner": "median",
        "pruner.n_warmup_steps": "3",
    }
    found = find_sweep("grid", uri)
    assert found.objectives == OBJECTIVES
    assert found.constraints == SEARCH.constraints


def test_a_search_that_goes_on_with_another_budget_says_so_in_its_tags(sweep: Path, uri: str) -> None:
    """MLflow changes no param, so these stay as they were at first."""
    ledger = make_ledger(sweep, uri, search=SEARCH, sampler="tpe")
    drain(sweep)
    more = SEARCH.model_copy(update={"budget": Budget(trials=90, plateau=5)})
    ledger.update_spec(ledger.spec.model_copy(update={"search": more}))
    ledger.commit()
    drain(sweep)
    (parent,) = runs_of(uri, sweep=True)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["budget.trials"] == "40"
    assert parent.data.params["budget.plateau"] == "5"
    assert json.loads(parent.data.tags["repro_sweep.search"])["budget.trials"] == "90"


def stored(uri: str) -> Path:
    """The report of the only sweep in an embedded store."""
    (parent,) = runs_of(uri, sweep=True)
    return Path(unquote(parent.info.artifact_uri.removeprefix("file://"))) / REPORT


def test_a_report_becomes_an_artifact_of_the_sweep_while_it_runs_and_again_when_it_has_changed(
    sweep: Path, uri: str
) -> None:
    ledger = make_ledger(sweep, uri)
    add_trial(ledger, 0)
    run_trial(ledger, 0, {"accuracy": 0.5})
    (sweep / REPORT).write_text("so far")
    tracker = MlflowTracker(sweep)
    deadline = time.monotonic() + 30
    while tracker.progress.left:
        assert time.monotonic() < deadline
        time.sleep(tracker.sync() / 10)
    tracker.close()
    assert stored(uri).read_text() == "so far"
    assert runs_of(uri, sweep=True)[0].info.status == "RUNNING"
    (sweep / REPORT).write_text("<h1>first</h1>")
    drain(sweep)
    assert stored(uri).read_text() == "<h1>first</h1>"
    stored(uri).write_text("as it was sent")
    (sweep / REPORT).write_text("<h1>first</h1>")
    drain(sweep)
    assert stored(uri).read_text() == "as it was sent"  # not sent again, though it was written again
    (sweep / REPORT).write_text("<h1>second</h1>")
    drain(sweep)
    assert stored(uri).read_text() == "<h1>second</h1>"
    assert runs_of(uri, sweep=True)[0].info.status == "FINISHED"


def test_a_report_that_was_lost_with_the_notes_or_with_the_run_is_sent_again(sweep: Path, uri: str) -> None:
    import mlflow

    ledger = make_ledger(sweep, uri)
    add_trial(ledger, 0)
    run_trial(ledger, 0, {"accuracy": 0.5})
    (sweep / REPORT).write_text("page")
    drain(sweep)
    stored(uri).unlink()
    for file in sweep.glob("tracking.db*"):
        file.unlink()
    drain(sweep)
    assert stored(uri).read_text() == "page"
    mlflow.MlflowClient(uri).delete_run(runs_of(uri, sweep=True)[0].info.run_id)
    drain(sweep)
    assert stored(uri).read_text() == "page"


@pytest.mark.slow
def test_a_report_reaches_a_server_after_all_trials(
    sweep: Path, proxy: Proxy, server: str, tmp_path: Path
) -> None:
    from mlflow.artifacts import download_artifacts

    ledger = make_ledger(sweep, proxy.uri, experiment="reported")
    for number in range(3):
        add_trial(ledger, number)
        run_trial(ledger, number, {"accuracy": 0.5})
    (sweep / REPORT).write_text("<h1>grid</h1>")
    drain(sweep)
    (parent,) = runs_of(server, sweep=True, sweep_id=ledger.spec.sweep_id)
    place = {"run_id": parent.info.run_id, "artifact_path": REPORT, "dst_path": str(tmp_path)}
    assert Path(download_artifacts(tracking_uri=server, **place)).read_text() == "<h1>grid</h1>"
    puts = [path for method, path in proxy.seen if method == "PUT"]
    assert puts[-2].endswith(REPORT)
    assert puts[-1].endswith("trials.json.gz")  # made of all the rest
    assert sum(path.endswith(REPORT) for path in puts) == 1


def test_uploading_twice_changes_nothing(sweep: Path, uri: str) -> None:
    ledger = make_ledger(sweep, uri)
    for number in range(5):
        add_trial(ledger, number)
        run_trial(ledger, number, {"accuracy": 0.5})
    drain(sweep)
    drain(sweep)
    assert_equal_to_ledger(ledger, uri)


def test_lost_notes_make_no_duplicates(sweep: Path, uri: str) -> None:
    ledger = make_ledger(sweep, uri)
    for number in range(5):
        add_trial(ledger, number)
    for number in range(3):
        run_trial(ledger, number, {"accuracy": 0.5})
    drain(sweep)
    for file in sweep.glob("tracking.db*"):
        file.unlink()
    for number in (3, 4):
        run_trial(ledger, number, {"accuracy": 0.5})
    drain(sweep)
    assert_equal_to_ledger(ledger, uri)


def test_trials_that_never_started_have_a_run_once_the_sweep_ends(sweep: Path, uri: str) -> None:
    ledger = make_ledger(sweep, uri)
    for number in range(3):
        add_trial(ledger, number)
    run_trial(ledger, 0, {"accuracy": 0.5})
    tracker = MlflowTracker(sweep)
    while tracker.progress.left:
        time.sleep(tracker.sync() / 10)
    assert [run.info.status for run in runs_of(uri)] == ["FINISHED"]
    assert runs_of(uri, sweep=True)[0].info.status == "RUNNING"
    tracker.close()
    drain(sweep)
    assert [run.info.status for run in runs_of(uri)] == ["FINISHED", "SCHEDULED", "SCHEDULED"]
    assert runs_of(uri, sweep=True)[0].info.status == "KILLED"
    for number in (1, 2):
        run_trial(ledger, number, {"accuracy": 0.5})
    drain(sweep)
    assert_equal_to_ledger(ledger, uri)
    assert runs_of(uri, sweep=True)[0].info.status == "FINISHED"


def test_all_attempts_of_a_trial_share_one_run_with_one_history(sweep: Path, uri: str) -> None:
    ledger = make_ledger(sweep, uri)
    add_trial(ledger, 0)
    first = start(ledger, 0, host="node1")
    report(ledger, 0, first, range(4))
    end(ledger, 0, first, state=TrialState.FAIL, kind=FailureKind.PREEMPTED, message="preempted", again=True)
    drain(sweep)
    assert runs_of(uri)[0].info.status == "SCHEDULED"
    second = start(ledger, 0, ordinal=1, at=START + 200, host="node2")
    report(ledger, 0, second, range(4, 8), at=START + 200)
    drain(sweep)
    assert runs_of(uri)[0].info.status == "RUNNING"
    end(ledger, 0, second, {"accuracy": 1.0}, at=START + 300)
    drain(sweep)
    assert_equal_to_ledger(ledger, uri)
    tags = runs_of(uri)[0].data.tags
    assert tags["repro_sweep.failure_kind"] == ""
    assert tags["repro_sweep.attempts"] == "2"
    history = json.loads(tags["repro_sweep.attempt_history"])
    assert [(each["host"], each["kind"]) for each in history] == [("node1", "PREEMPTED"), ("node2", None)]


def test_infinities_and_nan_reach_mlflow(sweep: Path, uri: str) -> None:
    ledger = make_ledger(sweep, uri)
    add_trial(ledger, 0)
    attempt = start(ledger, 0)
    metrics = {"a": math.inf, "b": -math.inf, "c": math.nan}
    ledger.add_reports(attempt, [NewReport(seq=0, step=0, time=START, metrics=metrics)])
    end(ledger, 0, attempt, {"a": math.inf, "c": math.nan})
    drain(sweep)
    drain(sweep)
    metrics = runs_of(uri)[0].data.metrics
    assert metrics["a"] == -metrics["b"] == sys.float_info.max
    assert math.isnan(metrics["c"])
    assert len(points_in(uri, runs_of(uri)[0])) == 3


def test_a_param_that_the_task_logged_itself_stands(sweep: Path, uri: str) -> None:
    import mlflow

    ledger = make_ledger(sweep, uri)
    add_trial(ledger, 0)
    original = encoding.params_of
    attempt = start(ledger, 0)
    tracker = MlflowTracker(sweep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "params_of", lambda _: {})  # the task was faster
        while tracker.progress.left:
            time.sleep(tracker.sync() / 10)
    tracker.close()
    mlflow.MlflowClient(uri).log_param(runs_of(uri)[0].info.run_id, "optimizer.lr", "auto")
    log = SentLog(sweep)
    row = log.get(0)
    row.basics = False
    log.put([row])
    log.close()
    end(ledger, 0, attempt, {"accuracy": 1.0})
    drain(sweep)
    assert runs_of(uri)[0].data.params == original(CONFIG) | {"optimizer.lr": "auto"}
    assert runs_of(uri)[0].info.status == "FINISHED"


def test_a_run_that_was_deleted_in_mlflow_comes_back_complete(sweep: Path, uri: str) -> None:
    import mlflow

    ledger = make_ledger(sweep, uri)
    for number in range(2):
        add_trial(ledger, number)
    attempt = start(ledger, 0)
    report(ledger, 0, attempt, range(3))
    run_trial(ledger, 1, {"accuracy": 1.0})
    drain(sweep)
    mlflow.MlflowClient(uri).delete_run(runs_of(uri)[0].info.run_id)
    end(ledger, 0, attempt, {"accuracy": 1.0})
    drain(sweep)
    assert_equal_to_ledger(ledger, uri)


def test_a_store_that_was_lost_is_filled_again(sweep: Path, uri: str, tmp_path: Path) -> None:
    import mlflow

    ledger = make_ledger(sweep, uri)
    for number in range(3):
        add_trial(ledger, number)
        run_trial(ledger, number, {"accuracy": 1.0})
    drain(sweep)
    client = mlflow.MlflowClient(uri)
    for run in [*runs_of(uri), *runs_of(uri, sweep=True)]:
        client.delete_run(run.info.run_id)
    drain(sweep)
    assert_equal_to_ledger(ledger, uri)


def test_a_deleted_experiment_is_one_clear_line_and_the_tracker_gives_up(sweep: Path, uri: str) -> None:
    import mlflow

    ledger = make_ledger(sweep, uri)
    add_trial(ledger, 0)
    run_trial(ledger, 0, {"accuracy": 1.0})
    client = mlflow.MlflowClient(uri)
    client.delete_experiment(client.create_experiment("experiment"))
    tracker = MlflowTracker(sweep)
    tracker.finish()
    deadline = time.monotonic() + 20
    while not (tracker.progress.error and "experiment 'experiment' was deleted" in tracker.progress.error):
        assert time.monotonic() < deadline, tracker.progress
        time.sleep(tracker.sync() / 10)
    assert tracker.progress.left == 2
    while not tracker.progress.done:
        assert time.monotonic() < deadline, tracker.progress
        time.sleep(tracker.sync() / 10)
    tracker.close()


def test_two_trackers_never_work_on_one_sweep(sweep: Path, uri: str) -> None:
    make_ledger(sweep, uri)
    tracker = MlflowTracker(sweep)
    with pytest.raises(BlockingIOError):
        MlflowTracker(sweep)
    tracker.close()
    MlflowTracker(sweep).close()


def test_values_too_long_for_tags_are_artifacts(sweep: Path, uri: str) -> None:
    ledger = make_ledger(sweep, uri)
    params = {"layers": list(range(3000)), "x": 1}
    add_trial(ledger, 0, params, overrides=[f"layers={'x' * 9000}"])
    run_trial(ledger, 0, {"accuracy": 1.0})
    drain(sweep)
    (run,) = runs_of(uri)
    assert run.data.tags["repro_sweep.params"].startswith("sha256:")
    assert run.data.tags["repro_sweep.repeat"] == '{"seed":0}'
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    record = json.loads((folder / "repro_sweep/trial.json").read_text())
    assert record == {"params": params, "repeat": {"seed": 0}, "overrides": [f"layers={'x' * 9000}"]}


def test_more_reports_than_fit_one_request_all_arrive(sweep: Path, uri: str) -> None:
    ledger = make_ledger(sweep, uri)
    add_trial(ledger, 0)
    attempt = start(ledger, 0)
    report(ledger, 0, attempt, range(6000))
    end(ledger, 0, attempt, {"accuracy": 7.0}, at=START + 7000)
    drain(sweep)
    assert_equal_to_ledger(ledger, uri)


def test_a_bug_in_one_trials_upload_holds_up_no_other(sweep: Path, uri: str) -> None:
    ledger = make_ledger(sweep, uri)
    for number in range(3):
        add_trial(ledger, number, config=CONFIG if number != 1 else "a: [unclosed")
        run_trial(ledger, number, {"accuracy": 1.0})
    drain(sweep)
    assert [run.info.status for run in runs_of(uri) if run.info.status == "FINISHED"] == ["FINISHED"] * 2


def test_what_was_done_but_never_noted_is_not_done_again(sweep: Path, uri: str) -> None:
    """The tracker ends between the store's commit and its own, every time that it has uploaded something."""
    ledger = make_ledger(sweep, uri)
    for number in range(3):
        add_trial(ledger, number)
    attempt = start(ledger, 0)
    for step in range(3):
        report(ledger, 0, attempt, range(step, step + 1))
        tracker = MlflowTracker(sweep)
        while not (tracker._jobs and 0 in tracker._jobs):
            time.sleep(tracker.sync() / 10)
        tracker._jobs[0].future.result()
        tracker._log.close()
    for number in (1, 2):
        run_trial(ledger, number, {"accuracy": 0.5})
    end(ledger, 0, attempt, {"accuracy": 0.5})
    drain(sweep)
    assert_equal_to_ledger(ledger, uri)


def test_the_tracker_may_be_killed_at_any_instant(sweep: Path, uri: str) -> None:
    ledger = make_ledger(sweep, uri)
    for number in range(40):
        add_trial(ledger, number)
        run_trial(ledger, number, {"accuracy": 0.5}, steps=20)
    command = [sys.executable, "-m", "repro_sweep.tracking.process", str(sweep)]
    chance = random.Random(7)
    kills = 0
    while kills < 4:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write('{"do": "finish"}\n')
            process.stdin.flush()
            process.stdout.readline()  # it has begun
            time.sleep(chance.uniform(0.0, 1.2))
            process.send_signal(signal.SIGKILL)
            kills += 1
    drain(sweep)
    assert_equal_to_ledger(ledger, uri)


def test_a_trial_that_is_tried_again_and_started_again_keeps_every_attempts_end_and_host(
    sweep: Path, uri: str
) -> None:
    ledger = make_ledger(sweep, uri)
    add_trial(ledger, 0)
    kinds = [FailureKind.OUT_OF_MEMORY, FailureKind.NODE_LOST, FailureKind.EXCEPTION]
    for ordinal, kind in enumerate(kinds):
        attempt = start(ledger, 0, ordinal=ordinal, host=f"node{ordinal}", at=START + 200 * ordinal)
        report(ledger, 0, attempt, range(ordinal, ordinal + 2), at=START + 200 * ordinal)
        last = ordinal == len(kinds) - 1
        end(ledger, 0, attempt, state=TrialState.FAIL, kind=kind, message=f"no {ordinal}",
            at=START + 200 * ordinal + 100, again=not last)  # fmt: skip
        drain(sweep)
    (run,) = runs_of(uri)
    assert (run.info.status, run.data.tags["repro_sweep.failure_kind"]) == ("FAILED", "EXCEPTION")
    ledger.requeue([0])
    ledger.commit()
    drain(sweep)
    (run,) = runs_of(uri)
    assert (run.info.status, run.data.tags["repro_sweep.state"]) == ("SCHEDULED", "WAITING")
    assert run.data.tags["repro_sweep.failure_kind"] == run.data.tags["repro_sweep.failure_message"] == ""
    attempt = start(ledger, 0, ordinal=3, host="node3", at=START + 1000)
    report(ledger, 0, attempt, range(3, 5), at=START + 1000)
    end(ledger, 0, attempt, {"accuracy": 0.9}, at=START + 1100)
    drain(sweep)
    assert_equal_to_ledger(ledger, uri)
    tags = runs_of(uri)[0].data.tags
    assert tags["repro_sweep.attempts"] == "4"
    assert [(each["kind"], each["host"]) for each in json.loads(tags["repro_sweep.attempt_history"])] == [
        ("OUT_OF_MEMORY", "node0"), ("NODE_LOST", "node1"), ("EXCEPTION", "node2"), (None, "node3"),
    ]  # fmt: skip


def test_cancelled_trials_are_killed_runs_and_come_back_when_they_are_started_again(
    sweep: Path, uri: str
) -> None:
    ledger = make_ledger(sweep, uri)
    for number in range(3):
        add_trial(ledger, number)
    attempt = start(ledger, 1)  # failed once, and cancelled as it waited to be tried again
    end(ledger, 1, attempt, state=TrialState.FAIL, kind=FailureKind.CRASH, message="signal 11", again=True)
    ledger.cancel([0, 1])
    ledger.commit()
    attempt = start(ledger, 2)
    end(
        ledger,
        2,
        attempt,
        state=TrialState.FAIL,
        kind=FailureKind.CANCELLED,
        cancelled=True,
        message="stopped",
    )
    drain(sweep)
    for run, attempts in zip(runs_of(uri), "011", strict=True):
        tags = run.data.tags
        assert (run.info.status, tags["repro_sweep.state"]) == ("KILLED", "FAIL")
        assert tags["repro_sweep.failure_kind"] == "CANCELLED"
        assert tags["repro_sweep.attempts"] == attempts
    read = trials("grid", uri=uri)
    assert [trial.failure.kind for trial in read if trial.failure] == [FailureKind.CANCELLED] * 3

    ledger.requeue([0, 1, 2])
    ledger.commit()
    drain(sweep)
    for run in runs_of(uri):
        tags = run.data.tags
        assert (run.info.status, tags["repro_sweep.state"]) == ("SCHEDULED", "WAITING")
        assert tags["repro_sweep.failure_kind"] == ""
    for number, ordinal in ((0, 0), (1, 1), (2, 1)):
        attempt = start(ledger, number, ordinal=ordinal, at=START + 500)
        end(ledger, number, attempt, {"accuracy": 1.0}, at=START + 600)
    drain(sweep)
    assert_equal_to_ledger(ledger, uri)


def test_a_run_names_the_code_that_its_latest_attempt_ran_with_however_late_it_reaches_mlflow(
    sweep: Path, uri: str
) -> None:
    """Another sweep takes over what the same code has found; a sweep may go on with other code than it began with."""
    ledger, lease = next_coordinator(make_ledger(sweep, uri, code="c1"))
    for number in range(4):
        add_trial(ledger, number)
    MlflowTracker(sweep).close()  # it was there, and could not reach its server
    now = time.time()
    for number in (0, 1):
        end(ledger, number, start(ledger, number, at=now), {"accuracy": 1.0}, at=now + 1)
    failed = start(ledger, 2, at=now)
    end(ledger, 2, failed, state=TrialState.FAIL, kind=FailureKind.EXCEPTION, at=now + 1)
    late = start(ledger, 3, at=now)

    ledger, lease = next_coordinator(ledger, lease)
    ledger.update_spec(ledger.spec.model_copy(update={"code": "c2"}))
    ledger.requeue([2])
    ledger.commit()
    now = time.time()
    again = start(ledger, 2, ordinal=1, at=now)
    end(ledger, 2, again, {"accuracy": 1.0}, at=now + 1)
    end(ledger, 3, late, {"accuracy": 1.0}, at=now + 1)  # its worker has outlived its coordinator
    drain(sweep)
    assert [run.data.tags["repro_sweep.code"] for run in runs_of(uri)] == ["c1", "c1", "c2", "c1"]
    lease.drop()


def test_a_tracker_stops_by_itself_when_another_coordinator_has_taken_over(sweep: Path, uri: str) -> None:
    """That one's own tracker, which has waited for it, goes on; an older one that comes late stops at once."""
    ledger, lease = next_coordinator(make_ledger(sweep, uri))
    for number in range(3):
        add_trial(ledger, number)
    run_trial(ledger, 0, {"accuracy": 0.5})

    async def story() -> None:
        nonlocal ledger, lease
        old = TrackerProcess(sweep, lease.holder.epoch)
        await old.start()
        await old.run_ref(0)
        ledger, lease = next_coordinator(ledger, lease)
        new = TrackerProcess(sweep, lease.holder.epoch)
        await new.start()
        await until(lambda: old.progress.done)
        assert old._child is not None
        assert await old._child.wait() == 0
        with pytest.raises(TrackingError, match="the tracker has stopped"):
            await old.run_ref(1)
        await new.run_ref(1)
        for number in (1, 2):
            run_trial(ledger, number, {"accuracy": 0.5})
        assert await new.finish(120) == 0
        late = TrackerProcess(sweep, lease.holder.epoch - 1)
        await late.start()
        await until(lambda: late.progress.done)
        for tracker in (old, late):
            await tracker.kill()

    asyncio.run(asyncio.wait_for(story(), 200))
    assert_equal_to_ledger(ledger, uri)
    lease.drop()


def finish(sweep: Path) -> None:
    """Have a tracker upload everything."""

    async def story() -> None:
        tracker = TrackerProcess(sweep)
        await tracker.start()
        assert await tracker.finish(120) == 0

    asyncio.run(asyncio.wait_for(story(), 200))


def started_early(monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[bytes]:
    """The process that the next tracker is to be."""
    monkeypatch.setattr(child, "_early", None)
    child.start_early()
    process = child._early
    assert process is not None
    child.start_early()
    assert child._early is process
    return process


def test_a_process_that_was_started_early_becomes_the_tracker(
    sweep: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = make_ledger(sweep, uri)
    add_trial(ledger, 0)
    run_trial(ledger, 0, {"accuracy": 0.5})
    early = started_early(monkeypatch)
    finish(sweep)
    assert early.returncode == 0
    assert child._early is None
    assert_equal_to_ledger(ledger, uri)


def test_one_that_has_died_early_is_replaced(sweep: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = make_ledger(sweep, uri)
    early = started_early(monkeypatch)
    early.kill()
    early.wait()
    finish(sweep)
    assert_equal_to_ledger(ledger, uri)


def test_one_that_is_told_nothing_ends_with_whom_it_was_started_by() -> None:
    """Also when that was killed, and cannot end it."""
    for last in ("", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"):
        code = (
            "from repro_sweep.tracking import child; child.start_early(); print(child._early.pid, flush=True);"
            + last
        )
        made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        eventually(lambda pid=int(made.stdout): not Path(f"/proc/{pid}").exists(), "it has ended", 60)
        assert made.stderr == ""


def test_a_question_outlives_the_tracker_that_it_was_asked_and_so_does_the_end(sweep: Path, uri: str) -> None:
    ledger = make_ledger(sweep, uri)
    for number in range(5):
        add_trial(ledger, number)
        run_trial(ledger, number, {"accuracy": 0.5})

    async def story() -> None:
        tracker = TrackerProcess(sweep)
        await tracker.start()
        asked = asyncio.create_task(tracker.run_ref(0))
        elsewhere = asyncio.create_task(tracker.done_elsewhere(120))
        first = tracker._child
        assert first is not None
        first.kill()  # it has not even imported MLflow
        ref = await asked
        assert await elsewhere == {}
        second = tracker._child
        assert second is not first
        finished = asyncio.create_task(tracker.finish(120))
        assert second is not None
        second.kill()
        assert await finished == 0
        assert tracker._child is not second
        assert ref.run_id == runs_of(uri)[0].info.run_id
        with pytest.raises(TrackingError, match="the tracker has stopped"):
            await tracker.run_ref(0)

    asyncio.run(asyncio.wait_for(story(), 200))
    assert_equal_to_ledger(ledger, uri)


@pytest.mark.parametrize("kind", ["a server's", "local"])
def test_how_far_a_file_has_been_sent_can_be_seen_while_it_is(
    kind: str, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(bytes(3000))
    store = Store(uri)
    seen: list[int] = []

    def copy(source: Path, target: Path) -> None:
        with Path(source).open("rb", buffering=0) as reader, Path(target).open("wb", buffering=0) as writer:
            for _ in range(3):
                seen.append(store.moved)
                writer.write(reader.read(1000))

    class Artifacts:
        def log_artifact(self, name: str, parent: str | None) -> None:
            copy(Path(name), tmp_path / "there")

    monkeypatch.setattr("repro_sweep.tracking.store.shutil.copyfile", copy)
    monkeypatch.setattr(store, "_artifacts", lambda _: Artifacts())
    where = (tmp_path / "artifacts").as_uri() if kind == "local" else "mlflow-artifacts:/1/artifacts"
    for name in ("model.bin", "model#.bin"):
        store.put_file(where, artifact_name(name), file)
    assert seen == [0, 1000, 2000, 3000, 4000, 5000]
    assert store.moved == 6000
    store.put_file(where, "model.bin", file)  # again, as another file of the trial was refused
    assert seen[6:] == [6000] * 3
    assert store.moved == 6000


def test_a_long_upload_is_waited_for_while_it_gets_on_and_given_up_when_it_begins_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uploading, "PATIENCE_S", 0.3)
    monkeypatch.setattr(uploading, "_LOOK_S", 0.01)

    class Tracker:
        """Reports one thing after another, and has done everything then."""

        def __init__(self, moved: list[int]) -> None:
            self._rest = moved
            self._done = asyncio.Event()

        @property
        def progress(self) -> Progress:
            if len(self._rest) == 1:
                self._done.set()
            return Progress(left=2, moved=self._rest.pop(0) if len(self._rest) > 1 else self._rest[0])

        async def finish(self, _timeout_s: float) -> int:
            await self._done.wait()
            return 0

    async def left(moved: list[int]) -> int:
        return await uploading.upload(cast("TrackerProcess", Tracker(moved)))

    assert asyncio.run(left(list(range(100)))) == 0
    assert asyncio.run(left([0, 10, 20] * 100_000)) == 2


# --- the projection, with a real server ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_short_trial_costs_three_requests_besides_its_artifacts(
    sweep: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight trials at a time, over connections that are kept."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    trials = 8
    for turn in range(
        4
    ):  # again where a busy machine's server has failed: it is asked once more then, rightly
        proxy.seen, proxy.failures, proxy.connections = [], [], 0
        together = threading.Barrier(trials)
        proxy.spoil = partial(_let_creations_meet, together, itertools.count())
        ledger = make_ledger(sweep / str(turn), proxy.uri, experiment=f"calls {turn}")
        for number in range(trials):
            add_trial(ledger, number)
            run_trial(ledger, number, {"accuracy": 0.5})
        drain(sweep / str(turn), timeout_s=240)
        if not proxy.failures:
            break
    assert proxy.failures == []
    assert not together.broken
    assert proxy.connections <= 10
    calls = Counter(
        path.split("?")[0].rpartition("/mlflow/")[2] for method, path in proxy.seen if method == "POST"
    )
    assert calls["runs/create"] == trials + 1  # the other one is the sweep's own run
    assert calls["runs/log-batch"] == trials + 4  # the sweep's tags, twice, its description and its table
    assert calls["runs/update"] == trials + 1
    assert set(calls) == {"runs/create", "runs/log-batch", "runs/update", "runs/search", "experiments/create"}
    # for the sweep's own run at the beginning and the end, and for the table
    assert calls["runs/search"] == 3
    files = Counter(path.rpartition("/artifacts/")[2] for method, path in proxy.seen if method == "PUT")
    assert files.pop("repro_sweep/trials.json.gz") == 1  # the sweep's own
    assert files == {"repro_sweep/config.yaml": trials, "trial.log": trials}


def _let_creations_meet(
    together: threading.Barrier, creations: Iterator[int], _method: str, path: str
) -> None:
    """Create no run but the first one before as many are asked for as ``together`` waits for."""
    if path.endswith("/runs/create") and next(creations):
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(60)


class _Noting(Store):
    """Notes which calls were made."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.calls: list[str] = []

    def create_run(self, *args: object, **options: object) -> FoundRun:
        self.calls.append("create")
        return super().create_run(*args, **options)

    def log(self, *args: object, **options: object) -> None:
        self.calls.append("log")
        super().log(*args, **options)

    def set_status(self, *args: object, **options: object) -> None:
        self.calls.append("status")
        super().set_status(*args, **options)


def test_a_trial_that_ends_soon_after_its_start_was_seen_costs_no_more_than_one_that_was_over(
    sweep: Path, uri: str
) -> None:
    """One that goes on is shown as running."""
    ledger = make_ledger(sweep, uri)
    store, now, woken = _Noting(uri), [100.0], threading.Event()
    tracker = MlflowTracker(sweep, clock=lambda: now[0], store=store, wake=woken.set)

    def settle() -> list[str]:
        for _ in range(3):
            tracker.sync()
            eventually(lambda: all(job.future.done() for job in tracker._jobs.values()), "uploads end")
        calls, store.calls = store.calls, []
        return calls

    try:
        settle()  # the sweep's own run
        for number in range(2):
            add_trial(ledger, number)
        short, long = start(ledger, 0), start(ledger, 1)
        report(ledger, 0, short, range(2))
        report(ledger, 1, long, range(2))
        assert settle() == []
        now[0] += projection.REPORTS_S / 2
        end(ledger, 0, short, {"accuracy": 0.5})
        assert settle() == ["create", "log", "status"]
        now[0] += projection.REPORTS_S / 2
        assert settle() == ["create", "log"]
    finally:
        tracker.close()
    assert [run.info.status for run in runs_of(uri)] == ["FINISHED", "RUNNING"]


@pytest.mark.slow
def test_lost_replies_and_failing_requests_make_no_duplicates_and_no_gaps(
    sweep: Path, proxy: Proxy, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "_PAUSE_S", 0.01)
    monkeypatch.setattr(projection, "_LONGEST_PAUSE_S", 0.2)
    chance = random.Random(3)

    def spoil(_method: str, _path: str) -> int | str | None:
        luck = chance.random()
        return "drop" if luck < 0.15 else 429 if luck < 0.2 else 500 if luck < 0.25 else None

    proxy.spoil = spoil
    ledger = make_ledger(sweep, proxy.uri, experiment="spoilt")
    for number in range(20):
        add_trial(ledger, number)
        run_trial(ledger, number, {"accuracy": 0.5}, steps=10)
    drain(sweep)
    proxy.spoil = lambda _method, _path: None
    only = runs_of(server, sweep_id=ledger.spec.sweep_id)
    assert [int(run.data.tags["repro_sweep.trial"]) for run in only] == list(range(20))
    for number, run in enumerate(only):
        points = points_in(server, run)
        assert len(points) == len(set(points))
        assert set(points) == points_of_ledger(ledger, number)
        assert run.info.status == "FINISHED"
        assert run.data.params == params_of(CONFIG)


@pytest.mark.slow
def test_attempts_trackers_and_replies_may_all_be_lost_at_once(
    sweep: Path, proxy: Proxy, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trial needs three attempts, each coordinator has another tracker, and the server is as bad as it gets."""
    monkeypatch.setattr(projection, "_PAUSE_S", 0.01)
    monkeypatch.setattr(projection, "_LONGEST_PAUSE_S", 0.2)
    chance = random.Random(11)
    down = False

    def spoil(_method: str, _path: str) -> int | str | None:
        if down:
            return 503
        luck = chance.random()
        if luck < 0.02:
            return "late"
        return "drop" if luck < 0.12 else 429 if luck < 0.17 else 500 if luck < 0.22 else None

    proxy.spoil = spoil
    ledger, lease = next_coordinator(make_ledger(sweep, proxy.uri, experiment="all lost"))
    for number in range(6):
        add_trial(ledger, number)
    for ordinal in range(3):
        at, last = START + 1000 * ordinal, ordinal == 2
        tracker = MlflowTracker(sweep, epoch=lease.holder.epoch)
        for number in range(6):
            attempt = start(ledger, number, ordinal=ordinal, at=at, host=f"node{ordinal}")
            report(ledger, number, attempt, range(5 * ordinal, 5 * ordinal + 5), at=at)
            down = ordinal == 1 and number in {2, 3}
            time.sleep(tracker.sync() / 10)
            lost = {"state": TrialState.FAIL, "kind": FailureKind.NODE_LOST, "again": True}
            end(ledger, number, attempt, {"accuracy": 0.5}, at=at + 500, **({} if last else lost))
            time.sleep(tracker.sync() / 10)
        if not last:
            ledger, lease = next_coordinator(ledger, lease)
            tracker.sync()
            assert tracker.progress.done  # another coordinator's tracker is to go on
        if ordinal == 1:  # killed: what is under way is done, and never noted
            tracker._threads.shutdown()
            tracker._log.close()
        else:
            tracker.close()
    drain(sweep)
    deadline = time.monotonic() + 30
    while proxy.late < proxy.spoilt_late:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    proxy.spoil = lambda _method, _path: None
    drain(sweep)
    runs = runs_of(server, sweep_id=ledger.spec.sweep_id)
    assert [int(run.data.tags["repro_sweep.trial"]) for run in runs] == list(range(6))
    assert len(runs_of(server, sweep_id=ledger.spec.sweep_id, sweep=True)) == 1
    for number, run in enumerate(runs):
        points = points_in(server, run)
        assert len(points) == len(set(points))
        assert set(points) == points_of_ledger(ledger, number)
        assert run.info.status == "FINISHED"
        history = json.loads(run.data.tags["repro_sweep.attempt_history"])
        assert [(each["kind"], each["host"]) for each in history] == [
            ("NODE_LOST", "node0"), ("NODE_LOST", "node1"), (None, "node2"),
        ]  # fmt: skip


@pytest.mark.slow
def test_a_closing_sweep_looks_for_second_runs_though_every_third_look_fails(
    sweep: Path, proxy: Proxy, server: str
) -> None:
    """What it has looked at is not looked at again."""
    lost = itertools.count()
    looks = itertools.count(1)

    def spoil(_method: str, path: str) -> int | str | None:
        if path.endswith("/runs/create") and next(lost) < 6:
            return "drop"
        return 500 if path.endswith("/runs/search") and next(looks) % 3 == 0 else None

    proxy.spoil = spoil
    ledger = make_ledger(sweep, proxy.uri, experiment="every third")
    for number in range(6):
        add_trial(ledger, number)
        run_trial(ledger, number, {"accuracy": 0.5})
    drain(sweep)
    runs = runs_of(server, sweep_id=ledger.spec.sweep_id)
    assert [int(run.data.tags["repro_sweep.trial"]) for run in runs] == list(range(6))
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert [run.info.status for run in runs_of(server, sweep_id=ledger.spec.sweep_id, sweep=True)] == [
        "FINISHED"
    ]


@pytest.mark.slow
def test_a_request_that_is_done_long_after_it_was_given_up_leaves_no_second_run(
    sweep: Path, proxy: Proxy, server: str
) -> None:
    spoilt: list[str] = []

    def spoil(_method: str, path: str) -> str | None:
        if path.endswith("/runs/create") and len(spoilt) < 3:
            spoilt.append(path)
            return "late"
        return None

    proxy.spoil = spoil
    ledger = make_ledger(sweep, proxy.uri, name="late", experiment="late requests")
    for number in range(4):
        add_trial(ledger, number)
    for number in range(2):
        run_trial(ledger, number, {"accuracy": 0.5})
    drain(sweep)
    deadline = time.monotonic() + 30
    while proxy.late < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    seen = {trial.run_id for trial in trials("late", uri=server)}
    for number in (2, 3):
        run_trial(ledger, number, {"accuracy": 0.5})
    drain(sweep)
    runs = runs_of(server, sweep_id=ledger.spec.sweep_id)
    assert [int(run.data.tags["repro_sweep.trial"]) for run in runs] == list(range(4))
    assert {run.info.run_id for run in runs} == seen
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
    assert len(runs_of(server, sweep_id=ledger.spec.sweep_id, sweep=True)) == 1


@pytest.mark.slow
def test_a_server_that_comes_late_gets_everything(
    sweep: Path, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator's end: told what is wrong, never kept waiting, and all arrives when the server does."""
    with proxy_before(server) as proxy:
        ledger = make_ledger(sweep, proxy.uri, experiment="late")
        proxy.spoil = lambda _method, _path: 503
        for number in range(5):
            add_trial(ledger, number)
        attempt = start(ledger, 0)
        for number in range(1, 4):
            run_trial(ledger, number, {"accuracy": 0.5})

        async def story() -> None:
            tracker = TrackerProcess(sweep)
            await tracker.start()
            with pytest.raises(TrackingError, match="503"):
                await asyncio.wait_for(tracker.run_ref(0), 120)
            await until(lambda: tracker.progress.error is not None)
            assert tracker.progress.left == 5  # four trials have something to say, and the sweep itself
            assert "503" in tracker.progress.error
            assert await tracker.finish(0.2) == 6  # the one that never started as well

            tracker = TrackerProcess(sweep)
            await tracker.start()
            proxy.spoil = lambda _method, _path: None
            ref = await asyncio.wait_for(tracker.run_ref(0), 120)
            assert ref.uri == proxy.uri
            again, other = await asyncio.gather(tracker.run_ref(0), tracker.run_ref(4))
            assert again == ref != other
            with pytest.raises(TrackingError, match="there is no trial 77"):
                await tracker.run_ref(77)
            end(ledger, 0, attempt, {"accuracy": 1.0})
            run_trial(ledger, 4, {"accuracy": 0.5})
            assert await tracker.finish(200) == 0
            assert tracker.progress.done
            runs = runs_of(server, sweep_id=ledger.spec.sweep_id)
            assert [run.info.status for run in runs] == ["FINISHED"] * 5
            assert (runs[0].info.run_id, runs[4].info.run_id) == (ref.run_id, other.run_id)

        asyncio.run(asyncio.wait_for(story(), 500))


@pytest.mark.slow
def test_a_tracker_that_dies_is_started_again_and_one_that_is_told_to_stop_stops(
    sweep: Path, uri: str
) -> None:
    ledger = make_ledger(sweep, uri)
    add_trial(ledger, 0)
    run_trial(ledger, 0, {"accuracy": 0.5})

    async def story() -> None:
        tracker = TrackerProcess(sweep)
        await tracker.start()
        ref = await tracker.run_ref(0)
        first = tracker._child
        assert first is not None
        first.kill()
        await first.wait()
        await until(lambda: tracker._child is not first)
        assert await tracker.run_ref(0) == ref
        await tracker.kill()
        assert tracker._child is not None
        assert await tracker._child.wait() == 0

    asyncio.run(asyncio.wait_for(story(), 60))
    drain(sweep)
    assert_equal_to_ledger(ledger, uri)


@pytest.mark.slow
def test_artifacts_travel_to_a_server_and_back_whatever_their_names(sweep: Path, server: str) -> None:
    from repro_sweep.results import find_sweep, read_trials

    ledger = make_ledger(sweep, server, name="names", experiment="names")
    add_trial(ledger, 0, {"layers": list(range(3000))})
    folder = sweep / "trials/0/artifacts"
    names = [
        "plain.txt",
        "with space.txt",
        "ünïcode.txt",
        "a#b.txt",
        "a?b.txt",
        "100%.txt",
        "a:b.txt",
        "trial.log",
    ]
    for name in names:
        (folder / name).write_text(name)
    os.mkfifo(folder / "fifo")
    (folder / "dangling").symlink_to("nowhere")
    run_trial(ledger, 0, {"accuracy": 0.5})
    drain(sweep)
    (trial,) = read_trials(find_sweep("names", server))
    for name in names[:-1]:
        assert trial.artifact(artifact_name(name)).read_text() == name
    assert trial.artifact("artifacts/trial.log").read_text() == "trial.log"
    assert trial.artifact("trial.log").read_text() == "log of trial 0\n"
    assert trial.config == OmegaConf.create(CONFIG)
    assert trial.params == {"layers": list(range(3000))}
    with pytest.raises(TrackingError, match=r"trial 0 has no artifact 'nothing': it has .*plain\.txt"):
        trial.artifact("nothing")


def test_what_a_run_has_is_told_from_what_it_lacks(sweep: Path, uri: str) -> None:
    ledger = make_ledger(sweep, uri)
    add_trial(ledger, 0)
    start(ledger, 0)
    drain(sweep)
    store = Store(uri)
    run_id = runs_of(uri)[0].info.run_id
    values = [1.0, -0.1, math.nan, math.inf, -math.inf]
    points = [Point(key, value, 1000 + step, step) for key in "ab" for step, value in enumerate(values)]
    store.log(run_id, points=points[::2])
    assert store.missing(run_id, points) == points[1::2]


def test_nothing_is_left_in_the_folder_a_tracker_runs_in(
    sweep: Path, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ledger = make_ledger(sweep, uri)
    add_trial(ledger, 0)
    run_trial(ledger, 0, {"accuracy": 0.5})
    drain(sweep)
    command = [sys.executable, "-m", "repro_sweep.tracking.process", str(sweep)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write('{"do": "finish"}\n')
        process.stdin.flush()
        last = json.loads(process.stdout.readlines()[-1])
        assert (last["left"], last["error"]) == (0, None)
        assert process.stderr.read() == ""
        assert process.wait() == 0
    assert list((tmp_path / "here").iterdir()) == []


def test_pauses_grow_to_a_bound() -> None:
    pauses = [projection._pause(failures) for failures in range(1, 40)]
    assert pauses[0] == projection._PAUSE_S
    assert all(later >= earlier for earlier, later in itertools.pairwise(pauses))
    assert pauses[-1] == projection._LONGEST_PAUSE_S
