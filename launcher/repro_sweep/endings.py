"""What the end of an attempt means for its trial: decided from the ledger, in one change with its record."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from repro_sweep import retries
from repro_sweep.ledger import Ledger
from repro_sweep.records import NewReport, Outcome
from repro_sweep.states import FailureKind, StepKind, TrialState
from repro_sweep.sweep import SweepSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What the ledger made of the end of an attempt.

    ``accepted`` is False for an attempt that had ended before, otherwise; its result counts for nothing. ``again``: the
    trial waits for another attempt, with nothing beside it if ``alone``. ``step`` is where a search has recorded it, 0
    where none has.
    """

    accepted: bool
    outcome: Outcome
    again: bool = False
    alone: bool = False
    step: int = 0


def record(
    ledger: Ledger,
    spec: SweepSpec,
    attempt: str,
    outcome: Outcome,
    reports: list[NewReport],
    *,
    stopping: bool,
) -> Ending:
    """Record an attempt's last reports and its end; part of the ledger's open change.

    ``stopping``: the coordinator has stopped its workers.
    """
    found = ledger.standing(attempt)
    if found is None:
        return Ending(accepted=False, outcome=outcome)
    if found.state is not TrialState.RUNNING:
        if found.ended_at == outcome.ended_at:
            return Ending(accepted=True, outcome=outcome)  # the same message again
        ledger.note(attempt, f"its result ({outcome.state}) came too late and was refused")
        log.warning("attempt %s had ended before: its result was refused", attempt)
        return Ending(accepted=False, outcome=outcome)
    of_user = outcome.state is TrialState.FAIL and found.cancelled
    outcome = _attributed(outcome, of_user=of_user, stopping=stopping)
    past = _past(ledger, found.trial) if outcome.kind is not None else []
    if of_user:
        again = False
    elif outcome.kind is FailureKind.CANCELLED:
        again = True
    else:
        again = retries.tries_again(spec.limits.retries, outcome.kind, past)
    if reports:
        ledger.add_reports(attempt, reports)
    ledger.finish_attempt(attempt, outcome, again=again, cancelled=of_user)
    step = 0 if again else tell(ledger, spec, found.trial, outcome.state, outcome.metrics)
    return Ending(
        accepted=True, outcome=outcome, again=again, alone=_needs_room([*past, outcome.kind]), step=step
    )


def tell(
    ledger: Ledger, spec: SweepSpec, number: int, state: TrialState, metrics: Mapping[str, float]
) -> int:
    """Record what a sampler or pruner learns of a trial's end, in the same change; returns the step, 0 without one."""
    if spec.search is None and spec.pruner is None:
        return 0
    return ledger.add_step(StepKind.TELL, {"trial": number, "state": state, "metrics": dict(metrics)})


def _attributed(outcome: Outcome, *, of_user: bool, stopping: bool) -> Outcome:
    """A worker only knows that it was told to stop: by the user, or by something else, such as its cluster."""
    if of_user:
        return replace(outcome, kind=FailureKind.CANCELLED)
    if outcome.kind is FailureKind.CANCELLED and not stopping:
        return replace(outcome, kind=FailureKind.PREEMPTED)
    return outcome


def must_be_alone(ledger: Ledger, number: int) -> bool:
    """Whether a waiting trial has run out of memory and is to have its GPU for itself."""
    return _needs_room(_past(ledger, number))


def _past(ledger: Ledger, number: int) -> list[FailureKind]:
    return retries.past_failures(ledger.trial(number), ledger.attempts(number))


def _needs_room(failures: Sequence[FailureKind | None]) -> bool:
    return any(kind in retries.ALONE for kind in failures)
