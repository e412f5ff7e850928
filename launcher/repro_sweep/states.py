"""The states of a trial and the kinds of failure of an attempt.

A *trial* is one point of the space; an *attempt* is one execution of it. The names of the states are
Optuna's. Nothing in the project uses a bare string where one of these is meant.
"""

from __future__ import annotations

from enum import StrEnum


class TrialState(StrEnum):
    """Where a trial stands."""

    WAITING = "WAITING"
    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAIL = "FAIL"

    def is_finished(self) -> bool:
        """Whether no attempt of the trial is running or waiting."""
        return self in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

    def is_done(self) -> bool:
        """Whether the trial has its result and must never be executed again."""
        return self in (TrialState.COMPLETE, TrialState.PRUNED)


class FailureKind(StrEnum):
    """Why an attempt failed."""

    EXCEPTION = "EXCEPTION"
    INVALID_METRIC = "INVALID_METRIC"
    DRIFT = "DRIFT"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    GPU_OUT_OF_MEMORY = "GPU_OUT_OF_MEMORY"
    CRASH = "CRASH"
    TIMEOUT = "TIMEOUT"
    STALLED = "STALLED"
    PREEMPTED = "PREEMPTED"
    NODE_LOST = "NODE_LOST"
    CANCELLED = "CANCELLED"


class Direction(StrEnum):
    """Whether a larger or a smaller value of the metric is better."""

    MAXIMIZE = "maximize"
    MINIMIZE = "minimize"


class StepKind(StrEnum):
    """What happens in a search (see ``records.Step``)."""

    BEGIN = "BEGIN"
    ASK = "ASK"
    MORE = "MORE"
    TELL = "TELL"


class Verdict(StrEnum):
    """Whether a trial came out the same when it was run again."""

    EXACT = "EXACT"
    WITHIN_TOLERANCE = "WITHIN TOLERANCE"
    DIFFERS = "DIFFERS"
    UNVERIFIABLE = "UNVERIFIABLE"
