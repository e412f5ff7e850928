"""Ranking points by their mean over repeats: pure, so that it serves the ledger and MLflow alike."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from repro_sweep.states import Direction, TrialState

_SMALLER_IS_BETTER = re.compile(
    r"(^|[^a-z])(loss|losses|error|errors|err|mae|mse|rmse|mape|nll|perplexity|ppl|bpc|wer|cer|fid|latency|time|seconds"
    r"|duration|regret|distance)([^a-z]|$)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What ranking needs of one trial; ``value`` is None where it has none.

    ``point`` is the same for all repeats of a point; where it is empty, equal ``params`` make a point.
    """

    number: int
    params: Mapping[str, object]
    state: TrialState
    value: float | None
    point: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One point with all its repeats.

    ``rank`` counts from 1 and is None where there is no finite mean. ``mean`` and ``std`` (with one degree of freedom
    taken off, None of fewer than two values) are over the ``n`` complete trials that have a value; pruned and failed
    ones count nowhere but in ``states``. ``best`` is the complete trial with the best value.
    """

    rank: int | None
    params: Mapping[str, object]
    mean: float | None
    std: float | None
    n: int
    best: int | None
    trials: tuple[int, ...]
    states: Mapping[TrialState, int]


def rank_points(entries: Iterable[Entry], direction: Direction) -> list[Row]:
    """Group trials by their points and order the groups.

    Points with a finite mean come first, best mean first. Then those whose mean is not finite, then those without any
    value. Ties are ordered by the lowest trial number.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda each: each.number):
        groups.setdefault(entry.point or _key(entry.params), []).append(entry)
    rows = [_row(group, direction) for group in groups.values()]
    rows.sort(key=lambda row: (_place(row, direction), row.trials[0]))
    ranked: list[Row] = []
    for index, row in enumerate(rows, start=1):
        has_rank = row.mean is not None and math.isfinite(row.mean)
        ranked.append(replace(row, rank=index if has_rank else None))
    return ranked


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


def _key(params: Mapping[str, object]) -> str:
    return json.dumps(dict(params), sort_keys=True, default=str)


def _row(group: Sequence[Entry], direction: Direction) -> Row:
    complete = {each.number: each.value for each in group if each.state is TrialState.COMPLETE}
    values = {number: value for number, value in complete.items() if value is not None}
    mean, std = _mean_and_std(list(values.values()))
    finite = {number: value for number, value in values.items() if math.isfinite(value)}
    sign = -1.0 if direction is Direction.MAXIMIZE else 1.0
    states = dict.fromkeys(TrialState, 0)
    for each in group:
        states[each.state] += 1
    return Row(
        rank=None,
        params=group[0].params,
        mean=mean,
        std=std,
        n=len(values),
        best=min(finite, key=lambda number: (sign * finite[number], number), default=None),
        trials=tuple(each.number for each in group),
        states=states,
    )


def _mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    if not all(map(math.isfinite, values)):
        mean = sum(values) / len(values)
        return mean, math.nan if len(values) > 1 else None
    mean = statistics.mean(values)
    return mean, statistics.stdev(values) if len(values) > 1 else None


def _place(row: Row, direction: Direction) -> tuple[int, float]:
    if row.mean is None:
        return 2, 0.0
    if not math.isfinite(row.mean):
        return 1, 0.0
    return 0, -row.mean if direction is Direction.MAXIMIZE else row.mean
