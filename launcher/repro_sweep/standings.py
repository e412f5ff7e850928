"""Ranking points by their mean over repeats: pure, so that it serves the ledger and MLflow alike.

Points of several objectives are ranked by non-dominated sorting. Points that violate a constraint come after all
others.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from repro_sweep.records import Attempt, Trial
from repro_sweep.states import Direction, TrialState, Verdict
from repro_sweep.sweep import Constraint, Objective, SweepSpec

_SMALLER_IS_BETTER = re.compile(
    r"(^|[^a-z])(loss|losses|error|errors|err|mae|mse|rmse|mape|nll|perplexity|ppl|bpc|wer|cer|fid|latency|time|seconds"
    r"|duration|regret|distance)([^a-z]|$)"
)


_SHOWN = 3
_BLOCK = 256
"""Points that are compared with all others at a time: of 10,000 points, some MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What ranking needs of one trial; ``value`` is None where it has none.

    ``point`` is the same for all repeats of a point; where it is empty, equal ``params`` make a point. ``more`` are the
    values of further objectives, ``constrained`` those of the metrics that constraints are about, one for each. The
    value of a pruned trial is its last one. ``verdict``: what became of it when it was run again. ``sweep`` is its
    sweep where there are several: no point belongs to two of them.
    """

    number: int
    params: Mapping[str, object]
    state: TrialState
    value: float | None
    point: str = ""
    more: tuple[float | None, ...] = ()
    constrained: tuple[float | None, ...] = ()
    verdict: Verdict | None = None
    sweep: str = ""

    @property
    def values(self) -> tuple[float | None, ...]:
        """The values of all objectives."""
        return self.value, *self.more


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One point with all its repeats.

    ``rank`` counts from 1 and is None where there is no finite mean. ``mean`` and ``std`` (with one degree of freedom
    taken off, None of fewer than two values) are over the ``n`` complete trials that have a value of every objective;
    pruned and failed ones count nowhere but in ``states``. ``best`` is the complete trial with the best value. All of
    these are of the first objective; ``means`` and ``stds`` are of each. ``violations`` has a number for each
    constraint, greater than 0 where the point's mean violates it and infinite where it has none; ``infeasible`` says
    which are violated, and how. ``last`` are the last values that pruned trials have reported.
    ``verdicts`` counts those of the trials that were run again. ``sweep`` is the point's sweep where several were
    ranked. ``values`` are the complete trials' values of the first objective.

    Of a group of points (``by``), all of this is over the trials of the group; ``points`` is then how many it has, and
    ``best_mean`` the mean of the best one.
    """

    rank: int | None
    params: Mapping[str, object]
    mean: float | None
    std: float | None
    n: int
    best: int | None
    trials: tuple[int, ...]
    states: Mapping[TrialState, int]
    means: tuple[float | None, ...] = ()
    stds: tuple[float | None, ...] = ()
    violations: tuple[float, ...] = ()
    infeasible: tuple[str, ...] = ()
    last: tuple[float, ...] = ()
    verdicts: Mapping[Verdict, int] = field(default_factory=dict)
    sweep: str = ""
    values: tuple[float, ...] = ()
    points: int = 1
    best_mean: float | None = None


