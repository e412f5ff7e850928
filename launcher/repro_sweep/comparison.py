"""Whether two runs of a trial came out the same: every metric at every step, as IEEE 754 bits."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from repro_sweep.states import Verdict

Curves = Mapping[str, Mapping[int, float]]
"""Values of metrics by their names, then by their steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first value that differs; None: it is not there."""

    metric: str
    step: int
    was: float | None
    now: float | None

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


def compare(before: Curves, now: Curves, *, rtol: float = 0.0, until: int | None = None) -> Comparison:
    """Compare all values, in the order of their steps.

    Args:
        before: the original's.
        now: those of its repetition.
        rtol: how far apart two values may be, relative to the larger one, to be within tolerance.
        until: nothing later than this step is compared.
    """
    keys = sorted(
        {
            (step, metric)
            for curves in (before, now)
            for metric, values in curves.items()
            for step in values
            if until is None or step <= until
        }
    )
    if not keys:
        return Comparison(verdict=Verdict.UNVERIFIABLE, values=0)
    first: Difference | None = None
    verdict = Verdict.EXACT
    for step, metric in keys:
        was, here = before.get(metric, {}).get(step), now.get(metric, {}).get(step)
        if was is not None and here is not None and _same_bits(was, here):
            continue
        if first is None:
            first = Difference(metric=metric, step=step, was=was, now=here)
            verdict = Verdict.WITHIN_TOLERANCE
        if was is None or here is None or not _near(was, here, rtol):
            return Comparison(
                verdict=Verdict.DIFFERS,
                values=len(keys),
                first=Difference(metric=metric, step=step, was=was, now=here) if rtol else first,
            )
    return Comparison(verdict=verdict, values=len(keys), first=first)


def _same_bits(one: float, other: float) -> bool:
    """MLflow keeps no payload of a NaN, so all of these are the same."""
    return struct.pack("<d", one) == struct.pack("<d", other) or (math.isnan(one) and math.isnan(other))


def _near(one: float, other: float, rtol: float) -> bool:
    return rtol > 0 and math.isclose(one, other, rel_tol=rtol, abs_tol=0.0)


def _shown(value: float | None) -> str:
    return "nothing" if value is None else f"{value!r} ({value.hex()})"
