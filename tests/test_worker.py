"""What makes a trial cheap cannot be seen in it; what differs between two runs of a sweep can."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import MakeProject, a_spec
from omegaconf import DictConfig, OmegaConf

from repro_sweep.states import Direction, FailureKind, TrialState
from repro_sweep.sweep import Budget, Chosen, Constraint, Objective, SearchSpec, SpaceSpec
from repro_sweep.worker.logs import JobLogging
from repro_sweep.worker.returned import final_metrics

CONFIG = """
defaults: [_self_]
x: 1
epochs: 1
"""
SWEEP = """
defaults: [base_sweep, sampler: grid, executor: local, _self_]
task: job.train
metric: score
params: {x: "1,2"}
repeats: {+seed: range(2)}
"""
TASK = """
def train(cfg):
    if cfg.x == 4:
        raise ValueError("caf\u00e9 \u2713 \U0001f3d6")
    if cfg.x == 3:
        raise ValueError("cannot read " + b"caf\\xe9".decode("utf-8", "surrogateescape"))
    return {"score": cfg.x * cfg.epochs}
"""


def hydra_node(folder: Path, **job_logging: Any) -> DictConfig:
    """A hydra node as job logging needs it, with Hydra's default job logging unless told otherwise."""
    default = {
        "version": 1,
        "formatters": {"simple": {"format": "%(levelname)s %(message)s"}},
        "handlers": {
            "file": {
                "class": "logging.FileHandler",
                "formatter": "simple",
                "filename": "${hydra.runtime.output_dir}/${hydra.job.name}.log",
            }
        },
        "root": {"level": "INFO", "handlers": ["file"]},
        "disable_existing_loggers": False,
    }
    node = {
        "job_logging": {**default, **job_logging},
        "job": {"name": "job"},
        "runtime": {"output_dir": str(folder)},
        "verbose": False,
    }
    return OmegaConf.create({"hydra": node}).hydra  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_job_logging_that_was_prepared_writes_to_the_trial_s_own_file(tmp_path: Path) -> None:
    prepared = JobLogging()
    handlers = logging.root.handlers[:]
    prepared.prepare(hydra_node(tmp_path / "nowhere"))
    assert logging.root.handlers == []
    assert handlers != []
    prepared.enter(hydra_node(tmp_path))
    logging.getLogger("task").info("hello")
    assert (tmp_path / "job.log").read_text() == "INFO hello\n"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "other",
    [
        {"loggers": {"task": {"level": "ERROR"}}},
        {"root": {"level": "${oc.env:NO_SUCH_LEVEL,INFO}", "handlers": ["file"]}},
        {"formatters": {"simple": {"format": "other %(message)s"}}},
    ],
    ids=["loggers", "resolver", "not the prepared one"],
)
def test_any_other_job_logging_is_made_in_the_trial(tmp_path: Path, other: dict[str, Any]) -> None:
    prepared = JobLogging()
    prepared.prepare(hydra_node(tmp_path / "nowhere"))
    if "formatters" not in other:
        prepared.prepare(hydra_node(tmp_path / "nowhere", **other))
    prepared.enter(hydra_node(tmp_path, **other))
    logging.getLogger("task").error("hello")
    logging.getLogger("fresh").error("again")
    assert (tmp_path / "job.log").read_text().splitlines()[-1].endswith("again")
    assert not (tmp_path / "nowhere").exists()


