"""A sweep's results: its trials, the best of them, and the ranking of its points.

Reads MLflow only, so it works on any machine that sees the tracking server, and changes nothing there.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from repro_sweep.errors import TrackingError
from repro_sweep.results import (
    Failure,
    Reproduction,
    Sweep,
    Trial,
    find_sweep,
    read_trials,
    reading_uri,
    value_of,
)
from repro_sweep.standings import Entry, Row, columns, front_of, rank_points, usual_direction
from repro_sweep.states import Direction, TrialState
from repro_sweep.sweep import UNNAMED_METRIC, Constraint, Objective

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Failure",
    "Ranking",
    "Reproduction",
    "Row",
    "Trial",
    "best_trial",
    "leaderboard",
    "pareto_front",
    "rank",
    "trials",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The ranked points of a sweep: ``params`` are the names of all params, ``rows`` are best first.

    ``objectives`` are what they are ranked by, at least one; ``front`` is how many points no other one dominates.
    """

    sweep: str
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    params: tuple[str, ...]
    rows: tuple[Row, ...]
    front: int

    @property
    def metric(self) -> str:
        """The first objective's metric."""
        return self.objectives[0].metric

    @property
    def direction(self) -> Direction:
        """The first objective's direction."""
        return self.objectives[0].direction


def trials(name: str, *, uri: str | None = None) -> list[Trial]:
    """All trials of the newest sweep of this name, by number, whatever their state.

    Args:
        name: the sweep's name.
        uri: the MLflow tracking URI; by default ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in this folder.

    Raises:
        TrackingError: there is no such sweep, or MLflow cannot be read.
    """
    return read_trials(find_sweep(name, reading_uri(uri)))


def best_trial(
    name: str, *, metric: str | None = None, direction: Direction | str | None = None, uri: str | None = None
) -> Trial:
    """The best trial of the best point of a sweep.

    The best point is the one with the best mean over its repeats of those that violate no constraint; of its trials,
    the one with the best value is returned (of equal ones the first). See :func:`leaderboard` for the arguments. A
    sweep with several objectives has a Pareto front (:func:`pareto_front`), and a best trial by a chosen metric.

    Raises:
        TrackingError: there is no such sweep or metric, no complete trial, none that violates no constraint, several
            objectives and no metric is chosen, or MLflow cannot be read.
    """
    sweep = find_sweep(name, reading_uri(uri))
    found = read_trials(sweep)
    if metric is None and len(sweep.objectives) > 1:
        names = ", ".join(each.metric for each in sweep.objectives)
        raise TrackingError(
            f"sweep {name!r} has several objectives; choose one with metric=… ({names}),"
            " or see repro_sweep.pareto_front"
        )
    ranking = _ranking(sweep, found, metric, direction)
    best = _best(ranking, found)
    return next(trial for trial in found if trial.number == best[0].best)


def pareto_front(name: str, *, uri: str | None = None) -> list[Trial]:
    """The best points of a sweep with several objectives: those that no other point dominates.

    A point dominates another one if its means over its repeats are nowhere worse and somewhere better. Points that
    violate a constraint are left out. Of each point the trial with the best value of the first objective is returned;
    they are ordered by that objective's mean, best first. Of a sweep with one objective it is the best trial alone.

    Args:
        name: the sweep's name; the newest sweep of this name is taken.
        uri: the MLflow tracking URI; by default ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in this folder.

    Raises:
        TrackingError: there is no such sweep, no complete trial, none that violates no constraint, or MLflow cannot
            be read.
    """
    sweep = find_sweep(name, reading_uri(uri))
    found = read_trials(sweep)
    by_number = {trial.number: trial for trial in found}
    rows = _best(_ranking(sweep, found, None, None), found)
    return [by_number[row.best] for row in rows if row.best is not None]


def leaderboard(
    name: str,
    *,
    metric: str | None = None,
    direction: Direction | str | None = None,
    top: int | None = None,
    uri: str | None = None,
) -> pd.DataFrame:
    """The points of a sweep, best first: a row for each, with the mean over its repeats.

    Columns: ``rank`` (empty where there is no finite mean), one for each param, ``<metric>`` (mean) and
    ``<metric>_std`` (empty for fewer than two values) of each objective, ``n`` (how many values), ``trials`` (their
    numbers), the number of trials in each state, and, if the sweep has constraints, ``infeasible``: those that the
    point violates, in words. A param whose name is one of these has the column ``params.<name>``.

    Points that violate a constraint come after all others. With several objectives, the Pareto front has rank 1, those
    that only its points dominate have rank 2, and so on.

    Args:
        name: the sweep's name; the newest sweep of this name is taken.
        metric: rank by this one alone; by default the sweep's own objectives.
        direction: ``maximize`` or ``minimize``; by default the sweep's for its own metric, for others what is usual
            for their name (losses, errors and times are minimised).
        top: only that many rows.
        uri: the MLflow tracking URI; by default ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in this folder.

    Raises:
        TrackingError: there is no such sweep or metric, or MLflow cannot be read.
    """
    import pandas as pd

    ranking = rank(name, metric=metric, direction=direction, top=top, uri=uri)
    states = {state: state.lower() for state in TrialState}
    means = [each.metric for each in ranking.objectives]
    stds = [f"{metric}_std" for metric in means]
    pairs = [name for pair in zip(means, stds, strict=True) for name in pair]
    words = ["infeasible"] if ranking.constraints else []
    taken = {"rank", *pairs, "n", "trials", *states.values(), *words}
    names = {param: f"params.{param}" if param in taken else param for param in ranking.params}
    records: list[dict[str, Any]] = []
    for row in ranking.rows:
        params = {column: row.params.get(param) for param, column in names.items()}
        figures = dict(zip(means, row.means, strict=True)) | dict(zip(stds, row.stds, strict=True))
        counts = {column: row.states[state] for state, column in states.items()}
        note = {"infeasible": ", ".join(row.infeasible) or None}
        records.append(
            {"rank": row.rank, **params, **figures, "n": row.n, "trials": row.trials, **counts, **note}
        )
    frame = pd.DataFrame(
        records, columns=["rank", *names.values(), *pairs, "n", "trials", *states.values(), *words]
    )
    return frame.astype({"rank": "Int64", **dict.fromkeys(pairs, float)})


