"""The parts of a worker that make a trial cheap change nothing that a trial can see."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeProject
from omegaconf import DictConfig, OmegaConf

from repro_sweep.states import FailureKind, TrialState
from repro_sweep.worker.logs import JobLogging

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
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_same_command_with_another_override_is_not_averaged_with_the_first(
    make_project: MakeProject,
) -> None:
    project = make_project({"conf/config.yaml": CONFIG, "conf/sweep/twice.yaml": SWEEP, "job.py": TASK})
    first = project.run("+sweep=twice")
    assert first.returncode == 0, first.stderr
    second = project.run("+sweep=twice", "epochs=10")
    assert second.returncode == 0, second.stderr
    rows = [line.split() for line in second.stdout.splitlines() if line[:1].isdigit()]
    assert [(row[2], row[5]) for row in rows] == [
        ("20.0000", "2"),
        ("10.0000", "2"),
        ("2.0000", "2"),
        ("1.0000", "2"),
    ]


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
