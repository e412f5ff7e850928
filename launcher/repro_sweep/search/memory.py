"""Optuna's study and storage in memory, with what an outside hand needs to steer them.

It may only be imported where a search is made: it needs Optuna at once.
"""

from __future__ import annotations

import copy

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from repro_sweep.search import samplers

_CONSTRAINTS = "constraints"


class Storage(optuna.storages.InMemoryStorage):
    """A storage whose finished trials can be opened again."""

    def reopen(self, trial_id: int) -> None:
        """A finished trial runs again, as if it had never ended.

        It keeps its number, parameters and reports, and what its sampler has noted there.
        """
        trial = copy.copy(self._get_trial(trial_id))
        trial.state = TrialState.RUNNING
        trial.values = None
        trial.datetime_complete = None
        trial.system_attrs = {
            key: value for key, value in trial.system_attrs.items() if not key.startswith(_CONSTRAINTS)
        }
        self._set_trial(trial_id, trial)

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """The best complete trial, the earliest of equals; the one that was remembered may have been opened again.

        Raises:
            ValueError: none is complete.
            RuntimeError: there are several objectives.
        """
        directions = self.get_study_directions(study_id)
        if len(directions) > 1:
            raise RuntimeError("there is no best trial of several objectives")
        complete = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.COMPLETE,))
        if not complete:
            raise ValueError("No trials are completed yet.")
        sign = -1.0 if directions[0] == StudyDirection.MAXIMIZE else 1.0
        return min(complete, key=lambda trial: sign * (trial.values or [float("nan")])[0])


class Study(optuna.Study):
    """A study that can be told to stop although nothing is being optimized: it remembers it."""

    stopped = False

    def stop(self) -> None:
        """There is nothing more to suggest."""
        self.stopped = True


def create(
    name: str, directions: list[str], pruner: optuna.pruners.BasePruner, sampler: optuna.samplers.BaseSampler
) -> tuple[Study, Storage]:
    """A new study in a storage of its own."""
    storage = Storage()
    with samplers.quiet():
        storage.create_new_study([StudyDirection[direction.upper()] for direction in directions], name)
    return Study(study_name=name, storage=storage, sampler=sampler, pruner=pruner), storage
