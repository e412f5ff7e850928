"""hydra-optuna-sweeper with Hydra's joblib launcher, in a virtual environment of its own, as it pins Optuna 2."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks import harness, peers

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


def python(cache: Path) -> Path:
    """The interpreter of its environment."""
    return peers.python(cache, "optuna-sweeper", PACKAGES)


def command(project: harness.Project, *, trials: int, slots: int, params: Mapping[str, str]) -> list[str]:
    """What runs a search over the project's task; batches are as large as there are slots."""
    conf = _CONF.format(trials=trials, slots=slots, params=json.dumps(dict(params)))
    (project.folder / "conf/optuna_sweeper.yaml").write_text(conf, encoding="utf-8")
    (project.folder / "app_of_optuna_sweeper.py").write_text(_APP, encoding="utf-8")
    return ["app_of_optuna_sweeper.py", "--multirun"]
