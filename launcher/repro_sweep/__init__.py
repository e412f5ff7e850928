"""repro-sweep: a distributed sweep launcher for Hydra applications.

In a task function: :func:`report`, :func:`artifact_dir`, :func:`checkpoint_dir`, :class:`TrialPruned`,
:class:`TrialInterrupted`; :func:`seed`, :func:`generator` and :func:`worker_init_fn` for random numbers.
Afterwards, on any machine that sees the MLflow server: :func:`best_trial`, :func:`leaderboard`, :func:`pareto_front`,
:func:`trials`.
All of them are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repro_sweep.errors import ReproSweepError, TrialInterrupted, TrialPruned
    from repro_sweep.ranking import Reproduction, Trial, best_trial, leaderboard, pareto_front, trials
    from repro_sweep.states import TrialState, Verdict
    from repro_sweep.worker.seeding import worker_init_fn
    from repro_sweep.worker.trial import artifact_dir, checkpoint_dir, generator, report, seed

__all__ = [
    "ReproSweepError",
    "Reproduction",
    "Trial",
    "TrialInterrupted",
    "TrialPruned",
    "TrialState",
    "Verdict",
    "artifact_dir",
    "best_trial",
    "checkpoint_dir",
    "generator",
    "leaderboard",
    "pareto_front",
    "report",
    "seed",
    "trials",
    "worker_init_fn",
]

_HOMES = {
    "repro_sweep.errors": ("ReproSweepError", "TrialInterrupted", "TrialPruned"),
    "repro_sweep.ranking": ("Reproduction", "Trial", "best_trial", "leaderboard", "pareto_front", "trials"),
    "repro_sweep.states": ("TrialState", "Verdict"),
    "repro_sweep.worker.seeding": ("worker_init_fn",),
    "repro_sweep.worker.trial": ("artifact_dir", "checkpoint_dir", "generator", "report", "seed"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'repro_sweep' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
