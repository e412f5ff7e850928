"""Keeps as many workers alive as there is work for, and sees which have ended."""

from __future__ import annotations

from collections import Counter

from repro_sweep.errors import SweepError
from repro_sweep.executors.base import Executor, WorkerState
from repro_sweep.failpoints import failpoint
from repro_sweep.sweep import SweepSpec

_FRUITLESS_WORKERS = 3
_KILLED_WORKERS = 20


class Crew:
    """A sweep's workers as its executor sees them. Owned by the coordinator."""

    def __init__(self, spec: SweepSpec, executor: Executor) -> None:
        self._spec = spec
        self._executor = executor
        self._fruitless: Counter[bool] = Counter()
        self._killed = False

    def was_fruitful(self) -> None:
        """A trial has ended by itself: what workers need is there."""
        self._fruitless.clear()

    def knows(self, worker: str) -> bool:
        """Whether a worker is one that is wanted: one that the executor has started, now or earlier."""
        return worker in self._executor.poll()

    def missing(self, trials: int) -> int:
        """How many workers are missing for so many trials.

        Raises:
            SweepError: workers end again and again without finishing a trial.
        """
        statuses = self._executor.poll()
        alive = sum(status.state is WorkerState.ALIVE for status in statuses.values())
        missing = self._executor.wanted(trials) - alive
        if missing <= 0:
            return 0
        ended = [status.detail for status in statuses.values() if status.detail]
        killed = self._killed = bool(ended) and ended[-1].startswith("killed by")  # perhaps an accident
        fruitless = self._fruitless[killed]
        if fruitless >= (_KILLED_WORKERS if killed else _FRUITLESS_WORKERS):
            raise SweepError(
                f"sweep/executor={self._spec.executor_name}: {fruitless} workers in a row ended without"
                f" finishing a trial (the last: {ended[-1] if ended else 'unknown'});"
                f" see {self._spec.directory}/workers/*/worker.log"
            )
        return missing

    def start(self, count: int) -> None:
        """Start workers.

        Raises:
            SweepError: they cannot be started.
        """
        failpoint("workers.before_start")
        self._executor.start(count)
        failpoint("workers.started")
        self._fruitless[self._killed] += 1

    def ended(self) -> dict[str, str]:
        """The workers that have ended, and how."""
        statuses = self._executor.poll().items()
        return {
            name: status.detail or "ended" for name, status in statuses if status.state is WorkerState.ENDED
        }

    def stop(self, worker: str) -> None:
        """End one worker, if it is ours to end."""
        if worker in self._executor.poll():
            self._executor.stop([worker])

    def stop_all(self) -> None:
        """End all workers."""
        self._executor.stop(self._executor.poll())