def rank_points(
    entries: Iterable[Entry],
    direction: Direction,
    *,
    more: Sequence[Direction] = (),
    constraints: Sequence[Constraint] | Mapping[str, Sequence[Constraint]] = (),
) -> list[Row]:
    """Group trials by their points and order the groups.

    Points with finite means come first, best mean first. With several objectives, those that no other point dominates
    have rank 1 (the Pareto front), those that only these dominate have rank 2, and so on; points of one rank are
    ordered by the first objective. Points that violate a constraint are ranked among themselves, after all others.
    Then come those whose mean is not finite, then those without any value. Ties are ordered by the lowest trial number.

    Args:
        entries: the trials.
        direction: of the first objective.
        more: directions of further objectives.
        constraints: what a point's means must satisfy; where sweeps differ, by sweep.
    """
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in sorted(entries, key=lambda each: each.number):
        groups.setdefault((entry.sweep, point_of(entry.point, entry.params)), []).append(entry)
    directions = (direction, *more)
    of = constraints if isinstance(constraints, Mapping) else {}
    every = () if isinstance(constraints, Mapping) else constraints
    rows = [_row(group, directions, of.get(sweep, every)) for (sweep, _), group in groups.items()]
    finite = [row for row in rows if _is_finite(row)]
    ranked: list[Row] = []
    for violated in (False, True):
        some = [row for row in finite if bool(row.infeasible) is violated]
        ranked += _ranked(some, directions, after=max((row.rank or 0 for row in ranked), default=0))
    rest = [row for row in rows if not _is_finite(row)]
    return ranked + sorted(rest, key=lambda row: (row.n == 0, row.trials[0]))


def entries_of(spec: SweepSpec, trials: Iterable[Trial], attempts: Iterable[Attempt]) -> list[Entry]:
    """The trials of a ledger as :func:`rank_points` wants them, with the final metrics of their latest attempts."""
    metrics = {each.id: each.metrics for each in attempts}
    objectives, constraints = spec.all_objectives, constraints_of(spec)
    entries = []
    for trial in trials:
        ended = trial.state in {TrialState.COMPLETE, TrialState.PRUNED}
        found = metrics.get(trial.attempt or "", {}) if ended else {}
        value, *more = (found.get(each.metric) for each in objectives)
        entry = Entry(
            number=trial.number, params=trial.params, state=trial.state, point=trial.point, value=value,
            more=tuple(more), constrained=tuple(found.get(each.metric) for each in constraints),
        )  # fmt: skip
        entries.append(entry)
    return entries


def ranked_rows(spec: SweepSpec, trials: Iterable[Trial], attempts: Iterable[Attempt]) -> list[Row]:
    """The ranked points of a sweep's ledger, by all of its objectives and constraints."""
    first, *more = (each.direction for each in spec.all_objectives)
    return rank_points(entries_of(spec, trials, attempts), first, more=more, constraints=constraints_of(spec))


def constraints_of(spec: SweepSpec) -> tuple[Constraint, ...]:
    """The constraints of a sweep; only searches have any."""
    return spec.search.constraints if spec.search is not None else ()


def front_of(rows: Sequence[Row]) -> list[Row]:
    """The points that are feasible and that no other one dominates; of a single objective the best one."""
    return [row for row in rows if row.rank == 1 and not row.infeasible]


def front_text(objectives: Sequence[Objective], count: int) -> str:
    """``Pareto front of val_accuracy (maximize) and latency_ms (minimize): 4 points``."""
    names = [f"{each.metric} ({each.direction})" for each in objectives]
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    return f"Pareto front of {listed}: {count} point{'' if count == 1 else 's'}"


def mean_and_std(mean: float | None, std: float | None) -> str:
    """``0.9861 ± 0.0012``; without the second half for a single value, ``-`` for none."""
    if mean is None:
        return "-"
    digits = 5 if std is None or not math.isfinite(std) else 4
    text = f"{mean:.{digits}g}" if abs(mean) >= 1000 or abs(mean) < 0.01 else f"{mean:.4f}"
    if std is None:
        return text
    spread = f"{std:.4f}" if 0.0001 <= std < 1000 or std == 0 else f"{std:.2g}"
    return f"{text} ± {spread}"


