"""When a search has done enough: its budget, counted from what was asked and what became of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from repro_sweep.states import Direction, TrialState
from repro_sweep.sweep import SweepSpec


@dataclass(slots=True)
class _Point:
    repeats: int
    trials: list[int] = field(default_factory=list)
    counted: bool = False


class Count:
    """Counts a search's trials and points. Owned by the coordinator.

    A point's values are the means over its repeats, once all of them have ended. Points with a violated constraint, and
    pruned and failed ones, improve nothing.
    """

    def __init__(self, spec: SweepSpec) -> None:
        assert spec.search is not None
        self._budget = spec.search.budget
        self._objectives = spec.all_objectives
        self._constraints = spec.search.constraints
        self._points: dict[int, _Point] = {}
        self._suggestions: dict[int, list[int]] = {}
        self._outcomes: dict[int, tuple[TrialState, Mapping[str, float]]] = {}
        self._front: list[list[float]] = []
        self._since_better = 0
        self._reached: int | None = None
        self.trials = 0
        """How many were asked for."""
        self.finished = 0
        """How many have ended."""

    def asked(self, suggestion: int, trials: Sequence[int], repeats: int = 1) -> None:
        """A suggestion with so many repeats is run by these trials (further ones, if it is known)."""
        point = self._points.setdefault(suggestion, _Point(repeats))
        for number in trials:
            point.trials.append(number)
            self.trials += number not in self._suggestions
            self._suggestions.setdefault(number, []).append(suggestion)
        self._count(suggestion)

    def told(self, number: int, state: TrialState, metrics: Mapping[str, float]) -> None:
        """A trial has ended."""
        self.finished += number not in self._outcomes
        self._outcomes[number] = (state, metrics)
        for suggestion in self._suggestions.get(number, ()):
            self._count(suggestion)

    def reached(self, hours: float) -> str | None:
        """Why nothing more shall begin after so many hours; None while it may."""
        budget = self._budget
        if budget.target is not None and self._reached is not None:
            return f"trial {self._reached} has reached the target {budget.target:g} (sweep.budget.target)"
        if budget.plateau is not None and self._since_better >= budget.plateau:
            return f"{self._since_better} points in a row were no better (sweep.budget.plateau)"
        if budget.hours is not None and hours >= budget.hours:
            return f"{budget.hours:g} h are over (sweep.budget.hours)"
        return None

    def full(self) -> str | None:
        """Why nothing more shall be asked for; None while it may."""
        return None if self.left() != 0 else f"{self._budget.trials} trials (sweep.budget.trials)"

    def left(self) -> int | None:
        """How many trials may still be asked for; None where that is not limited."""
        return None if self._budget.trials is None else max(0, self._budget.trials - self.trials)

    def _count(self, suggestion: int) -> None:
        point = self._points[suggestion]
        if not point.trials or not all(number in self._outcomes for number in point.trials):
            return
        values = self._values(point)
        improves = values is not None and self._improves(values)
        if improves and len(point.trials) < point.repeats:
            return  # its other repeats will tell
        if values is None or not improves:
            self._since_better += not point.counted
            point.counted = True
            return
        point.counted = True
        self._since_better = 0
        self._front = [each for each in self._front if not _dominates(values, each)] + [values]
        target, first = self._budget.target, self._objectives[0].direction
        if target is not None and self._reached is None and values[0] <= _smaller_is_better(target, first):
            self._reached = point.trials[0]

    def _values(self, point: _Point) -> list[float] | None:
        """The means of the objectives, turned so that smaller is better; None where the point is no result."""
        results = [self._outcomes[number] for number in point.trials]
        complete = [metrics for state, metrics in results if state is TrialState.COMPLETE]
        if not complete or any(state is TrialState.PRUNED for state, _ in results):
            return None
        for constraint in self._constraints:
            values = [metrics[constraint.metric] for metrics in complete if constraint.metric in metrics]
            if not values or constraint.violation(sum(values) / len(values)) > 0:
                return None
        means = []
        for objective in self._objectives:
            if not all(objective.metric in metrics for metrics in complete):
                return None
            mean = sum(metrics[objective.metric] for metrics in complete) / len(complete)
            means.append(_smaller_is_better(mean, objective.direction))
        return means

    def _improves(self, values: list[float]) -> bool:
        return not any(_dominates(each, values) or each == values for each in self._front)


def _smaller_is_better(value: float, direction: Direction) -> float:
    return -value if direction is Direction.MAXIMIZE else value


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and list(one) != list(other)
