"""What sweeps are ranked by, and their points in that order: pure, from trials that were read.

Nothing here asks MLflow.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from repro_sweep.errors import TrackingError
from repro_sweep.filters import Labelled, UnknownNameError, chosen, group_of, parse, resolved
from repro_sweep.results import Sweep, Trial, value_of
from repro_sweep.significance import Significance, welch
from repro_sweep.standings import Entry, Row, columns, front_of, rank_points, usual_direction
from repro_sweep.states import Direction, TrialState
from repro_sweep.sweep import UNNAMED_METRIC, Constraint, Objective
from repro_sweep.tracking.encoding import canonical


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The ranked points of sweeps: ``params`` are the names of all params, ``rows`` are best first.

    ``objectives`` are what they are ranked by, at least one; ``front`` is how many points no other one dominates.
    ``sweeps`` are what the sweeps are called, ``sweep`` the same as text. ``by`` are the params that trials are grouped
    by, none where ``rows`` are points. ``test`` tells how sure it is that the first point is better than the second
    one; None where there are no two, several objectives, or groups.
    """

    sweeps: tuple[str, ...]
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    params: tuple[str, ...]
    rows: tuple[Row, ...]
    front: int
    by: tuple[str, ...] = ()
    test: Significance | None = None

    @property
    def sweep(self) -> str:
        """What the sweeps are called."""
        return ", ".join(self.sweeps)

    @property
    def metric(self) -> str:
        """The first objective's metric."""
        return self.objectives[0].metric

    @property
    def direction(self) -> Direction:
        """The first objective's direction."""
        return self.objectives[0].direction


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Sweeps by what they are called, and their trials that were chosen."""

    sweeps: dict[str, Sweep]
    trials: list[Labelled]

    def of(self, label: str) -> list[Trial]:
        """The trials of one sweep."""
        return [trial for each, trial in self.trials if each == label]


def trials_of(rows: Sequence[Row], found: Found) -> list[Trial]:
    """The best trial of each row."""
    only = next(iter(found.sweeps))
    wanted = {(row.sweep or only, row.best): place for place, row in enumerate(rows)}
    best = [
        (wanted[label, trial.number], trial)
        for label, trial in found.trials
        if (label, trial.number) in wanted
    ]
    return [trial for _, trial in sorted(best, key=lambda each: each[0])]


def best_rows(ranking: Ranking, found: Found) -> list[Row]:
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
    states = [trial.state for _, trial in found.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in TrialState if state in states)
    raise TrackingError(
        f"sweep {ranking.sweep!r} has no complete trial with a finite {names} ({counts or 'no trials yet'})"
    )


def ranking_of(
    found: Found,
    *,
    metric: str | None = None,
    direction: Direction | str | None = None,
    where: str | Sequence[str] = (),
    by: str | Sequence[str] = (),
) -> tuple[Found, Ranking]:
    """Rank the trials that satisfy the conditions; returns them as well."""
    objectives = _objectives(found, metric, direction)
    words = [word.strip() for text in ([by] if isinstance(by, str) else by) for word in text.split(",")]
    keys = [resolved(word, found.trials, metrics=False) for word in words if word]
    found = replace(found, trials=chosen(found.trials, parse(where)))
    several = len(found.sweeps) > 1
    entries = [
        _entry(label if several else "", trial, objectives, found.sweeps[label].constraints)
        for label, trial in found.trials
    ]
    directions = [each.direction for each in objectives]
    limits = {label if several else "": each.constraints for label, each in found.sweeps.items()}
    rows = rank_points(entries, directions[0], more=directions[1:], constraints=limits)
    first = [row for row in rows if row.rank is not None and not row.infeasible][:2]
    tested = len(first) == 2 and len(objectives) == 1 and not keys
    if keys:
        groups = [group_of(label, trial, keys) for label, trial in found.trials]
        rows = _grouped(entries, groups, directions, limits)
    constraints = dict.fromkeys(each for some in limits.values() for each in some)
    ranking = Ranking(
        sweeps=tuple(found.sweeps),
        objectives=objectives,
        constraints=tuple(constraints),
        params=tuple(name for _, name in keys) if keys else tuple(columns(rows)),
        rows=tuple(rows),
        front=len(front_of(rows)),
        by=tuple(name for _, name in keys),
        test=welch(first[0].values, first[1].values) if tested else None,
    )
    return found, ranking


def _grouped(
    entries: Sequence[Entry],
    groups: Sequence[dict[str, object]],
    directions: Sequence[Direction],
    limits: dict[str, tuple[Constraint, ...]],
) -> list[Row]:
    """A row for each group of trials: the mean over all of them, and what its best point has."""
    names = [canonical(group) for group in groups]
    parts = [
        replace(each, sweep=canonical([name, each.sweep])) for each, name in zip(entries, names, strict=True)
    ]
    within = {part.sweep: limits[each.sweep] for part, each in zip(parts, entries, strict=True)}
    best: dict[str, list[Row]] = {}
    group_by_part = {part.sweep: name for part, name in zip(parts, names, strict=True)}
    for row in rank_points(parts, directions[0], more=directions[1:], constraints=within):
        best.setdefault(group_by_part[row.sweep], []).append(row)
    whole = [
        replace(each, sweep="", params=group, point=name, constrained=())
        for each, group, name in zip(entries, groups, names, strict=True)
    ]
    rows = []
    for row in rank_points(whole, directions[0], more=directions[1:]):
        points = best[canonical(dict(row.params))]
        first = next((each for each in points if each.rank is not None and not each.infeasible), None)
        mean, number = (None, None) if first is None else (first.mean, first.best)
        rows.append(replace(row, points=len(points), best_mean=mean, best=number))
    return rows


def _entry(
    label: str, trial: Trial, objectives: Sequence[Objective], constraints: Sequence[Constraint]
) -> Entry:
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
        sweep=label,
    )


def _objectives(found: Found, metric: str | None, direction: Direction | str | None) -> tuple[Objective, ...]:
    """What sweeps are ranked by: their own objectives, or the metric that was chosen; the same for all of them."""
    each_has = {
        label: _objectives_of(label, sweep, found.of(label), metric, direction)
        for label, sweep in found.sweeps.items()
    }
    first, *others = each_has.values()
    for said_of, what in (
        (_metrics_of, "by different metrics ({}); choose one that all have with metric=… (--metric"),
        (_directions_of, "in different directions ({}); say direction=… (--direction"),
    ):
        if any(said_of(other) != said_of(first) for other in others):
            said = "; ".join(f"{label}: {said_of(has)}" for label, has in each_has.items())
            raise TrackingError(f"the sweeps rank {what.format(said)} on the command line)")
    return first


def _metrics_of(objectives: Sequence[Objective]) -> str:
    return ", ".join(each.metric for each in objectives)


def _directions_of(objectives: Sequence[Objective]) -> str:
    return ", ".join(f"{each.direction} {each.metric}" for each in objectives)


def _objectives_of(
    label: str, sweep: Sweep, found: Sequence[Trial], metric: str | None, direction: Direction | str | None
) -> tuple[Objective, ...]:
    if metric is None and len(sweep.objectives) > 1:
        if direction is not None:
            raise TrackingError(
                f"direction: sweep {label!r} has several objectives, each with its own; choose one with metric=…"
                " (--metric on the command line)"
            )
        return sweep.objectives
    chosen_one = metric or sweep.metric
    if chosen_one is None and any(UNNAMED_METRIC in trial.metrics for trial in found):
        chosen_one, direction = UNNAMED_METRIC, direction or sweep.direction
    if chosen_one is None:
        raise TrackingError(
            f"sweep {label!r} names no metric; choose one with metric=… (--metric on the command line):"
            f" {_metric_names(found)}"
        )
    unknown = all(value_of(trial, chosen_one) is None for trial in found)
    if metric is not None and metric != sweep.metric and unknown:
        raise UnknownNameError(f"no trial of sweep {label!r} has a metric {metric!r}; {_near(metric, found)}")
    return (Objective(metric=chosen_one, direction=_direction(sweep, chosen_one, direction)),)


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