def value_text(value: object) -> str:
    """A param's value as text; a sampler's numbers have up to 17 digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def trials_text(trials: Sequence[int], most: int, separator: str = ", ") -> str:
    """The numbers of trials, ``most`` of them at most: ``0, 1, … (48)``."""
    shown = separator.join(map(str, trials[:most]))
    return shown if len(trials) <= most else f"{shown}{separator}… ({len(trials)})"


def infeasible_text(row: Row) -> str:
    """``infeasible: latency_ms 61 > 50``; empty where no constraint is violated."""
    return f"infeasible: {', '.join(row.infeasible)}" if row.infeasible else ""


def incomplete(row: Row) -> str:
    """``1 FAIL, 1 PRUNED (0.7123)``: with the last values of those that were pruned."""
    parts = []
    for state, count in row.states.items():
        if count and state is not TrialState.COMPLETE:
            last = row.last if state is TrialState.PRUNED else ()
            values = ", ".join(mean_and_std(value, None) for value in last[:_SHOWN])
            parts.append(
                f"{count} {state}" + (f" ({values}{', …' if len(last) > _SHOWN else ''})" if last else "")
            )
    return ", ".join(parts)


def reproduced(row: Row) -> str:
    """``3 EXACT``: the verdicts on trials that were run again; empty for none."""
    return ", ".join(f"{count} {verdict}" for verdict, count in row.verdicts.items())


def columns(rows: Sequence[Row]) -> list[str]:
    """The names of all params, in the order in which the trials have them."""
    names: dict[str, None] = {}
    for row in sorted(rows, key=lambda each: each.trials[0]):
        names |= dict.fromkeys(row.params)
    return list(names)


def usual_direction(metric: str) -> Direction:
    """The direction in which a metric of this name is usually better: small for losses, errors and times."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", metric).lower()
    return Direction.MINIMIZE if _SMALLER_IS_BETTER.search(words) else Direction.MAXIMIZE


def point_of(point: str, params: Mapping[str, object]) -> str:
    """What all trials of a point have in common: its hash, or its params where it has none."""
    return point or json.dumps(dict(params), sort_keys=True, default=str)


def _row(group: Sequence[Entry], directions: Sequence[Direction], constraints: Sequence[Constraint]) -> Row:
    complete = [each for each in group if each.state is TrialState.COMPLETE and None not in each.values]
    values = {each.number: each.value for each in complete if each.value is not None}
    figures = [_mean_and_std([each.values[index] for each in complete]) for index in range(len(directions))]
    finite = {number: value for number, value in values.items() if math.isfinite(value)}
    sign = -1.0 if directions[0] is Direction.MAXIMIZE else 1.0
    states = dict.fromkeys(TrialState, 0)
    for each in group:
        states[each.state] += 1
    violations: list[tuple[float, str]] = []
    for index, constraint in enumerate(constraints if complete else ()):
        mean, _ = _mean_and_std([each.constrained[index] for each in complete])
        violations.append(_violation(constraint, mean))
    return Row(
        rank=None,
        params=group[0].params,
        mean=figures[0][0],
        std=figures[0][1],
        n=len(complete),
        best=min(finite, key=lambda number: (sign * finite[number], number), default=None),
        trials=tuple(each.number for each in group),
        states=states,
        means=tuple(mean for mean, _ in figures),
        stds=tuple(std for _, std in figures),
        violations=tuple(amount for amount, _ in violations),
        infeasible=tuple(text for _, text in violations if text),
        last=tuple(
            each.value for each in group if each.state is TrialState.PRUNED and each.value is not None
        ),
        verdicts=Counter(each.verdict for each in group if each.verdict is not None),
        sweep=group[0].sweep,
        values=tuple(values.values()),
    )


def _mean_and_std(some: Iterable[float | None]) -> tuple[float | None, float | None]:
    values = [value for value in some if value is not None]
    if not values:
        return None, None
    if not all(map(math.isfinite, values)):
        mean = sum(values) / len(values)
        return mean, math.nan if len(values) > 1 else None
    try:
        return _quickly(values)
    except OverflowError:  # of sums of the largest numbers
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def _quickly(values: Sequence[float]) -> tuple[float, float | None]:
    """What ``statistics`` has to within the last digit, in a tenth of the time: there are thousands of points."""
    mean = math.fsum(values) / len(values)
    mean += math.fsum(value - mean for value in values) / len(values)  # equal values have no spread at all
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _violation(constraint: Constraint, mean: float | None) -> tuple[float, str]:
    """By how much a mean violates a constraint, and the same in words, empty where it does not."""
    if mean is None:
        return math.inf, f"no {constraint.metric}"
    amount = constraint.violation(mean)
    if amount <= 0:
        return amount, ""
    sign = ">" if constraint.operator == "<=" else "<"
    text = f"{constraint.metric} {mean:.6g}" + ("" if math.isnan(mean) else f" {sign} {constraint.bound:.6g}")
    return (math.inf if math.isnan(amount) else amount), text


