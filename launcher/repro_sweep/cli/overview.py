"""Reads how a sweep is from its ledger, its directory and its coordinator; changes nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from repro_sweep import detached, host, spool
from repro_sweep.cli import contact, finding
from repro_sweep.cli.backlog import lacking
from repro_sweep.errors import ReproSweepError
from repro_sweep.exchange import LOG_NAME
from repro_sweep.lease import holder_of
from repro_sweep.ledger import Ledger
from repro_sweep.progress import Best
from repro_sweep.records import Attempt
from repro_sweep.states import Direction, FailureKind, TrialState
from repro_sweep.sweep import SweepSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinator:
    """Who the sweep's coordinator is, or was when it died: ``since`` is seconds UTC.

    ``answers``: it lives and does its work.
    """

    pid: int
    host: str
    since: float
    epoch: int
    alive: bool
    answers: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The job that a detached sweep's coordinator is or will be: ``state`` and ``reason`` are SLURM's own words."""

    id: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A running attempt; attempts count from 1, stamps are seconds UTC.

    ``worker`` is its worker's state where there is no coordinator to look after it: ``ALIVE``, ``ENDED``, or None where
    that cannot be told. ``ended``: it has ended, and its result waits on disk for a coordinator.
    """

    trial: int
    attempt: int
    host: str
    since: float
    step: int | None
    reported_at: float | None
    worker: str | None
    ended: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedAttempt:
    """An attempt that failed, whatever became of its trial; attempts count from 1."""

    trial: int
    attempt: int
    kind: FailureKind
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedTrial:
    """A trial that has failed, with its latest attempt's failure and its log."""

    trial: int
    kind: FailureKind
    message: str
    log: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """A sweep at one time.

    ``counts`` leaves out the trials in ``cancelled`` and ``withdrawn``. ``retries`` has the kinds of failure after
    which a trial is tried again, and how often (None: as often as it needs). ``results_on_disk`` wait for a
    coordinator. ``not_in_mlflow`` counts runs, None where that cannot be told now; ``mlflow_denies`` says that the
    server lets none in, and why. ``busy`` is a share from 0 to 1.
    """

    name: str
    directory: str
    finished: bool
    counts: Mapping[TrialState, int]
    cancelled: Sequence[int]
    withdrawn: Sequence[int]
    metric: str
    direction: Direction
    best: Best | None
    coordinator: Coordinator | None
    job: Job | None
    slots: int | None
    busy: float | None
    seconds_left: float | None
    draining: bool
    paused: str | None
    retries: Mapping[FailureKind, int | None]
    running: Sequence[Running]
    failed_attempts: Sequence[FailedAttempt]
    failed: Sequence[FailedTrial]
    results_on_disk: int
    mlflow: str
    not_in_mlflow: int | None
    mlflow_denies: str | None = None


def look(directory: Path) -> Overview:
    """See how a sweep is.

    Raises:
        LedgerError: its ledger cannot be read.
    """
    ledger = Ledger.open(directory, readonly=True)
    try:
        return _look(ledger, directory)
    finally:
        ledger.close()


def _look(ledger: Ledger, directory: Path) -> Overview:
    spec = ledger.spec
    holder = holder_of(ledger)
    alive = holder is not None and contact.is_alive(directory, holder)
    progress = contact.ask_progress(directory, holder) if holder is not None and alive else None
    attempts = ledger.attempts()
    cancelled, withdrawn = ledger.cancelled, ledger.withdrawn
    kept = {finish.attempt for finish in spool.results(directory)}
    coordinator = None
    if holder is not None:
        coordinator = Coordinator(
            pid=holder.pid, host=holder.host, since=holder.since, epoch=holder.epoch, alive=alive,
            answers=progress is not None,
        )  # fmt: skip
    job = detached.find(directory)
    return Overview(
        name=spec.name,
        directory=str(directory),
        finished=finding.is_finished(ledger),
        counts=counts(ledger),
        cancelled=sorted(cancelled),
        withdrawn=sorted(withdrawn - cancelled),
        metric=spec.ranked_by,
        direction=spec.direction,
        best=_best(spec, attempts),
        coordinator=coordinator,
        job=None if job is None else Job(id=job.id, state=job.state, reason=job.reason),
        slots=None if progress is None else progress.slots,
        busy=None if progress is None else progress.busy,
        seconds_left=None if progress is None else progress.seconds_left,
        draining=progress is not None and progress.draining,
        paused=None if progress is None else progress.paused,
        retries={kind: limit for kind, limit in spec.limits.retries.items() if limit != 0},
        running=_running(ledger, directory, kept, watched=progress is not None),
        failed_attempts=_failed_attempts(attempts),
        failed=failed_trials(ledger, directory),
        results_on_disk=len(kept),
        mlflow=spec.tracking.uri,
        not_in_mlflow=lacking(ledger) if progress is None else progress.not_tracked,
        mlflow_denies=None if progress is None else progress.denied,
    )