def rank(
    name: str,
    *,
    metric: str | None = None,
    direction: Direction | str | None = None,
    top: int | None = None,
    uri: str | None = None,
) -> Ranking:
    """The ranked points of a sweep as plain records; see :func:`leaderboard`."""
    sweep = find_sweep(name, reading_uri(uri))
    ranking = _ranking(sweep, read_trials(sweep), metric, direction)
    if top is None:
        return ranking
    if top < 0:
        raise TrackingError(f"top: {top} is no number of rows")
    return replace(ranking, rows=ranking.rows[:top])


def _best(ranking: Ranking, found: Sequence[Trial]) -> list[Row]:
    """The points that may be called best, at least one.

    Raises:
        TrackingError: there is none.
    """
    rows = [row for row in front_of(ranking.rows) if row.best is not None]
    if rows:
        return rows
    names = " and ".join(repr(each.metric) for each in ranking.objectives)
    infeasible = next((row for row in ranking.rows if row.rank is not None), None)
    if infeasible is not None:
        raise TrackingError(
            f"every point of sweep {ranking.sweep!r} with a finite {names} violates a constraint"
            f" (the first in rank, trial {infeasible.best}: {', '.join(infeasible.infeasible)})"
        )
    counts = ", ".join(f"{_count(found, state)} {state}" for state in TrialState if _count(found, state))
    raise TrackingError(
        f"sweep {ranking.sweep!r} has no complete trial with a finite {names} ({counts or 'no trials yet'})"
    )


def _ranking(
    sweep: Sweep, found: Sequence[Trial], metric: str | None, direction: Direction | str | None
) -> Ranking:
    objectives = _objectives(sweep, found, metric, direction)
    rows = rank_points(
        (_entry(trial, objectives, sweep.constraints) for trial in found),
        objectives[0].direction,
        more=[each.direction for each in objectives[1:]],
        constraints=sweep.constraints,
    )
    return Ranking(
        sweep=sweep.name,
        objectives=objectives,
        constraints=sweep.constraints,
        params=tuple(columns(rows)),
        rows=tuple(rows),
        front=len(front_of(rows)),
    )


def _entry(trial: Trial, objectives: Sequence[Objective], constraints: Sequence[Constraint]) -> Entry:
    value, *more = (value_of(trial, each.metric) for each in objectives)
    return Entry(
        number=trial.number,
        params=trial.params,
        state=trial.state,
        value=value,
        point=trial.point,
        more=tuple(more),
        constrained=tuple(value_of(trial, each.metric) for each in constraints),
        verdict=trial.reproduced,
    )


def _objectives(
    sweep: Sweep, found: Sequence[Trial], metric: str | None, direction: Direction | str | None
) -> tuple[Objective, ...]:
    """What a sweep is ranked by: its own objectives, or the metric that was chosen."""
    if metric is None and len(sweep.objectives) > 1:
        if direction is not None:
            raise TrackingError(
                f"direction: sweep {sweep.name!r} has several objectives, each with its own; choose one with metric=…"
                " (--metric on the command line)"
            )
        return sweep.objectives
    chosen = metric or sweep.metric
    if chosen is None and any(UNNAMED_METRIC in trial.metrics for trial in found):
        chosen, direction = UNNAMED_METRIC, direction or sweep.direction
    if chosen is None:
        raise TrackingError(
            f"sweep {sweep.name!r} names no metric; choose one with metric=… (--metric on the command line):"
            f" {_metric_names(found)}"
        )
    unknown = all(value_of(trial, chosen) is None for trial in found)
    if metric is not None and metric != sweep.metric and unknown:
        raise TrackingError(
            f"no trial of sweep {sweep.name!r} has a metric {metric!r}; {_near(metric, found)}"
        )
    return (Objective(metric=chosen, direction=_direction(sweep, chosen, direction)),)


def _direction(sweep: Sweep, metric: str, direction: Direction | str | None) -> Direction:
    if direction is not None:
        try:
            return Direction(direction)
        except ValueError:
            raise TrackingError(f"direction: {direction!r} is neither 'maximize' nor 'minimize'") from None
    own = {each.metric: each.direction for each in sweep.objectives}
    if sweep.metric is not None:
        own.setdefault(sweep.metric, sweep.direction)
    return own.get(metric) or usual_direction(metric)


def _metric_names(found: Sequence[Trial]) -> str:
    names = sorted(
        {name for trial in found for name, value in trial.metrics.items() if not math.isnan(value)}
    )
    return ", ".join(names[:20]) or "there are none yet"


def _near(metric: str, found: Sequence[Trial]) -> str:
    names = sorted({name for trial in found for name in trial.metrics})
    near = difflib.get_close_matches(metric, names, n=3)
    return f"did you mean {', '.join(near)}?" if near else f"they have: {_metric_names(found)}"


def _count(found: Sequence[Trial], state: TrialState) -> int:
    return sum(trial.state is state for trial in found)
