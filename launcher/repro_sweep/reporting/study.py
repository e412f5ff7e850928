"""An Optuna study made from a sweep's ledger, for Optuna's own figures: one Optuna trial for each point.

A point's value is the mean over its repeats, as everywhere. What a sampler chose from is not looked up: the domains of
the parameters are inferred from their values, so that a grid has a study as well as a search.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial

from repro_sweep.ledger import Ledger
from repro_sweep.records import Attempt
from repro_sweep.standings import Row, constraints_of, ranked_rows
from repro_sweep.states import TrialState
from repro_sweep.sweep import SweepSpec

_LOG_FROM = 100.0
"""Positive values of which the largest is more than so many times the smallest are seen on a logarithmic scale."""
_MOST_REPORTS = 300_000
"""Of a sweep with more reports than this, only some points keep theirs: reading takes 10 µs each."""
_PAGE = 10_000

_STATES = {
    TrialState.WAITING: optuna.trial.TrialState.WAITING,
    TrialState.RUNNING: optuna.trial.TrialState.RUNNING,
    TrialState.COMPLETE: optuna.trial.TrialState.COMPLETE,
    TrialState.PRUNED: optuna.trial.TrialState.PRUNED,
    TrialState.FAIL: optuna.trial.TrialState.FAIL,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a ledger has of a sweep at one time.

    ``rows`` are its points, best first. ``curves`` hold the reported values of the first objective by step, the mean
    over a point's repeats; points are known by their first trial, and ``uncounted`` of them have reports that were not
    read. ``overrides`` are those of each trial. ``counts`` leaves out the ``cancelled`` trials.
    """

    spec: SweepSpec
    rows: Sequence[Row]
    counts: Mapping[TrialState, int]
    cancelled: int
    overrides: Mapping[int, tuple[str, ...]]
    curves: Mapping[int, Mapping[int, float]]
    uncounted: int

    @property
    def points(self) -> list[Row]:
        """The points in the order of their first trials."""
        return sorted(self.rows, key=lambda row: row.trials[0])


def read(ledger: Ledger) -> Findings:
    """Read all that a report needs.

    Raises:
        LedgerError: the ledger cannot be read.
    """
    spec = ledger.spec
    trials, attempts = list(ledger.trials()), ledger.attempts()
    rows = ranked_rows(spec, trials, attempts)
    apart = ledger.cancelled | ledger.withdrawn
    counts = Counter(trial.state for trial in trials if trial.number not in apart)
    with_reports = _with_reports(rows, attempts)
    chosen = _affordable(with_reports)
    return Findings(
        spec=spec,
        rows=rows,
        counts={state: counts[state] for state in TrialState},
        cancelled=len(ledger.cancelled),
        overrides={trial.number: trial.overrides for trial in trials},
        curves={row.trials[0]: _curve(ledger, row, spec.all_objectives[0].metric) for row in chosen},
        uncounted=len(with_reports) - len(chosen),
    )


def study_from(
    findings: Findings, *, objective: int | None = None, shown: Collection[int] | None = None
) -> optuna.Study:
    """The study of what a ledger has (see ``reporting.study_of``).

    Args:
        findings: what it has.
        objective: the index of the only objective that the study is to have; None for all.
        shown: the points that matter, by their first trials; the others only keep their places. None for all.
    """
    objectives = findings.spec.all_objectives
    indices = range(len(objectives)) if objective is None else [objective]
    points = findings.points
    domains = domains_of(points)
    with quiet():
        study = optuna.create_study(
            directions=[StudyDirection[objectives[index].direction.name] for index in indices]
        )
        study.add_trials(
            _trial(row, findings, indices, domains)
            if shown is None or row.trials[0] in shown
            else create_trial(state=optuna.trial.TrialState.WAITING)
            for row in points
        )
        study.set_metric_names([objectives[index].metric for index in indices])
    return study


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna's remarks away from the user."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            for kind in (optuna.exceptions.ExperimentalWarning, UserWarning):
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def state_of(row: Row) -> TrialState:
    """What a point is that has repeats in several states."""
    if row.rank is not None:
        return TrialState.COMPLETE
    for state in (TrialState.RUNNING, TrialState.PRUNED, TrialState.WAITING):
        if row.states[state]:
            return state
    return TrialState.FAIL


