"""Whether two runs of a trial came out the same: every metric at every step, as IEEE 754 bits."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from repro_sweep.states import Verdict

Curves: TypeAlias = Mapping[str, Mapping[int, Sequence[float]]]
"""Values of metrics by their names, then by their steps: at a step all that were logged, in any order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first value that differs; None: it is not there."""

    metric: str
    step: int
    was: float | None
    now: float | None

    @classmethod
    def parse(cls, document: Mapping[str, Any] | None) -> Difference | None:
        """One that ``repro-sweep reproduce --format json`` has written, or none."""
        if document is None:
            return None
        was, now = (None if document[key] is None else float(document[key]) for key in ("was", "now"))
        return cls(metric=document["metric"], step=document["step"], was=was, now=now)

    def __str__(self) -> str:
        where = f"{self.metric} at step {self.step}"
        if self.was is None or self.now is None:
            return f"{where}: {_shown(self.was)} before, {_shown(self.now)} now"
        largest = max(abs(self.was), abs(self.now))
        relative = (
            f" (relative difference {abs(self.was - self.now) / largest:.1e})"
            if math.isfinite(largest) and largest
            else ""
        )
        return f"{where}: {_shown(self.was)} before, {_shown(self.now)} now{relative}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The verdict on two runs, how many values were compared, and the first one that differs."""

    verdict: Verdict
    values: int
    first: Difference | None = None


def compare(before: Curves, now: Curves, *, rtol: float = 0.0, cut: bool = False) -> Comparison:
    """Compare all values, in the order of their steps.

    Args:
        before: the original's.
        now: those of its repetition.
        rtol: how far apart two values may be, relative to the larger one, to be within tolerance.
        cut: the original was ended before its own end, so what only its repetition has is not compared.
    """
    both = (before,) if cut else (before, now)
    keys = sorted({(step, metric) for curves in both for metric, values in curves.items() for step in values})
    if not keys:
        return Comparison(verdict=Verdict.UNVERIFIABLE, values=0)
    first: Difference | None = None
    verdict = Verdict.EXACT
    for step, metric in keys:
        was, here = before.get(metric, {}).get(step, ()), now.get(metric, {}).get(step, ())
        if {*map(_bits, was)} == {*map(_bits, here)}:
            continue
        found = Difference(metric=metric, step=step, was=_only_in(was, here), now=_only_in(here, was))
        if first is None:
            first = found
            verdict = Verdict.WITHIN_TOLERANCE
        if not _near(was, here, rtol):
            return Comparison(verdict=Verdict.DIFFERS, values=len(keys), first=found if rtol else first)
    return Comparison(verdict=verdict, values=len(keys), first=first)


def _bits(value: float) -> bytes:
    """MLflow keeps no payload of a NaN, so all of these are the same."""
    return struct.pack("<d", math.nan if math.isnan(value) else value)


def _only_in(some: Sequence[float], others: Sequence[float]) -> float | None:
    """A value that the others do not have; where there is none, the last one."""
    known = {*map(_bits, others)}
    return next((value for value in some if _bits(value) not in known), some[-1] if some else None)


def _near(some: Sequence[float], others: Sequence[float], rtol: float) -> bool:
    pairs = list(zip(sorted(some), sorted(others), strict=False))
    close = (math.isclose(one, other, rel_tol=rtol, abs_tol=0.0) for one, other in pairs)
    return rtol > 0 and len(some) == len(others) and all(close)


def _shown(value: float | None) -> str:
    return "nothing" if value is None else f"{value!r} ({value.hex()})"
