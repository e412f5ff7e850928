"""What every searcher must do."""

from __future__ import annotations

from abc import ABC, abstractmethod

from repro_sweep.points import Point
from repro_sweep.search.base import Searcher
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
