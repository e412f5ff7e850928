"""Keeps as many workers alive as there is work for, and sees which have ended."""

from __future__ import annotations

from collections import Counter

from repro_sweep.errors import SweepError
from repro_sweep.executors.base import GONE, Cause, Executor, WorkerState, WorkerStatus
from repro_sweep.failpoints import failpoint
from repro_sweep.sweep import SweepSpec

_FRUITLESS_WORKERS = 3
_KILLED_WORKERS = 20
_MANY = 1_000_000
_NO_FAULT = frozenset({Cause.EVICTED, Cause.LOST})


class WorkersCancelledError(SweepError):
    """The user has ended all workers behind the coordinator's back."""


class Crew:
    """A sweep's workers as its executor sees them. Owned by the coordinator."""

    def __init__(self, spec: SweepSpec, executor: Executor) -> None:
        self._spec = spec
        self._executor = executor
        self._fruitless: Counter[bool] = Counter()
        self._last: WorkerStatus | None = None

    def was_fruitful(self) -> None:
        """A trial has ended by itself: what workers need is there."""
        self._fruitless.clear()

    def knows(self, worker: str) -> bool:
        """Whether a worker is one that is wanted: one that the executor has started and that has not ended."""
        status = self._executor.poll().get(worker)
        return status is not None and status.state is not WorkerState.ENDED

    def missing(self, trials: int) -> int:
        """How many workers are missing for so many trials; those that the user has cancelled are not replaced.

        Raises:
            SweepError: workers end again and again without finishing a trial.
            WorkersCancelledError: the user has cancelled all of them.
        """
        statuses = self._executor.poll()
        ended = [status for status in statuses.values() if status.state in GONE]
        alive = len(statuses) - len(ended)
        cancelled = sum(status.cause is Cause.CANCELLED for status in ended)
        wanted = self._executor.wanted(trials)
        left = self._executor.wanted(_MANY) - cancelled
        missing = min(wanted, left) - alive
        if wanted > 0 and not alive and left <= 0:
            raise WorkersCancelledError(
                f"sweep/executor={self._spec.executor_name}: all of its workers were cancelled; nothing is lost:"
                f" 'repro-sweep resume {self._spec.name}' goes on"
            )
        if missing <= 0:
            return 0
        last = self._last = ended[-1] if ended else None
        if last is not None and last.cause in _NO_FAULT:
            return missing
        killed = last is not None and last.cause is Cause.KILLED  # perhaps an accident
        fruitless = self._fruitless[killed]
        if fruitless >= (_KILLED_WORKERS if killed else _FRUITLESS_WORKERS):
            raise SweepError(
                f"sweep/executor={self._spec.executor_name}: {fruitless} workers in a row ended without"
                f" finishing a trial (the last: {last.detail if last else 'unknown'});"
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
        if self._last is None or self._last.cause not in _NO_FAULT:
            self._fruitless[self._last is not None and self._last.cause is Cause.KILLED] += 1

    def absent(self) -> dict[str, WorkerStatus]:
        """The workers that have ended, stand still, or that nothing is known of."""
        statuses = self._executor.poll().items()
        return {name: status for name, status in statuses if status.state is not WorkerState.ALIVE}

    def stop(self, worker: str) -> None:
        """End one worker, if it is ours to end."""
        if worker in self._executor.poll():
            self._executor.stop([worker])

    def stop_all(self) -> None:
        """End all workers."""
        self._executor.stop(self._executor.poll())
