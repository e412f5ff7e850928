"""Counts what a sweep has come to, for displays and summaries: states, the best trial, failures, how busy slots are."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping

from repro_sweep.progress import Best, Failure, Meter, Progress
from repro_sweep.records import Outcome
from repro_sweep.states import Direction, FailureKind, TrialState
from repro_sweep.sweep import SweepSpec


class Tally:
    """Owned by the coordinator.

    Args:
        spec: the sweep's record.
        states: those of the sweep's trials.
        cancelled: those of the trials that have failed because the user has cancelled them.
    """

    def __init__(
        self, spec: SweepSpec, states: Mapping[int, TrialState], cancelled: Iterable[int] = ()
    ) -> None:
        self._spec = spec
        self._states = dict(states)
        self._counts = dict.fromkeys(TrialState, 0) | Counter(states.values())
        self._meter = Meter()
        self._best: Best | None = None
        self._failures: list[Failure] = []
        self._cancelled = {number for number in cancelled if states.get(number) is TrialState.FAIL}
        self._retried = 0
        self._longest_s: float | None = None

    def __contains__(self, number: int) -> bool:
        return number in self._states

    @property
    def too_many_failures(self) -> bool:
        """Whether more trials have failed than ``sweep.max_failures`` allows."""
        limit = self._spec.max_failures
        return limit is not None and len(self._failures) > limit

    def set_state(self, number: int, state: TrialState) -> None:
        """A trial has come to a state."""
        self._cancelled.discard(number)
        self._counts[self._states[number]] -= 1
        self._counts[state] += 1
        self._states[number] = state

    def cancel(self, number: int) -> None:
        """The user has cancelled a trial, and it does not run."""
        self.set_state(number, TrialState.FAIL)
        self._cancelled.add(number)

    def add(self, number: int) -> None:
        """There is a new trial, which waits."""
        self._states[number] = TrialState.WAITING
        self._counts[TrialState.WAITING] += 1

    def withdraw(self, number: int) -> None:
        """A trial is no part of the sweep any more."""
        self._counts[self._states.pop(number)] -= 1

    def measure(self, *, slots: int, running: int) -> None:
        """The number of slots, or of running trials, has changed."""
        self._meter.set(slots=slots, running=running)

    def ended(self, number: int, outcome: Outcome, *, again: bool, since: float, directory: str) -> None:
        """An attempt has ended that began at ``since`` (monotonic seconds)."""
        self.set_state(number, TrialState.WAITING if again else outcome.state)
        duration_s = time.monotonic() - since
        self._meter.finished(duration_s)
        if outcome.state is TrialState.COMPLETE:
            self.note_duration(duration_s)
        if again:
            self._retried += outcome.kind is not FailureKind.CANCELLED
        elif outcome.kind is FailureKind.CANCELLED:
            self._cancelled.add(number)
        elif outcome.state is TrialState.FAIL:
            kind = outcome.kind or FailureKind.EXCEPTION
            message = outcome.message or ""
            self._failures.append(Failure(trial=number, kind=kind, message=message, directory=directory))
        else:
            self.note_result(number, outcome.state, outcome.metrics)

    @property
    def longest_s(self) -> float:
        """How long a trial takes at most: the longest so far; before there is any, what the user expects."""
        if self._longest_s is None:
            return 60 * float(str(self._spec.executor.get("expected_trial_min") or 0.0))
        return self._longest_s

    def note_duration(self, duration_s: float) -> None:
        """A trial has completed after so many seconds."""
        self._longest_s = max(self._longest_s or 0.0, duration_s)

    def note_result(self, number: int, state: TrialState, metrics: Mapping[str, float]) -> None:
        """A trial has, or had already, a result."""
        value = metrics.get(self._spec.ranked_by)
        if value is None or not math.isfinite(value) or state is not TrialState.COMPLETE:
            return
        constraints = self._spec.search.constraints if self._spec.search is not None else ()
        if not all(each.violation(metrics.get(each.metric, math.nan)) <= 0 for each in constraints):
            return
        best = self._best
        larger = self._spec.direction is Direction.MAXIMIZE
        if best is None or (value > best.value if larger else value < best.value):
            self._best = Best(trial=number, value=value)

    def progress(
        self,
        *,
        slots: int,
        running: int,
        waiting: int,
        draining: bool,
        not_tracked: int,
        denied: str | None,
        paused: str | None,
        searching: bool = False,
        to_ask: int | None = None,
    ) -> Progress:
        """A picture of the sweep now; a search that goes on may ask for ``to_ask`` more trials, None for any number."""
        return Progress(
            name=self._spec.name,
            counts={**self._counts, TrialState.RUNNING: running},
            slots=slots,
            busy=self._meter.busy(),
            seconds_left=None
            if searching and to_ask is None
            else self._meter.seconds_left(waiting + running + (to_ask or 0)),
            elapsed_s=self._meter.elapsed_s(),
            best=self._best,
            failures=tuple(self._failures),
            draining=draining,
            not_tracked=not_tracked,
            denied=denied,
            retried=self._retried,
            cancelled=len(self._cancelled),
            paused=paused,
            searching=searching,
            planned=None if to_ask is None else len(self._states) + to_ask,
        )
