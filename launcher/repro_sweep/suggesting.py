"""Turns a sampler's suggestions into trials, and what becomes of the trials into what the sampler learns.

Pure: it reads and writes nothing. All that it knows comes from the calls made to it, which the ledger records as steps;
so it can be rebuilt from these at any time, and ``repro-sweep replay`` checks that they lead to the same suggestions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from repro_sweep.errors import CompositionError
from repro_sweep.points import Point
from repro_sweep.records import NewTrial, Report, Step
from repro_sweep.search.base import Search, Suggestion
from repro_sweep.search.pruning import Rungs
from repro_sweep.states import StepKind, TrialState
from repro_sweep.sweep import SweepSpec

_MOST_FRUITLESS = 200
"""So many suggestions in a row that are no new trial end the search: the sampler has nothing more to offer."""
_MOST_INVALID = 10
"""So many in a row whose config cannot be composed are a mistake in the space."""

Make = Callable[[Point, int], NewTrial]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an ask led to: steps to be recorded, with the new trials; ``over``: why there is nothing more.

    ``again``: trials that were no part of the sweep any more and are now. ``error``: the search cannot go on.
    """

    steps: tuple[tuple[StepKind, dict[str, Any]], ...] = ()
    trials: tuple[NewTrial, ...] = ()
    again: tuple[int, ...] = ()
    over: str | None = None
    error: str | None = None


@dataclass(slots=True)
class _Asked:
    """A suggestion: the trials that run it, and those of its repeats that have not begun."""

    trials: list[int] = field(default_factory=list)
    rest: list[Point] = field(default_factory=list)


class DifferenceError(Exception):
    """A recorded search does not lead to the suggestions that it records; the message says where."""


