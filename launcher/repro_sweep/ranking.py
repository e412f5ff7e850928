"""The results of sweeps: their trials, the best of them, and the ranking of their points.

Reads MLflow only, so it works on any machine that sees the tracking server, and changes nothing there.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from repro_sweep.errors import TrackingError
from repro_sweep.filters import SWEEP, UnknownNameError
from repro_sweep.ordering import Found, Ranking, best_rows, ranking_of, trials_of
from repro_sweep.results import (
    Failure,
    Reproduction,
    Sweep,
    Trial,
    find_sweep,
    read_trials,
    reading_uri,
)
from repro_sweep.standings import Row
from repro_sweep.states import Direction, TrialState

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

Names = str | Sequence[str]
"""A sweep, or several: each is NAME for the newest sweep of that name, or USER/NAME for the newest one of that user."""


def trials(name: str, *, uri: str | None = None) -> list[Trial]:
    """All trials of a sweep, by number, whatever their state.

    Args:
        name: of the newest sweep of this name; ``USER/NAME`` for the newest one of that user.
        uri: the MLflow tracking URI; by default ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in this folder.

    Raises:
        TrackingError: there is no such sweep, or MLflow cannot be read.
    """
    with _no_collection():
        return read_trials(find_sweep(name, reading_uri(uri)))


def best_trial(
    name: Names,
    *,
    metric: str | None = None,
    direction: Direction | str | None = None,
    where: str | Sequence[str] = (),
    uri: str | None = None,
) -> Trial:
    """The best trial of the best point of a sweep, or of several.

    The best point is the one with the best mean over its repeats of those that violate no constraint; of its trials,
    the one with the best value is returned (of equal ones the first). See :func:`leaderboard` for the arguments. A
    sweep with several objectives has a Pareto front (:func:`pareto_front`), and a best trial by a chosen metric.

    Raises:
        TrackingError: there is no such sweep or metric, no complete trial, none that violates no constraint, several
            objectives and no metric is chosen, or MLflow cannot be read.
    """
    found, ranking = _read_and_rank(name, uri, metric=metric, direction=direction, where=where)
    if len(ranking.objectives) > 1:
        names = ", ".join(each.metric for each in ranking.objectives)
        raise TrackingError(
            f"sweep {ranking.sweep!r} has several objectives; choose one with metric=… ({names}),"
            " or see repro_sweep.pareto_front"
        )
    return trials_of(best_rows(ranking, found)[:1], found)[0]


def pareto_front(name: Names, *, where: str | Sequence[str] = (), uri: str | None = None) -> list[Trial]:
    """The best points of a sweep with several objectives: those that no other point dominates.

    A point dominates another one if its means over its repeats are nowhere worse and somewhere better. Points that
    violate a constraint are left out. Of each point the trial with the best value of the first objective is returned;
    they are ordered by that objective's mean, best first. Of a sweep with one objective it is the best trial alone.

    Args:
        name: the sweep's name, or several; the newest sweep of a name is taken.
        where: conditions, as for :func:`leaderboard`.
        uri: the MLflow tracking URI; by default ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in this folder.

    Raises:
        TrackingError: there is no such sweep, no complete trial, none that violates no constraint, or MLflow cannot
            be read.
    """
    found, ranking = _read_and_rank(name, uri, where=where)
    return trials_of(best_rows(ranking, found), found)


def leaderboard(
    name: Names,
    *,
    metric: str | None = None,
    direction: Direction | str | None = None,
    top: int | None = None,
    where: str | Sequence[str] = (),
    by: str | Sequence[str] = (),
    uri: str | None = None,
) -> pd.DataFrame:
    """The points of a sweep, or of several, best first: a row for each, with the mean over its repeats.

    Columns: ``rank`` (empty where there is no finite mean), ``sweep`` if several were named, one for each param,
    ``<metric>`` (mean) and ``<metric>_std`` (empty for fewer than two values) of each objective, ``n`` (how many
    values), ``trials`` (their numbers), the number of trials in each state, and, if the sweep has constraints,
    ``infeasible``: those that the point violates, in words. With ``by`` also ``points`` and ``<metric>_best``. A param
    whose name is one of these has the column ``params.<name>``.

    Points that violate a constraint come after all others. With several objectives, the Pareto front has rank 1, those
    that only its points dominate have rank 2, and so on.

    Args:
        name: the sweep's name; the newest sweep of this name is taken, of ``USER/NAME`` the newest one of that user.
            Several sweeps are ranked together by a metric that all of them have.
        metric: rank by this one alone; by default the sweep's own objectives.
        direction: ``maximize`` or ``minimize``; by default the sweep's for its own metric, for others what is usual
            for their name (losses, errors and times are minimised).
        top: only that many rows.
        where: conditions that must all hold, such as ``"optimizer=Adam, val_loss<0.5"`` or a list of them. Those on
            params and repeats choose trials, those on metrics choose points by their means.
        by: params (or ``sweep``) to group all trials by: a row for each combination of their values, ranked by the
            mean over all of its trials. ``points`` says how many points it has, ``<metric>_best`` is the best one's
            mean. Constraints are about points: they say only which point may be the best.
        uri: the MLflow tracking URI; by default ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in this folder.

    Raises:
        TrackingError: there is no such sweep, metric or param, the sweeps have no metric in common, or MLflow cannot be
            read.
    """
    import pandas as pd

    ranking = rank(name, metric=metric, direction=direction, top=top, where=where, by=by, uri=uri)
    states = {state: state.lower() for state in TrialState}
    means = [each.metric for each in ranking.objectives]
    stds = [f"{metric}_std" for metric in means]
    pairs = [name for pair in zip(means, stds, strict=True) for name in pair]
    best = f"{ranking.metric}_best"
    groups = ["points", best] if ranking.by else []
    words = ["infeasible"] if ranking.constraints and not ranking.by else []
    of = [SWEEP] if len(ranking.sweeps) > 1 and not ranking.by else []
    taken = {"rank", *of, *pairs, "n", *groups, "trials", *states.values(), *words}
    names = {param: f"params.{param}" if param in taken else param for param in ranking.params}
    records: list[dict[str, Any]] = []
    for row in ranking.rows:
        params = {column: row.params.get(param) for param, column in names.items()}
        figures = dict(zip(means, row.means, strict=True)) | dict(zip(stds, row.stds, strict=True))
        counts = {column: row.states[state] for state, column in states.items()}
        note = {"infeasible": ", ".join(row.infeasible) or None, "points": row.points, best: row.best_mean}
        first = {"rank": row.rank, SWEEP: row.sweep}
        records.append({**note, **first, **params, **figures, "n": row.n, "trials": row.trials, **counts})
    head = ["rank", *of, *names.values(), *pairs, "n", *groups, "trials", *states.values(), *words]
    frame = pd.DataFrame(records, columns=head)
    return frame.astype({"rank": "Int64", **dict.fromkeys([*pairs, *groups[1:]], float)})


def rank(
    name: Names,
    *,
    metric: str | None = None,
    direction: Direction | str | None = None,
    top: int | None = None,
    where: str | Sequence[str] = (),
    by: str | Sequence[str] = (),
    uri: str | None = None,
) -> Ranking:
    """The ranked points of sweeps as plain records; see :func:`leaderboard`."""
    if top is not None and top < 0:
        raise TrackingError(f"top: {top} is no number of rows")
    _, ranking = _read_and_rank(name, uri, metric=metric, direction=direction, where=where, by=by)
    return ranking if top is None else replace(ranking, rows=ranking.rows[:top])


# --- reading ----------------------------------------------------------------------------------------------------


def _read_and_rank(name: Names, uri: str | None, **how: Any) -> tuple[Found, Ranking]:
    """Find and read sweeps, and rank their points; what their tables do not know is looked for in their runs."""
    with _no_collection():
        sweeps = _sweeps([name] if isinstance(name, str) else list(name), reading_uri(uri))
        try:
            return ranking_of(_found(sweeps, fresh=False), **how)
        except UnknownNameError:
            if all(each.stamp is None for each in sweeps.values()):
                raise
        return ranking_of(_found(sweeps, fresh=True), **how)  # such as a metric that was logged later


def _sweeps(names: Sequence[str], uri: str) -> dict[str, Sweep]:
    if not names:
        raise TrackingError("no sweep is named")
    found: dict[str, Sweep] = {}
    for name in names:
        sweep = find_sweep(name, uri)
        same = next((label for label, each in found.items() if each.run_id == sweep.run_id), None)
        if same is not None:
            raise TrackingError(f"{same!r} and {name!r} are one sweep: name each once")
        found[name if len(names) > 1 else sweep.name] = sweep
    return found


def _found(sweeps: dict[str, Sweep], *, fresh: bool) -> Found:
    trials = [(label, trial) for label, each in sweeps.items() for trial in read_trials(each, fresh=fresh)]
    return Found(sweeps=sweeps, trials=trials)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Look for no unreachable objects while thousands are made, none of which is: that takes half of the time."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
