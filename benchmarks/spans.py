"""How full slots were, and how long one waited for its next trial. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A trial that ran from one moment to another, seconds UTC; its number and its slot where these are known."""

    started_s: float
    ended_s: float
    trial: int = -1
    slot: str = ""


def busy_share(spans: Sequence[Span], slots: int) -> float:
    """Which part of the slots' time was filled, from the first start to the last one (no slot lacks a trial later)."""
    first, last = min(span.started_s for span in spans), max(span.started_s for span in spans)
    busy = sum(min(span.ended_s, last) - span.started_s for span in spans)
    return busy / (slots * (last - first))


def handouts(spans: Iterable[Span]) -> list[float]:
    """Seconds from the end of each trial to the start of the next one on its slot."""
    by_slot: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: span.started_s):
        by_slot.setdefault(span.slot, []).append(span)
    return [after.started_s - before.ended_s for row in by_slot.values() for before, after in pairwise(row)]


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
