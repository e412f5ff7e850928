"""What every searcher, and every search, must do."""

from __future__ import annotations

from abc import ABC, abstractmethod

from repro_sweep.points import Point
from repro_sweep.search.base import Search, Searcher, Suggestion
from repro_sweep.states import TrialState


class SearcherConformance(ABC):
    """Subclass it as ``class TestMine(SearcherConformance)``."""

    @abstractmethod
    def create(self) -> Searcher:
        """A fresh searcher over a space of at least two points."""

    def test_a_point_is_a_whole_list_of_overrides(self) -> None:
        point = self.create().ask()
        assert isinstance(point, Point)
        assert point.overrides
        assert all(isinstance(override, str) for override in point.overrides)

    def test_two_searchers_that_are_told_the_same_ask_the_same(self) -> None:
        one, other = self.create(), self.create()
        for number in range(2):
            first, second = one.ask(), other.ask()
            assert first == second
            for searcher in (one, other):
                searcher.tell(number, TrialState.COMPLETE, [float(number)])

    def test_it_can_be_asked_again_before_it_is_told_anything(self) -> None:
        searcher = self.create()
        assert searcher.ask() is not None
        assert searcher.ask() is not None

    def test_trials_may_be_told_in_any_order_and_in_any_final_state(self) -> None:
        searcher = self.create()
        searcher.ask()
        searcher.ask()
        searcher.tell(1, TrialState.FAIL, None)
        searcher.tell(0, TrialState.COMPLETE, [0.5])


class SearchConformance(ABC):
    """Subclass it as ``class TestMine(SearchConformance)``."""

    @abstractmethod
    def create(self) -> Search:
        """A fresh search over a space of at least twenty points, with one objective; always the same."""

    def test_a_suggestion_is_what_was_chosen_and_the_points_to_run(self) -> None:
        suggestion = self._ask(self.create())
        assert suggestion.values
        assert suggestion.points
        for point in suggestion.points:
            assert isinstance(point, Point)
            assert all(isinstance(override, str) for override in point.overrides)

    def test_it_can_be_asked_again_before_it_is_told_anything(self) -> None:
        search = self.create()
        asked = [self._ask(search) for _ in range(4)]
        assert len({tuple(item.values.items()) for item in asked}) > 1

    def test_the_same_calls_lead_to_the_same_suggestions(self) -> None:
        assert self._run(self.create(), 12) == self._run(self.create(), 12)

    def test_a_search_that_is_restored_goes_on_as_if_it_had_never_ended(self) -> None:
        whole = self._run(self.create(), 14)
        for kept in (1, 6, 11):
            search = self.create()
            assert self._run(search, kept, restored=whole) == whole[:kept]
            assert self._ask(search) == whole[kept]

    def test_suggestions_may_be_told_in_any_order_in_any_final_state_and_again(self) -> None:
        search = self.create()
        for _ in range(4):
            self._ask(search)
        search.tell(2, TrialState.FAIL, None)
        search.tell(0, TrialState.COMPLETE, [0.5])
        search.tell(3, TrialState.PRUNED, [0.25])
        search.tell(1, TrialState.PRUNED, None)
        search.tell(2, TrialState.COMPLETE, [0.75])
        search.tell(0, TrialState.FAIL, None)
        assert self._ask(search).values

    def test_a_report_may_come_at_any_time_and_asking_whether_to_prune_changes_nothing(self) -> None:
        search = self.create()
        self._ask(search)
        search.report(0, 0, 1.0)
        search.report(0, 0, 2.0)
        answer = search.should_prune(0)
        assert isinstance(answer, bool)
        assert search.should_prune(0) == answer
        search.tell(0, TrialState.COMPLETE, [1.0])
        search.report(0, 1, 1.0)
        assert self._ask(search).values

    def _run(self, search: Search, asks: int, restored: list[Suggestion] | None = None) -> list[Suggestion]:
        """Two suggestions run at a time; the first ``asks`` are made, or made again."""
        made: list[Suggestion] = []
        for number in range(asks):
            made.append(search.restore(restored[number].values) if restored else self._ask(search))
            if number:
                search.report(number - 1, 0, float(number % 5))
                search.tell(number - 1, TrialState.COMPLETE, [float(number % 5)])
        return made

    @staticmethod
    def _ask(search: Search) -> Suggestion:
        suggestion = search.ask()
        assert suggestion is not None
        return suggestion
