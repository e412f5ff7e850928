"""MLflow inside a trial: whatever a task does with it goes to the trial's own run.

The zygote of these tests imports mlflow and scikit-learn, reads from the store (so it has open connections), and forks
a child for each case, as the worker's does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tracking_helpers import (
    add_trial,
    drain,
    end,
    make_ledger,
    runs_of,
    shared_server,
    start,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"  # MLflow's own use of SQLAlchemy
)

ZYGOTE = """
import json, os, sys, threading, traceback
early = sys.argv[2] == "early"
if early:
    import mlflow
    from mlflow import log_metric, start_run, set_experiment
    from sklearn.linear_model import LogisticRegression
    mlflow.set_tracking_uri(sys.argv[1])
    assert mlflow.search_experiments()  # connections are open now
from repro_sweep.tracking import inside
from repro_sweep.tracking.base import RunRef

out = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
resolved = 0

def child(case, uri, run_id, experiment_id):
    def resolve():
        global resolved
        resolved += 1
        return RunRef(uri=uri, run_id=run_id, experiment_id=experiment_id)
    inside.install(resolve, uri=uri)
    names = {}
    try:
        exec(case, names)
    except Exception:
        traceback.print_exc()
        inside.settle(failed=True)
        return {"resolved": resolved, "failed": traceback.format_exc(), "mlflow": "mlflow" in sys.modules}
    inside.settle()
    answer = {"resolved": resolved, "failed": "", "mlflow": "mlflow" in sys.modules}
    return answer | {"result": names.get("result"), "at once": "at_once" in names}

for line in sys.stdin:
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        answer = child(**json.loads(line))
        os.write(write, json.dumps(answer).encode())
        os.close(write)
        if answer.get("at once"):
            os._exit(0)
        sys.exit(0)  # with all that libraries do at exit
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = json.loads(pipe.read())
    _, status = os.waitpid(pid, 0)
    out.write(json.dumps(answer | {"status": status}) + "\\n")
"""


@dataclass
class Zygote:
    """A process that forks a child for each case."""

    process: subprocess.Popen[str]
    folder: Path

    def run(self, case: str, trial: Any) -> dict[str, Any]:
        """Run a case as the task of a trial."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        message = {
            "case": case,
            "uri": trial.uri,
            "run_id": trial.run_id,
            "experiment_id": trial.experiment_id,
        }
        stdin.write(json.dumps(message) + "\n")
        stdin.flush()
        answer: dict[str, Any] = json.loads(stdout.readline())
        assert answer["status"] == 0
        return answer


def _zygote(folder: Path, uri: str, when: str) -> Iterator[Zygote]:
    script = folder / "zygote.py"
    script.write_text(ZYGOTE)
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        [sys.executable, str(script), uri, when],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Zygote(process, folder)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Zygote]:
    """A zygote that has used mlflow already."""
    yield from _zygote(tmp_path_factory.mktemp("zygote"), f"sqlite:///{empty_store}", "early")


@pytest.fixture(scope="module")
def plain_zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """A zygote that has not imported mlflow."""
    yield from _zygote(tmp_path_factory.mktemp("plain"), "", "late")


@dataclass
class Running:
    """A trial that runs, and its run."""

    uri: str
    run_id: str
    experiment_id: str
    directory: Path
    ledger: Any
    attempt: str

    def run(self) -> Any:
        """Its run, as it is now."""
        import mlflow

        return mlflow.MlflowClient(self.uri).get_run(self.run_id)

    def finish(self, **how: Any) -> Any:
        """End the trial; returns its run when the tracker is done."""
        end(self.ledger, 0, self.attempt, {"accuracy": 0.5}, **how)
        drain(self.directory)
        return self.run()


def _running(directory: Path, uri: str) -> Running:
    ledger = make_ledger(directory, uri, experiment=directory.name)
    add_trial(ledger, 0)
    attempt = start(ledger, 0)
    drain(directory)
    (run,) = runs_of(uri, sweep_id=ledger.spec.sweep_id)
    return Running(uri, run.info.run_id, run.info.experiment_id, directory, ledger, attempt)


