"""Whether a trial is tried again after a failure. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from repro_sweep.records import Attempt, Trial
from repro_sweep.states import FailureKind

ALONE = frozenset({FailureKind.OUT_OF_MEMORY, FailureKind.GPU_OUT_OF_MEMORY})
"""After these a trial is tried again with nothing beside it: on its GPU, or on its worker where it has none."""


def tries_again(
    policy: Mapping[FailureKind, int | None], kind: FailureKind | None, past: Sequence[FailureKind]
) -> bool:
    """Whether an attempt that failed as ``kind`` is followed by another.

    Args:
        policy: how many more attempts a trial gets after each kind, None for as many as it needs; a kind that it does
            not name gets none.
        kind: of the latest failure.
        past: those of the trial's earlier attempts that count.
    """
    if kind is None:
        return False
    limit = policy.get(kind, 0)
    return limit is None or sum(each is kind for each in past) < limit


def past_failures(trial: Trial, attempts: Sequence[Attempt]) -> list[FailureKind]:
    """The failures that count for a trial's retries: those since the user last started it."""
    counting = [attempt for attempt in attempts if attempt.ordinal >= trial.retries_from]
    return [attempt.kind for attempt in counting if attempt.kind is not None]