def counts(ledger: Ledger) -> dict[TrialState, int]:
    """How many trials are in each state, without those that were cancelled or are no part of the sweep any more."""
    apart = ledger.cancelled | ledger.withdrawn
    found = Counter(state for number, state in ledger.states() if number not in apart)
    return {state: found[state] for state in TrialState}


def failed_trials(ledger: Ledger, directory: Path) -> list[FailedTrial]:
    """The trials that have failed and were not cancelled, by number."""
    found = []
    for number in finding.failed(ledger):
        trial, attempts = ledger.trial(number), ledger.attempts(number)
        latest = next((each for each in reversed(attempts) if each.kind is not None), None)
        found.append(
            FailedTrial(
                trial=number,
                kind=FailureKind.EXCEPTION if latest is None or latest.kind is None else latest.kind,
                message="" if latest is None else latest.message or "",
                log=str(directory / trial.directory / LOG_NAME),
            )
        )
    return found


def _failed_attempts(attempts: Iterable[Attempt]) -> list[FailedAttempt]:
    return [
        FailedAttempt(trial=attempt.trial, attempt=attempt.ordinal + 1, kind=attempt.kind, host=attempt.host)
        for attempt in attempts
        if attempt.kind is not None
    ]


def _running(ledger: Ledger, directory: Path, kept: set[str], *, watched: bool) -> list[Running]:
    attempts = ledger.open_attempts()
    workers = {} if watched or not attempts else _workers(ledger.spec, attempts)
    heads = ledger.report_heads() if attempts else {}
    found = []
    for attempt in attempts:
        step, at = _last_report(ledger, directory, attempt, heads.get(attempt.trial, 0))
        running = Running(
            trial=attempt.trial, attempt=attempt.ordinal + 1, host=attempt.host, since=attempt.started_at,
            step=step, reported_at=at, worker=workers.get(attempt.worker), ended=attempt.id in kept,
        )  # fmt: skip
        found.append(running)
    return found


def _last_report(
    ledger: Ledger, directory: Path, attempt: Attempt, head: int
) -> tuple[int | None, float | None]:
    """Step and stamp of an attempt's last report, from the ledger or from its own record if that knows more."""
    found: tuple[int | None, float | None] = (None, None)
    if head:
        [latest] = ledger.reports(trial=attempt.trial, after=head - 1, limit=1)
        if latest.attempt == attempt.id:
            found = latest.step, latest.time
    own = spool.reports_of(directory / ledger.trial(attempt.trial).directory, attempt.id)
    return (own[-1].step, own[-1].time) if own and len(own) >= attempt.reports else found


def _workers(spec: SweepSpec, attempts: Iterable[Attempt]) -> dict[str, str]:
    """Whether the workers of attempts live, as far as the executor can tell from here."""
    from repro_sweep.executors import base as executors

    try:
        states = executors.create(spec).poll()
    except ReproSweepError:  # it belongs to another machine
        return {}
    here = host.name()
    ended = {attempt.worker: "ENDED" for attempt in attempts if attempt.host == here}
    return ended | {worker: str(status.state) for worker, status in states.items()}


def _best(spec: SweepSpec, attempts: Iterable[Attempt]) -> Best | None:
    values = {
        attempt.trial: attempt.metrics[spec.ranked_by]
        for attempt in attempts
        if attempt.state is TrialState.COMPLETE
        and math.isfinite(attempt.metrics.get(spec.ranked_by, math.nan))
    }
    if not values:
        return None
    sign = 1 if spec.direction is Direction.MINIMIZE else -1
    trial = min(values, key=lambda number: (sign * values[number], number))
    return Best(trial=trial, value=values[trial])