def domains_of(rows: Iterable[Row]) -> dict[str, BaseDistribution]:
    """The domains of all parameters, as their values show them."""
    values: dict[str, list[object]] = {}
    for row in rows:
        for name, value in row.params.items():
            values.setdefault(name, []).append(value)
    return {name: _domain(seen) for name, seen in values.items()}


def _domain(values: Sequence[object]) -> BaseDistribution:
    numbers: list[int | float] = [
        value
        for value in values
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ]
    if len(numbers) < len(values):
        return CategoricalDistribution(tuple(dict.fromkeys(map(_text, values))))
    low, high = min(numbers), max(numbers)
    log = low > 0 and high > _LOG_FROM * low
    if all(isinstance(value, int) for value in numbers):
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return str(value) if value is None or isinstance(value, bool) else json.dumps(value, default=str)


def _trial(
    row: Row, findings: Findings, indices: Sequence[int], domains: Mapping[str, BaseDistribution]
) -> FrozenTrial:
    state = state_of(row)
    values: list[float] | None = None
    if state is TrialState.COMPLETE:
        values = [row.means[index] or 0.0 for index in indices]
    elif state is TrialState.PRUNED and list(indices) == [0]:
        last = [value for value in row.last if math.isfinite(value)]
        values = [statistics.mean(last)] if last else None
    names = [f"{each.metric} {each.operator} {each.bound:g}" for each in constraints_of(findings.spec)]
    complete = state is TrialState.COMPLETE
    return create_trial(
        state=_STATES[state],
        values=values,
        params={
            name: _text(value) if isinstance(domains[name], CategoricalDistribution) else value
            for name, value in row.params.items()
        },
        distributions={name: domains[name] for name in row.params},
        intermediate_values=dict(findings.curves.get(row.trials[0], {})),
        constraints=dict(zip(names, row.violations, strict=False)) if complete and names else None,
    )


# --- reports ---------------------------------------------------------------------------------------------------


def _with_reports(rows: Sequence[Row], attempts: Iterable[Attempt]) -> list[tuple[Row, int]]:
    """The points that have reports, in the order of their first trials, and how many."""
    counts: Counter[int] = Counter()
    for attempt in attempts:
        counts[attempt.trial] += attempt.reports
    pairs = ((row, sum(counts[number] for number in row.trials)) for row in rows)
    return sorted(((row, count) for row, count in pairs if count), key=lambda pair: pair[0].trials[0])


def _affordable(rows: Sequence[tuple[Row, int]]) -> list[Row]:
    """All of these points, or evenly spread ones that do not have too many reports altogether."""
    step = 1
    while len(rows[::step]) > 1 and sum(count for _, count in rows[::step]) > _MOST_REPORTS:
        step += 1
    return [row for row, _ in rows[::step]]


def _curve(ledger: Ledger, row: Row, metric: str) -> dict[int, float]:
    """A metric by step: the mean over the point's repeats of what each has reported last for the step."""
    found: dict[int, list[float]] = {}
    for number in row.trials:
        for step, value in _reported(ledger, number, metric).items():
            found.setdefault(step, []).append(value)
    return {step: sum(values) / len(values) for step, values in sorted(found.items())}


def _reported(ledger: Ledger, number: int, metric: str) -> dict[int, float]:
    values: dict[int, float] = {}
    after = 0
    while reports := ledger.reports(after=after, trial=number, limit=_PAGE):
        values |= {each.step: each.metrics[metric] for each in reports if metric in each.metrics}
        after = reports[-1].seq
    return {step: value for step, value in values.items() if math.isfinite(value)}