def test_a_process_whose_memory_was_settled_works_on_and_so_does_its_fork() -> None:
    code = (
        "import os\n"
        "from repro_sweep.worker import memory\n"
        "data = [str(number) * 50 for number in range(200_000)]\n"
        "assert memory._anonymous_mappings()\n"
        "memory.settle()\n"
        "pid = os.fork()\n"
        "assert sum(map(len, data)) == sum(len(str(number)) * 50 for number in range(200_000))\n"
        "if pid == 0: os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_the_same_command_with_another_override_is_not_averaged_with_the_first(
    make_project: MakeProject,
) -> None:
    project = make_project({"conf/config.yaml": CONFIG, "conf/sweep/twice.yaml": SWEEP, "job.py": TASK})
    first = project.run("+sweep=twice")
    assert first.returncode == 0, first.stderr
    second = project.run("+sweep=twice", "epochs=10")
    assert second.returncode == 0, second.stderr
    head, *rows = [line for line in second.stdout.splitlines() if line[:1].isdigit() or line[:1] == "#"]
    assert head.split() == ["#", "x", "epochs", "score", "n", "trials"]
    assert [(row.split()[-1], float(row.split()[-5])) for row in rows] == [
        ("6,7", 20.0),
        ("4,5", 10.0),
        ("2,3", 2.0),
        ("0,1", 1.0),
    ]


def test_a_failed_trial_that_is_no_part_of_the_sweep_any_more_is_left_alone(
    make_project: MakeProject,
) -> None:
    project = make_project({"conf/config.yaml": CONFIG, "conf/sweep/twice.yaml": SWEEP, "job.py": TASK})
    assert project.run("+sweep=twice", "x=3,1").returncode == 1
    again = project.run("+sweep=twice", "x=1,2")
    assert again.returncode == 0, again.stderr
    assert "twice: 4 complete;" in again.stdout
    states = [trial.state for trial in project.sweep("twice").trials]
    assert sorted(states) == [TrialState.COMPLETE] * 4 + [TrialState.FAIL] * 2


def test_a_loss_is_minimized_unless_the_sweep_says_otherwise(make_project: MakeProject) -> None:
    task = "def train(cfg):\n    return {'loss': cfg.x}\n"
    project = make_project({"conf/config.yaml": CONFIG, "conf/sweep/twice.yaml": SWEEP, "job.py": task})
    usual = project.run("+sweep=twice", "sweep.metric=loss")
    assert "by loss, minimize:" in usual.stdout, usual.stderr
    said = project.run("+sweep=twice", "sweep.metric=loss", "sweep.direction=maximize", "sweep.name=other")
    assert "by loss, maximize:" in said.stdout, said.stderr


def test_an_error_text_that_no_json_can_hold_is_recorded_all_the_same(make_project: MakeProject) -> None:
    project = make_project({"conf/config.yaml": CONFIG, "conf/sweep/twice.yaml": SWEEP, "job.py": TASK})
    done = project.run("+sweep=twice", "x=3,1", "sweep.name=odd")
    assert done.returncode == 1, done.stderr
    sweep = project.sweep("odd")
    failed = [trial for trial in sweep.trials if trial.state is TrialState.FAIL]
    assert len(failed) == 2
    attempt = sweep.last_attempt(failed[0])
    assert attempt.kind is FailureKind.EXCEPTION
    assert attempt.message == "ValueError: cannot read caf\\udce9"
    assert len(sweep.trials) == 4


def test_a_message_in_any_script_arrives_as_it_was(make_project: MakeProject) -> None:
    project = make_project({"conf/config.yaml": CONFIG, "conf/sweep/one.yaml": SWEEP, "job.py": TASK})
    result = project.run("+sweep=one", "x=4")
    assert result.returncode == 1, result.stderr
    messages = {attempt.message for attempt in project.sweep("one").attempts}
    assert messages == {"ValueError: caf\u00e9 \u2713 \U0001f3d6"}


# --- what a task returns -------------------------------------------------------------------------------------

ONE: dict[str, Any] = {}
UNNAMED: dict[str, Any] = {"metric": None}
TWO: dict[str, Any] = {
    "metric": "accuracy",
    "objectives": (
        Objective(metric="accuracy", direction=Direction.MAXIMIZE),
        Objective(metric="latency", direction=Direction.MINIMIZE),
    ),
}
CONSTRAINED: dict[str, Any] = {
    "search": SearchSpec(
        sampler=Chosen(name="tpe"), seed=0, space=SpaceSpec(), budget=Budget(),
        constraints=(Constraint(metric="size", operator="<=", bound=10),),
    )
}  # fmt: skip