def _is_finite(row: Row) -> bool:
    return all(mean is not None and math.isfinite(mean) for mean in row.means)


def _ranked(rows: Sequence[Row], directions: Sequence[Direction], *, after: int) -> list[Row]:
    """Rows with finite means in their order, their ranks counted from ``after``."""
    points = [
        tuple(
            -(mean or 0.0) if direction is Direction.MAXIMIZE else mean or 0.0
            for mean, direction in zip(row.means, directions, strict=True)
        )
        for row in rows
    ]
    if len(directions) == 1:
        order = sorted(range(len(rows)), key=lambda index: (points[index], rows[index].trials[0]))
        return [_placed(rows[index], after + place) for place, index in enumerate(order, start=1)]
    fronts = non_dominated_fronts(points)
    order = sorted(
        range(len(rows)), key=lambda index: (fronts[index], points[index][0], rows[index].trials[0])
    )
    return [_placed(rows[index], after + fronts[index] + 1) for index in order]


def _placed(row: Row, rank: int) -> Row:
    """A row with its rank. Nobody has seen it yet, and a copy of each takes a third of the time of ranking."""
    object.__setattr__(row, "rank", rank)
    return row


# --- non-dominated sorting ------------------------------------------------------------------------------------


def non_dominated_fronts(points: Sequence[tuple[float, ...]]) -> list[int]:
    """The front of each point, counted from 0; all values are finite, and smaller ones are better.

    A point dominates another one if it is nowhere worse and somewhere better (Deb et al. 2002, "A fast and elitist
    multiobjective genetic algorithm"). Equal points are in one front.
    """
    distinct = sorted(set(points))
    if not distinct:
        return []
    sort: Callable[[list[tuple[float, ...]]], list[int]] = (
        _fronts_of_two if len(distinct[0]) == 2 else _fronts_of_many
    )
    found = dict(zip(distinct, sort(distinct), strict=True))
    return [found[point] for point in points]


def _fronts_of_two(points: list[tuple[float, ...]]) -> list[int]:
    """Of points in ascending order: one is dominated by those before it whose second value is not larger.

    So it belongs to the first front whose smallest second value so far is larger than its own; these grow from front
    to front (Jensen 2003, "Reducing the run-time complexity of multiobjective EAs").
    """
    smallest: list[float] = []
    fronts = []
    for _, second in points:
        front = bisect_right(smallest, second)
        smallest[front : front + 1] = [second]
        fronts.append(front)
    return fronts


def _fronts_of_many(points: list[tuple[float, ...]]) -> list[int]:
    """Take away the points that nothing dominates, again and again; each pair is compared at most twice."""
    import numpy as np

    values = np.asarray(points)

    def dominated_by(some: np.ndarray, others: np.ndarray) -> np.ndarray:
        """How many of some (distinct) points are nowhere worse than each of the others."""
        counts = np.zeros(len(others), dtype=np.int64)
        for start in range(0, len(some), _BLOCK):
            block = some[start : start + _BLOCK, None, :]
            counts += (block <= others).all(axis=2).sum(axis=0)
        return counts

    left = np.arange(len(values))
    dominators = dominated_by(values, values) - 1  # each is nowhere worse than itself
    fronts = np.zeros(len(values), dtype=np.int64)
    front = 0
    while len(left):
        is_first = dominators[left] == 0
        first, left = left[is_first], left[~is_first]
        fronts[first] = front
        dominators[left] -= dominated_by(values[first], values[left])
        front += 1
    return [int(each) for each in fronts]