class Suggester:
    """One sweep's search, and its pruning.

    Args:
        spec: the sweep's record.
        search: None for a grid.
        rungs: decides about single trials; None where the search itself does, or nobody.
        make: composes a trial.
        identities: the number of each trial that the ledger holds, by its identity.
        withdrawn: those of these trials that are no part of the sweep any more: an earlier search has left them.
    """

    def __init__(
        self,
        spec: SweepSpec,
        search: Search | None,
        rungs: Rungs | None,
        make: Make,
        identities: Mapping[str, int] | None = None,
        withdrawn: Iterable[int] = (),
    ) -> None:
        self._spec = spec
        self._search = search
        self._rungs = rungs
        self._make = make
        self._numbers = dict(identities or {})
        self._withdrawn = set(withdrawn)
        self._metrics = [each.metric for each in spec.all_objectives]
        between = spec.search.repeats_pruner if spec.search is not None else None
        self._one_by_one = between is not None
        self._paired = between is not None and between.name == "wilcoxon"
        self._asked: list[_Asked] = []
        self._suggestions: dict[int, list[int]] = {}
        self._outcomes: dict[int, tuple[TrialState, Mapping[str, float]]] = {}
        self._ready: deque[int] = deque()
        self._after = 0

    # --- from the ledger -------------------------------------------------------------------------------------

    def rebuild(
        self,
        steps: Sequence[Step],
        reports: Callable[[int], Iterable[Report]],
        outcomes: Mapping[int, tuple[TrialState, Mapping[str, float]]],
        unfinished: Iterable[int] = (),
        *,
        verify: bool = False,
    ) -> int:
        """Take over what the steps record; returns how many suggestions these are.

        Args:
            steps: from the BEGIN on.
            reports: those of a trial, by its number.
            outcomes: of the trials that had ended before the search began.
            unfinished: the trials that have reported and not ended.
            verify: ask the sampler again instead of believing the record.

        Raises:
            DifferenceError: with ``verify``, if it suggests something else.
        """
        self._outcomes.update(outcomes)
        asks = [step for step in steps if step.kind in (StepKind.ASK, StepKind.MORE)]
        tells = deque(step for step in steps if step.kind is StepKind.TELL)
        if self._search is None:
            asks = []  # of a search that the sweep was before
        for step in steps[:1] if self._search is not None else ():
            if step.kind is StepKind.BEGIN:
                self._begin(step.data["known"])
        for step in asks:
            while tells and tells[0].seq <= step.data["after"]:
                self._retell(tells.popleft(), reports)
            self._retake(step, verify=verify)
        for step in tells:
            self._retell(step, reports)
        for number in unfinished:
            self._rereport(number, reports, decide=True)
        return len(self._asked)

    def _begin(self, known: Iterable[Mapping[str, Any]]) -> None:
        assert self._search is not None
        for each in known:
            self._search.learn(
                each["values"], TrialState(each["state"]), each["objectives"], each["violations"]
            )

    def _retake(self, step: Step, *, verify: bool) -> None:
        assert self._search is not None
        data = step.data
        if step.kind is StepKind.MORE:
            asked = self._asked[data["suggestion"]]
            del asked.rest[: len(data["trials"])]
            self._ready.remove(data["suggestion"])
            self._add_trials(data["suggestion"], data["trials"])
            return
        suggestion = self._verified(step) if verify else self._search.restore(data["values"])
        index = self._take()
        if data.get("refused"):
            if suggestion.points:
                self._search.tell(index, TrialState.FAIL, None)
            return
        self._asked[index].rest = list(suggestion.points[len(data["trials"]) :])
        self._add_trials(index, data["trials"])
        self._settle(index)

    def _verified(self, step: Step) -> Suggestion:
        assert self._search is not None
        index, recorded = step.data["suggestion"], step.data["values"]
        found = self._search.ask()
        values = None if found is None else dict(found.values)
        if found is None or values != recorded:
            raise DifferenceError(f"suggestion {index} was {recorded}, and is {values} now")
        return found

    def _retell(self, step: Step, reports: Callable[[int], Iterable[Report]]) -> None:
        data = step.data
        self._rereport(data["trial"], reports, decide=False)
        self.tell(step.seq, data["trial"], TrialState(data["state"]), data["metrics"])

    def _rereport(self, number: int, reports: Callable[[int], Iterable[Report]], *, decide: bool) -> None:
        if self._spec.pruner is None:
            return
        for report in reports(number):
            if self._metrics[0] in report.metrics:
                self.note(number, report.step, report.metrics[self._metrics[0]], decide=decide)

    # --- asking ----------------------------------------------------------------------------------------------

    def ask(self, number: int, *, new: bool = True) -> Answer:
        """The next trials, from this number on; without ``new`` only repeats of points that have begun."""
        if self._ready:
            return self._release(number)
        if not new or self._search is None:
            return Answer(over="nothing more is asked for")
        steps: list[tuple[StepKind, dict[str, Any]]] = []
        invalid = 0
        for _ in range(_MOST_FRUITLESS):
            suggestion = self._search.ask()
            if suggestion is None:
                return Answer(steps=tuple(steps), over="the sampler has tried every point")
            data, trials, problem = self._admit(suggestion, number)
            steps.append((StepKind.ASK, data))
            again = self._revive(data["trials"])
            if trials or again:
                return Answer(steps=tuple(steps), trials=tuple(trials), again=again)
            if self._ready:
                break
            invalid = invalid + 1 if problem else 0
            if invalid == _MOST_INVALID:
                return Answer(
                    steps=tuple(steps), error=f"{invalid} suggestions in a row cannot be run: {problem}"
                )
        if self._ready:
            released = self._release(number)
            return replace(released, steps=(*steps, *released.steps))
        return Answer(
            steps=tuple(steps),
            over=f"the last {_MOST_FRUITLESS} suggestions were points that are known already",
        )

    def _admit(
        self, suggestion: Suggestion, number: int
    ) -> tuple[dict[str, Any], list[NewTrial], str | None]:
        """Make a suggestion's trials, but for those that the sweep has; returns the step, and why it is refused."""
        assert self._search is not None
        index = self._take()
        data: dict[str, Any] = {
            "suggestion": index,
            "values": dict(suggestion.values),
            "trials": [],
            "repeats": len(suggestion.points),
            "after": self._after,
        }
        if not suggestion.points:
            return data | {"refused": "excluded"}, [], None
        now = suggestion.points[:1] if self._one_by_one else suggestion.points
        try:
            numbers, new = self._make_trials(now, number)
        except CompositionError as error:
            self._search.tell(index, TrialState.FAIL, None)
            return data | {"refused": str(error)}, [], str(error).splitlines()[0]
        self._asked[index].rest = list(suggestion.points[len(now) :])
        self._add_trials(index, numbers)
        self._settle(index)
        return data | {"trials": numbers}, new, None

    def _release(self, number: int) -> Answer:
        """Begin the next repeat of a point that is worth it."""
        index = self._ready.popleft()
        asked = self._asked[index]
        numbers, new = self._make_trials([asked.rest.pop(0)], number)
        self._add_trials(index, numbers)
        self._settle(index)
        step = (StepKind.MORE, {"suggestion": index, "trials": numbers, "after": self._after})
        return Answer(steps=(step,), trials=tuple(new), again=self._revive(numbers))

    def _revive(self, numbers: Iterable[int]) -> tuple[int, ...]:
        """Those of the trials that an earlier search has left unfinished: they are run after all."""
        again = tuple(number for number in numbers if number in self._withdrawn)
        self._withdrawn.difference_update(again)
        return again

    def _make_trials(self, points: Iterable[Point], number: int) -> tuple[list[int], list[NewTrial]]:
        numbers: list[int] = []
        new: dict[str, NewTrial] = {}
        for point in points:
            trial = self._make(point, number + len(new))
            known = self._numbers.get(trial.identity)
            if known is None:
                known = new.setdefault(trial.identity, trial).number
            numbers.append(known)
        self._numbers |= {identity: trial.number for identity, trial in new.items()}
        return numbers, list(new.values())

    def _take(self) -> int:
        self._asked.append(_Asked())
        return len(self._asked) - 1

    def _add_trials(self, index: int, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._asked[index].trials.append(number)
            self._suggestions.setdefault(number, []).append(index)

    # --- learning --------------------------------------------------------------------------------------------

    def tell(self, seq: int, number: int, state: TrialState, metrics: Mapping[str, float]) -> None:
        """A trial has ended, or has ended again; ``seq`` is that of the step which records it."""
        self._after = max(self._after, seq)
        self._outcomes[number] = (state, metrics)
        if self._rungs is not None:
            self._rungs.end(number, state, metrics.get(self._metrics[0]))
        for index in self._suggestions.get(number, ()):
            self._settle(index)

    def report(self, number: int, step: int, value: float) -> bool:
        """The first objective of a trial at a step; returns whether it is to be pruned."""
        self.note(number, step, value)
        if self._rungs is not None:
            return self._rungs.should_prune(number)
        if self._search is None or self._spec.pruner is None or number not in self._suggestions:
            return False
        return self._search.should_prune(self._suggestions[number][0])

    def note(self, number: int, step: int, value: float, *, decide: bool = True) -> None:
        """The same, where the trial does not wait for a verdict; without ``decide`` it has ended, and needs none."""
        if self._rungs is not None:
            self._rungs.add(number)
            self._rungs.report(number, step, value, decide=decide)
        elif self._search is not None and not self._spec.repeats:
            for index in self._suggestions.get(number, ()):
                self._search.report(index, step, value, decide=decide)

    def _settle(self, index: int) -> None:
        """Tell the sampler about a suggestion whose trials have all ended; or let its next repeat begin."""
        assert self._search is not None
        asked = self._asked[index]
        if not all(number in self._outcomes for number in asked.trials):
            return
        results = [self._outcomes[number] for number in asked.trials]
        state, values = self._combined(results)
        if state is TrialState.PRUNED:
            asked.rest.clear()
        if asked.rest:
            if index in self._ready:
                return
            if values is not None:
                last = self._combined(results[-1:])[1] if self._paired else values
                if last is not None:
                    self._search.report(index, len(results), last[0])
                if self._search.should_prune(index):
                    asked.rest.clear()
                    self._search.tell(index, TrialState.PRUNED, values)
                    return
            self._ready.append(index)
            return
        self._search.tell(index, state, values, self._violations(results))

    def _combined(
        self, results: Sequence[tuple[TrialState, Mapping[str, float]]]
    ) -> tuple[TrialState, list[float] | None]:
        """State and values of a point from its repeats': the means; a point with a pruned repeat is pruned."""
        counted = [
            metrics for state, metrics in results if state.is_done() and set(self._metrics) <= set(metrics)
        ]
        values = None
        if counted:
            values = [sum(metrics[name] for metrics in counted) / len(counted) for name in self._metrics]
        if any(state is TrialState.PRUNED for state, _ in results):
            return TrialState.PRUNED, values
        return (TrialState.FAIL, None) if values is None else (TrialState.COMPLETE, values)

    def _violations(self, results: Sequence[tuple[TrialState, Mapping[str, float]]]) -> list[float]:
        if self._spec.search is None:
            return []
        violations = []
        for constraint in self._spec.search.constraints:
            values = [
                metrics[constraint.metric] for state, metrics in results if constraint.metric in metrics
            ]
            if not values:
                return []
            violations.append(constraint.violation(sum(values) / len(values)))
        return violations