@pytest.mark.parametrize(
    ("sweep", "value", "reported", "metrics"),
    [
        (ONE, 0.5, {}, {"score": 0.5}),
        (ONE, [0.5], {}, {"score": 0.5}),
        (ONE, OmegaConf.create([0.5]), {"score": 0.1}, {"score": 0.5}),
        (UNNAMED, [0.5], {}, {"objective": 0.5}),
        (UNNAMED, [0.5, 1.0], {}, {}),
        (UNNAMED, None, {}, {}),
        (TWO, (0.5, 2), {}, {"accuracy": 0.5, "latency": 2}),
        (TWO, [2, 0.5], {"latency": 9, "loss": 1}, {"accuracy": 2, "latency": 0.5, "loss": 1}),
        (TWO, {"latency": 2, "accuracy": 0.5, "note": "x"}, {}, {"accuracy": 0.5, "latency": 2}),
        (TWO, {"accuracy": 0.5}, {"latency": 2}, {"accuracy": 0.5, "latency": 2}),
        (TWO, None, {"latency": 2, "accuracy": 0.5}, {"accuracy": 0.5, "latency": 2}),
        (CONSTRAINED, {"score": 1, "size": 20}, {}, {"score": 1, "size": 20}),
        (CONSTRAINED, 1.0, {"size": 20}, {"score": 1, "size": 20}),
    ],
)
def test_what_a_task_returns_and_reports_becomes_its_final_metrics(
    tmp_path: Path,
    sweep: dict[str, Any],
    value: object,
    reported: dict[str, float],
    metrics: dict[str, float],
) -> None:
    assert final_metrics(value, reported, a_spec(tmp_path, **sweep)) == {"metrics": metrics}


@pytest.mark.parametrize(
    ("sweep", "value", "message", "missing"),
    [
        (ONE, [1.0, 2.0], "sweep.metric: the task must return 1 number (score), got 2", True),
        (ONE, [], "sweep.metric: the task must return 1 number (score), got 0", True),
        (ONE, ["a"], "returned metric 'score' must be a number, got str", False),
        (TWO, (1.0,), "sweep.metric: the task must return 2 numbers (accuracy, latency), got 1", True),
        (TWO, 1.0, "sweep.metric: the task must return 2 numbers (accuracy, latency), got float", True),
        (TWO, {"accuracy": 1.0}, "sweep.metric: the task does not return 'latency' (accuracy)", True),
        (TWO, None, "sweep.metric: the task does not return 'accuracy' (nothing)", True),
        (TWO, (1.0, float("nan")), "metric 'latency' is NaN", False),
        (TWO, (1.0, "fast"), "returned metric 'latency' must be a number, got str", False),
        (CONSTRAINED, 1.0, "sweep.constraints: the task does not return 'size' (score)", True),
        (CONSTRAINED, {"size": 1.0}, "sweep.metric: the task does not return 'score' (size)", True),
        (CONSTRAINED, {"score": 1, "size": float("nan")}, "metric 'size' is NaN", False),
        (CONSTRAINED, {"score": 1, "size": "L"}, "returned metric 'size' must be a number, got str", False),
    ],
)
def test_what_the_sweep_needs_and_the_task_does_not_return_is_said_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sweep: dict[str, Any],
    value: object,
    message: str,
    missing: bool,
) -> None:
    result = final_metrics(value, {}, a_spec(tmp_path, **sweep))
    assert (result["state"], result["kind"]) == (TrialState.FAIL, FailureKind.INVALID_METRIC)
    assert (result["message"], result.get("missing", False)) == (message, missing)
    assert capsys.readouterr().err == f"repro-sweep: {message}\n"
