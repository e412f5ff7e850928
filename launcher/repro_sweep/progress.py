"""A sweep's progress in numbers: what displays show and what tests assert."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from repro_sweep.states import FailureKind, TrialState


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The trial with the best value of the metric so far."""

    trial: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A failed trial, with the directory that has its log."""

    trial: int
    kind: FailureKind
    message: str
    directory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A picture of a sweep.

    ``counts`` has cancelled trials among the failed ones. ``busy`` is the share of slot time in use since the first
    start, from 0 to 1. ``paused`` says why nothing is handed out now; ``retried`` counts the attempts that were made
    again. ``denied``: which MLflow server takes nothing from this user, and why. ``searching``: a search goes on, and
    may come to ``planned`` trials in all (None: nobody knows).
    """

    name: str
    counts: Mapping[TrialState, int]
    slots: int
    busy: float
    seconds_left: float | None
    elapsed_s: float
    best: Best | None
    failures: tuple[Failure, ...]
    draining: bool
    not_tracked: int
    retried: int = 0
    cancelled: int = 0
    paused: str | None = None
    searching: bool = False
    planned: int | None = None
    denied: str | None = None


class Meter:
    """Measures how busy the slots are, from the first trial's start to the last one's end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: float | None = None
        self._since = 0.0
        self._slots = 0
        self._running = 0
        self._offered = 0.0
        self._used = 0.0
        self._last_end = (0.0, 0.0, 0.0)
        self._durations = 0.0
        self._finished = 0

    def set(self, *, slots: int, running: int) -> None:
        """The number of slots or of running trials has changed."""
        now = self._clock()
        if self._first is None and running > 0:
            self._first = self._since = now
        self._advance(now)
        if running < self._running:
            self._last_end = (now, self._offered, self._used)
        self._slots, self._running = slots, running

    def finished(self, duration_s: float) -> None:
        """A trial has ended after so many seconds."""
        self._durations += duration_s
        self._finished += 1

    def busy(self) -> float:
        """Share of the slots' time that trials used, up to the last end if none is running."""
        if self._running > 0:
            self._advance(self._clock())
            offered, used = self._offered, self._used
        else:
            _, offered, used = self._last_end
        return used / offered if offered > 0 else 0.0

    def elapsed_s(self) -> float:
        """Seconds since the first start, up to the last end if none is running."""
        if self._first is None:
            return 0.0
        end = self._clock() if self._running > 0 else self._last_end[0]
        return max(0.0, end - self._first)

    def seconds_left(self, trials: int) -> float | None:
        """Expected seconds for so many more trials, from the mean duration so far; None before there is one."""
        if not self._finished or not self._slots:
            return None
        return trials * self._durations / self._finished / self._slots

    def _advance(self, now: float) -> None:
        if self._first is not None:
            self._offered += (now - self._since) * self._slots
            self._used += (now - self._since) * self._running
        self._since = now
