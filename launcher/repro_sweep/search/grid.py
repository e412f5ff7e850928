"""The grid: every point of the space, once, in the space's order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from repro_sweep.points import Point
from repro_sweep.search.base import Searcher
from repro_sweep.states import TrialState


@dataclass
class GridConf:
    """The options of ``sweep/sampler=grid``: only its name, by which it is found again."""

    name: str = "grid"


class GridSearcher(Searcher):
    """Hands out the points of an iterable one by one and never holds them.

    Args:
        points: such as a ``Space``; it is iterated once.
    """

    def __init__(self, points: Iterable[Point]) -> None:
        self._points = iter(points)

    def ask(self) -> Point | None:
        """The next point of the space, or None after its last one.

        Raises:
            SpaceError: ``exclude`` has dropped every point.
        """
        return next(self._points, None)

    def tell(self, number: int, state: TrialState, values: Sequence[float] | None) -> None:
        """Nothing: a grid does not depend on what became of its points."""


OPTIONS = GridConf
SEARCHER = GridSearcher
