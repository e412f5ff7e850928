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
from repro_sweep.results import Failure, Sweep, Trial, find_sweep, read_trials, reading_uri, value_of
from repro_sweep.standings import Entry, Row, columns, rank_points, usual_direction
from repro_sweep.states import Direction, TrialState
from repro_sweep.sweep import UNNAMED_METRIC

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Failure", "Ranking", "Row", "Trial", "best_trial", "leaderboard", "rank", "trials"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The ranked points of a sweep: ``params`` are the names of all params, ``rows`` are best first."""

    sweep: str
    metric: str
    direction: Direction
    params: tuple[str, ...]
    rows: tuple[Row, ...]


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

    The best point is the one with the best mean over its repeats; of its trials, the one with the best value is
    returned (of equal ones the first). See :func:`leaderboard` for the arguments.

    Raises:
        TrackingError: there is no such sweep or metric, no complete trial, or MLflow cannot be read.
    """
    sweep = find_sweep(name, reading_uri(uri))
    found = read_trials(sweep)
    ranking = _ranking(sweep, found, metric, direction)
    if not ranking.rows or ranking.rows[0].rank is None or ranking.rows[0].best is None:
        counts = ", ".join(f"{_count(found, state)} {state}" for state in TrialState if _count(found, state))
        raise TrackingError(
            f"sweep {name!r} has no complete trial with a finite {ranking.metric!r} ({counts or 'no trials yet'})"
        )
    return next(trial for trial in found if trial.number == ranking.rows[0].best)


def leaderboard(
    name: str,
    *,
    metric: str | None = None,
    direction: Direction | str | None = None,
    top: int | None = None,
    uri: str | None = None,
) -> pd.DataFrame:
    """The points of a sweep, best first: a row for each, with the mean over its repeats.

    Columns: ``rank`` (empty where there is no finite mean), one for each param, ``<metric>`` (mean),
    ``<metric>_std`` (empty for fewer than two values), ``n`` (how many values), ``trials`` (their numbers), and the
    number of trials in each state. A param whose name is one of these has the column ``params.<name>``.

    Args:
        name: the sweep's name; the newest sweep of this name is taken.
        metric: by default the sweep's own.
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
    mean, std = ranking.metric, f"{ranking.metric}_std"
    taken = {"rank", mean, std, "n", "trials", *states.values()}
    names = {param: f"params.{param}" if param in taken else param for param in ranking.params}
    records: list[dict[str, Any]] = []
    for row in ranking.rows:
        params = {column: row.params.get(param) for param, column in names.items()}
        figures = {mean: row.mean, std: row.std, "n": row.n, "trials": row.trials}
        counts = {column: row.states[state] for state, column in states.items()}
        records.append({"rank": row.rank, **params, **figures, **counts})
    frame = pd.DataFrame(
        records, columns=["rank", *names.values(), mean, std, "n", "trials", *states.values()]
    )
    return frame.astype({"rank": "Int64", mean: float, std: float})


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


def _ranking(
    sweep: Sweep, found: Sequence[Trial], metric: str | None, direction: Direction | str | None
) -> Ranking:
    chosen = metric or sweep.metric
    if chosen is None and any(UNNAMED_METRIC in trial.metrics for trial in found):
        chosen, direction = UNNAMED_METRIC, direction or sweep.direction
    if chosen is None:
        raise TrackingError(
            f"sweep {sweep.name!r} names no metric; choose one with metric=… (--metric on the command line):"
            f" {_metric_names(found)}"
        )
    values = {trial.number: value_of(trial, chosen) for trial in found}
    if metric is not None and metric != sweep.metric and all(value is None for value in values.values()):
        raise TrackingError(
            f"no trial of sweep {sweep.name!r} has a metric {metric!r}; {_near(metric, found)}"
        )
    rows = rank_points(
        (
            Entry(
                number=trial.number,
                params=trial.params,
                state=trial.state,
                value=values[trial.number],
                point=trial.point,
            )
            for trial in found
        ),
        chosen_direction := _direction(sweep, chosen, direction),
    )
    return Ranking(
        sweep=sweep.name,
        metric=chosen,
        direction=chosen_direction,
        params=tuple(columns(rows)),
        rows=tuple(rows),
    )


def _direction(sweep: Sweep, metric: str, direction: Direction | str | None) -> Direction:
    if direction is not None:
        try:
            return Direction(direction)
        except ValueError:
            raise TrackingError(f"direction: {direction!r} is neither 'maximize' nor 'minimize'") from None
    return sweep.direction if metric == sweep.metric else usual_direction(metric)


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
