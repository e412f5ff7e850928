"""One point of a sweep's space: what a trial is made from.

It stands alone so that the space, which makes points, and the searchers, which hand them out, need not know
each other. Nothing here may import Hydra or any other heavy library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point of the space.

    ``overrides`` is the trial's whole list of Hydra overrides, fixed ones included, as Hydra's BasicSweeper
    would hand it to its launcher. ``params`` and ``repeat`` hold plain Python values for display and
    ranking, by key without ``+``, ``++`` or ``~``: those of the keys of ``sweep.params`` and of all other
    swept keys, and those of ``sweep.repeats``. The mappings must not be changed.
    """

    overrides: tuple[str, ...]
    params: Mapping[str, object]
    repeat: Mapping[str, object]
