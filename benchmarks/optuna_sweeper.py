"""hydra-optuna-sweeper with Hydra's joblib launcher, in a virtual environment of its own, as it pins Optuna 2."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks import harness

# the newest that install and run together on Python 3.11
PACKAGES = (
    "hydra-optuna-sweeper==1.2.0",
    "hydra-joblib-launcher==1.2.0",
    "hydra-core==1.3.2",
    "joblib==1.6.0",
    "numpy==2.4.6",
    "optuna==2.10.1",
    "scipy==1.17.1",
    "sqlalchemy==1.4.54",
)
_APP = """\
from pathlib import Path

import hydra
from task import train


def run(cfg):
    return train(cfg)["value"]


run.__module__ = "app_of_optuna_sweeper"
hydra.main(version_base="1.3", config_path=str(Path(__file__).with_name("conf")), config_name="optuna_sweeper")(run)()
"""
_CONF = """\
defaults:
  - config
  - _self_
  - override hydra/sweeper: optuna
  - override hydra/sweeper/sampler: tpe
  - override hydra/launcher: joblib
hydra:
  sweep: {{dir: multirun/peer}}
  launcher: {{n_jobs: {slots}}}
  sweeper:
    n_jobs: {slots}
    n_trials: {trials}
    direction: minimize
    sampler: {{seed: 0}}
    params: {params}
"""
_TIMEOUT_S = 600.0


def python(cache: Path) -> Path:
    """The interpreter of the environment, which is made in ``cache`` if it is not there; needs a package index."""
    wanted = hashlib.sha256("\n".join((sys.version, *PACKAGES)).encode()).hexdigest()[:12]
    folder = cache / f"optuna-sweeper-{wanted}"
    interpreter, complete = folder / "bin/python", folder / "complete"
    if not complete.exists():
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        _run([str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES])
        complete.touch()
    return interpreter


def command(project: harness.Project, *, trials: int, slots: int, params: Mapping[str, str]) -> list[str]:
    """What runs a search over the project's task; batches are as large as there are slots."""
    conf = _CONF.format(trials=trials, slots=slots, params=json.dumps(dict(params)))
    (project.folder / "conf/optuna_sweeper.yaml").write_text(conf, encoding="utf-8")
    (project.folder / "app_of_optuna_sweeper.py").write_text(_APP, encoding="utf-8")
    return ["app_of_optuna_sweeper.py", "--multirun"]


def _run(command: list[str]) -> None:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise harness.BenchmarkError(f"{' '.join(command)}: not over in {_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        raise harness.BenchmarkError(f"{' '.join(command)}: status {done.returncode}\n{done.stderr[-3000:]}")
