"""The records that a ledger holds, and how they are kept in its tables."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from repro_sweep.states import FailureKind, StepKind, TrialState


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTrial:
    """A trial to be recorded: its Hydra overrides, swept values, and its composed config as YAML.

    ``directory`` is where its files go, below the sweep's directory unless it is absolute. ``point`` is the same for
    the repeats of one point, and for nothing else; empty where that is told by ``params`` alone.
    """

    number: int
    identity: str
    directory: str
    overrides: tuple[str, ...]
    params: Mapping[str, object]
    repeat: Mapping[str, object]
    config: str
    point: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A recorded trial.

    ``attempt`` is the id of its latest attempt. ``cancelled``: the user has cancelled it. ``retries_from`` is the
    ordinal of the first attempt that counts for its retries: one that the user has started again has all of them
    again. ``reused`` is the run of another sweep that its result was taken from, None where it ran here.
    """

    number: int
    identity: str
    directory: str
    overrides: tuple[str, ...]
    params: dict[str, object]
    repeat: dict[str, object]
    config: str
    state: TrialState
    attempt: str | None
    change: int
    point: str = ""
    cancelled: bool = False
    retries_from: int = 0
    reused: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One execution of a trial.

    Times are seconds UTC; ``metrics`` are the final ones; ``reports`` is the number that the next one has; ``code`` is
    the fingerprint of the project's code that it ran with.
    """

    id: str
    trial: int
    ordinal: int
    worker: str
    slot: int
    host: str
    state: TrialState
    kind: FailureKind | None
    message: str | None
    metrics: dict[str, float]
    started_at: float
    ended_at: float | None
    reports: int = 0
    code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NextAttempt:
    """What the next attempt of a trial needs of it; ``ordinal`` is the attempt's, all else as in :class:`Trial`."""

    ordinal: int
    overrides: tuple[str, ...]
    config: str
    identity: str
    directory: str
    cancelled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How an attempt stands: its ``trial``, its ``state`` and end, and whether the user has cancelled its trial."""

    trial: int
    state: TrialState
    ended_at: float | None
    cancelled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NewReport:
    """Metrics of one step as an attempt reports them; ``seq`` counts its reports from 0, ``time`` is seconds UTC."""

    seq: int
    step: int
    time: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reused:
    """A result that another sweep has of the same point: the id of its run, where it ran, what came out.

    ``origin`` says in a few words whose it is.
    """

    run_id: str
    origin: str
    host: str
    metrics: Mapping[str, float]
    started_at: float
    ended_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Metrics that a trial reported at one step; ``time`` is seconds UTC."""

    seq: int
    trial: int
    attempt: str
    step: int
    time: float
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an attempt ended."""

    state: TrialState
    kind: FailureKind | None = None
    message: str | None = None
    metrics: Mapping[str, float]
    ended_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a search, as it was recorded; ``seq`` grows from step to step.

    ========  ==========================================================================================================
    BEGIN     ``definition`` of the search, ``known``: results from elsewhere (values, state, objectives), ``first``:
              the number of its first trial
    ASK       ``suggestion`` (counted from 0), ``values``, ``trials``: numbers of those that run it, ``repeats``: how
              many it may have, or ``refused``: why it is not run; ``after``: the last TELL that was known
    MORE      ``suggestion`` and ``trials``: the next repeats of a point, ``after``
    TELL      ``trial``, its ``state`` and its final ``metrics``
    ========  ==========================================================================================================
    """

    seq: int
    kind: StepKind
    data: dict[str, Any]


TRIAL_COLUMNS = (
    "number, identity, point, directory, overrides, params, repeat, config, state, attempt, change, cancelled,"
    " retries_from, reused"
)
ATTEMPT_COLUMNS = (
    "id, trial, ordinal, worker, slot, host, state, kind, message, metrics, started_at, ended_at, reports"
    ", code"
)


def trial_of(row: tuple[Any, ...]) -> Trial:
    """A trial from its row; the tables are strict, so the columns have their declared types."""
    number, identity, point, directory, overrides, params, repeat, config, state, *rest = row
    attempt, change, cancelled, retries_from, reused = rest
    return Trial(
        number=number,
        identity=identity,
        point=point,
        directory=directory,
        overrides=tuple(json.loads(overrides)),
        params=json.loads(params),
        repeat=json.loads(repeat),
        config=config,
        state=TrialState(state),
        attempt=attempt,
        change=change,
        cancelled=bool(cancelled),
        retries_from=retries_from,
        reused=reused,
    )


def attempt_of(row: tuple[Any, ...]) -> Attempt:
    """An attempt from its row."""
    ident, trial, ordinal, worker, slot, host, state, kind, message, metrics, started_at, *rest = row
    ended_at, reports, code = rest
    return Attempt(
        id=ident,
        trial=trial,
        ordinal=ordinal,
        worker=worker,
        slot=slot,
        host=host,
        state=TrialState(state),
        kind=None if kind is None else FailureKind(kind),
        message=message,
        metrics={} if metrics is None else json.loads(metrics),
        started_at=started_at,
        ended_at=ended_at,
        reports=reports,
        code=code,
    )


def now() -> float:
    """Seconds UTC, the stamp that all records use."""
    return time.time()