@pytest.fixture
def server(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real MLflow server."""
    return shared_server(pytestconfig, tmp_path_factory)


@pytest.fixture
def trial(tmp_path: Path, empty_store: Path) -> Running:
    """A running trial in a store of its own."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return _running(tmp_path / "sweep", f"sqlite:///{tmp_path}/mlflow.db")


def all_runs(trial: Running) -> list[Any]:
    """All runs in the store but the sweep's and the trial's own, in any experiment."""
    import mlflow

    client = mlflow.MlflowClient(trial.uri)
    found = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return [run for run in found if "repro_sweep.kind" not in run.data.tags]


def test_a_task_that_does_not_use_mlflow_never_asks_for_a_run(
    zygote: Zygote, plain_zygote: Zygote, trial: Running
) -> None:
    assert zygote.run("result = 1", trial)["resolved"] == 0
    answer = plain_zygote.run("result = 1", trial)
    assert (answer["resolved"], answer["mlflow"]) == (0, False)
    assert (
        zygote.run("import mlflow\nmlflow.autolog(disable=True)\nmlflow.active_run()", trial)["resolved"] == 0
    )


LOG = """
import mlflow, pathlib, os
mlflow.log_metric("mine", 0.25, step=3)
mlflow.log_param("own", "yes")
mlflow.set_tag("color", "blue")
path = pathlib.Path("note.txt"); path.write_text("hello")
mlflow.log_artifact(str(path))
mlflow.log_text("text", "folder/text.txt")
result = mlflow.active_run().info.run_id
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_what_a_task_logs_goes_to_the_trials_run(
    when: str, zygote: Zygote, plain_zygote: Zygote, trial: Running
) -> None:
    answer = (zygote if when == "early" else plain_zygote).run(LOG, trial)
    assert answer["failed"] == ""
    assert (answer["resolved"], answer["result"]) == (1, trial.run_id)
    run = trial.finish()
    assert run.data.metrics == {"mine": 0.25, "accuracy": 0.5}
    assert run.data.params["own"] == "yes"
    assert run.data.params["optimizer.lr"] == "0.01"
    assert run.data.tags["color"] == "blue"
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    assert (folder / "note.txt").read_text() == "hello"
    assert (folder / "folder/text.txt").read_text() == "text"
    assert run.info.status == "FINISHED"
    assert all_runs(trial) == []


def test_functions_imported_before_the_fork_do_the_same(zygote: Zygote, trial: Running) -> None:
    case = (
        "import __main__\n"
        "with __main__.start_run() as run:\n    __main__.log_metric('a', 1)\n    result = run.info.run_id\n"
    )
    assert zygote.run(case, trial)["result"] == trial.run_id
    assert trial.run().data.metrics == {"a": 1.0}
    assert all_runs(trial) == []


def test_starting_a_run_again_and_again_resumes_the_trials(zygote: Zygote, trial: Running) -> None:
    case = (
        "import mlflow\nresult = []\n"
        "mlflow.log_metric('a', 1)\nmlflow.end_run()\n"
        "for step in range(3):\n"
        "    with mlflow.start_run(run_name='mine') as run:\n"
        "        mlflow.log_metric('b', step, step=step)\n        result.append(run.info.run_id)\n"
        "mlflow.log_metric('c', 3)\n"
    )
    answer = zygote.run(case, trial)
    assert answer["result"] == [trial.run_id] * 3
    assert answer["resolved"] == 1
    assert trial.run().data.metrics == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert all_runs(trial) == []


def test_threads_of_a_task_log_to_the_same_run(zygote: Zygote, trial: Running) -> None:
    case = (
        "import mlflow, threading\n"
        "threads = [threading.Thread(target=mlflow.log_metric, args=(f'm{i}', i)) for i in range(3)]\n"
        "[thread.start() for thread in threads]\n[thread.join() for thread in threads]\n"
    )
    assert zygote.run(case, trial)["failed"] == ""
    assert trial.run().data.metrics == {"m0": 0.0, "m1": 1.0, "m2": 2.0}
    assert all_runs(trial) == []


@pytest.mark.parametrize("outer", [True, False])
def test_nested_runs_are_children_of_the_trials_run(outer: bool, zygote: Zygote, trial: Running) -> None:
    case = (
        "import mlflow, contextlib\n"
        f"with (mlflow.start_run() if {outer} else contextlib.nullcontext()):\n"
        "    for fold in range(2):\n"
        "        with mlflow.start_run(nested=True, run_name=f'fold{fold}'):\n"
        "            mlflow.log_param('fold', fold)\n"
        "mlflow.log_metric('after', 1)\n"
    )
    assert zygote.run(case, trial)["failed"] == ""
    children = sorted(all_runs(trial), key=lambda run: run.data.params["fold"])
    assert [run.data.tags["mlflow.runName"] for run in children] == ["fold0", "fold1"]
    for run in children:
        assert run.data.tags["mlflow.parentRunId"] == trial.run_id
        assert run.info.experiment_id == trial.experiment_id
        assert run.info.status == "FINISHED"
    assert trial.run().data.metrics == {"after": 1.0}
    assert "fold" not in trial.run().data.params


def test_an_applications_own_uri_and_experiment_do_not_lead_it_elsewhere(
    zygote: Zygote, trial: Running
) -> None:
    elsewhere = f"sqlite:///{zygote.folder}/elsewhere.db"
    shutil.copy(trial.uri.removeprefix("sqlite:///"), zygote.folder / "elsewhere.db")
    case = (
        f"import mlflow\nmlflow.set_tracking_uri({elsewhere!r})\nmlflow.set_experiment('own')\n"
        "with mlflow.start_run(run_name='x') as run:\n    mlflow.log_metric('a', 1)\n    result = run.info.run_id\n"
    )
    answer = zygote.run(case, trial)
    assert (answer["failed"], answer["result"]) == ("", trial.run_id)
    assert trial.run().data.metrics == {"a": 1.0}


AUTOLOG = """
import mlflow
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
mlflow.sklearn.autolog(log_models=False)
X, y = load_iris(return_X_y=True)
LogisticRegression(C=0.5, max_iter=300).fit(X, y)
mlflow.log_metric("later", 1.0)
"""


def test_autolog_logs_to_the_trials_run(zygote: Zygote, trial: Running) -> None:
    answer = zygote.run(AUTOLOG, trial)
    assert (answer["failed"], answer["resolved"]) == ("", 1)
    run = trial.finish()
    assert run.data.params["C"] == "0.5"
    assert run.data.params["max_iter"] == "300"
    assert run.data.metrics["training_accuracy_score"] > 0.9
    assert run.data.metrics["later"] == 1.0
    assert run.info.status == "FINISHED"
    assert all_runs(trial) == []


def test_models_are_logged_to_the_trials_run(zygote: Zygote, trial: Running) -> None:
    case = (
        "import mlflow\nfrom sklearn.linear_model import LogisticRegression\n"
        "model = LogisticRegression().fit([[0.0], [1.0]], [0, 1])\n"
        "options = {'pip_requirements': ['scikit-learn'], 'serialization_format': 'cloudpickle'}\n"
        "result = mlflow.sklearn.log_model(model, name='model', **options).model_id\n"
        "with mlflow.start_run():\n    mlflow.log_metric('a', 1)\n"
    )
    answer = zygote.run(case, trial)
    assert answer["failed"] == ""
    outputs = trial.run().outputs
    assert [model.model_id for model in outputs.model_outputs] == [answer["result"]]
    assert answer["resolved"] == 1
    assert all_runs(trial) == []


def test_the_task_cannot_spoil_the_final_status(zygote: Zygote, trial: Running) -> None:
    case = "import mlflow\nmlflow.start_run()\nmlflow.end_run('KILLED')\nmlflow.log_metric('a', 1)\n"
    case += "raise ValueError('no')\n"
    assert "ValueError: no" in zygote.run(case, trial)["failed"]
    assert trial.run().info.status == "RUNNING"  # left to the tracker: nothing is ended at exit
    assert trial.finish().info.status == "FINISHED"


def test_nested_runs_left_open_are_ended_with_the_task(zygote: Zygote, trial: Running) -> None:
    case = "import mlflow\nmlflow.start_run()\nmlflow.start_run(nested=True)\nraise ValueError\n"
    zygote.run(case, trial)
    assert [run.info.status for run in all_runs(trial)] == ["FAILED"]


def test_a_run_named_by_its_id_is_left_alone(zygote: Zygote, trial: Running) -> None:
    import mlflow

    other = mlflow.MlflowClient(trial.uri).create_run(trial.experiment_id)
    case = f"import mlflow\nwith mlflow.start_run(run_id={other.info.run_id!r}):\n    mlflow.log_metric('a', 1)\n"
    answer = zygote.run(case, trial)
    assert (answer["failed"], answer["resolved"]) == ("", 0)
    assert trial.run().data.metrics == {}
    assert [run.data.metrics for run in all_runs(trial)] == [{"a": 1.0}]


def test_what_is_logged_asynchronously_is_there_when_the_trial_ends(zygote: Zygote, trial: Running) -> None:
    case = "import mlflow\nfor step in range(50):\n    mlflow.log_metric('a', step, step=step, synchronous=False)\n"
    case += "at_once = True\n"  # nothing is done at exit
    assert zygote.run(case, trial)["failed"] == ""
    assert trial.run().data.metrics == {"a": 49.0}


def test_an_unreachable_tracker_is_an_error_of_the_call_that_needs_it(zygote: Zygote, trial: Running) -> None:
    case = (
        "from repro_sweep.tracking import inside\n"
        "def fail():\n    raise RuntimeError('MLflow is down')\n"
        "inside._installed._resolve = fail\n"
        "import mlflow\nmlflow.log_metric('a', 1)\n"
    )
    assert "RuntimeError: MLflow is down" in zygote.run(case, trial)["failed"]


def test_the_childs_connections_are_its_own(zygote: Zygote, trial: Running) -> None:
    """Many children of one zygote with an open engine, one after another, and the zygote's own still works."""
    for number in range(3):
        assert (
            zygote.run(f"import mlflow\nmlflow.log_metric('a', {number}, step={number})", trial)["failed"]
            == ""
        )
    assert trial.run().data.metrics == {"a": 2.0}
    case = (
        "from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore\n"
        "from repro_sweep.tracking import inside\n"
        "engines = list(SqlAlchemyStore._engine_map.values())\n"
        "result = [len(engines), len(inside._inherited) >= 1, all(e.pool not in inside._inherited for e in engines)]\n"
    )
    assert zygote.run(case, trial)["result"] == [1, True, True]


@pytest.mark.slow
def test_it_works_the_same_with_a_real_server(zygote: Zygote, tmp_path: Path, server: str) -> None:
    trial = _running(tmp_path / "sweep", server)
    answer = zygote.run(f"{LOG}\nmlflow.end_run()\nmlflow.log_metric('again', 1)", trial)
    assert (answer["failed"], answer["resolved"]) == ("", 1)
    run = trial.finish()
    assert run.data.metrics == {"mine": 0.25, "again": 1.0, "accuracy": 0.5}
    assert run.info.status == "FINISHED"
