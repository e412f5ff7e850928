"""A ranking as text: for the end of a sweep and for ``repro-sweep rank``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from repro_sweep.standings import Row, columns
from repro_sweep.states import TrialState


def table(rows: Sequence[Row], metric: str) -> str:
    """An aligned table, a line for each point; empty for no points."""
    if not rows:
        return ""
    params = columns(rows)
    head = ["#", *params, metric, "n", "trials"]
    failures = any(row.n < len(row.trials) for row in rows)
    if failures:
        head.append("not complete")
    lines = [head]
    for row in rows:
        cells = ["-" if row.rank is None else str(row.rank), *(_value(row.params, name) for name in params)]
        cells += [mean_and_std(row), str(row.n), _numbers(row.trials)]
        lines.append([*cells, _incomplete(row)] if failures else cells)
    widths = [max(len(line[index]) for line in lines) for index in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def mean_and_std(row: Row) -> str:
    """``0.9861 ± 0.0012``; without the second half for a single value, ``-`` for none."""
    if row.mean is None:
        return "-"
    digits = 5 if row.std is None or not math.isfinite(row.std) else 4
    text = f"{row.mean:.{digits}g}" if abs(row.mean) >= 1000 or abs(row.mean) < 0.01 else f"{row.mean:.4f}"
    if row.std is None:
        return text
    spread = f"{row.std:.4f}" if 0.0001 <= row.std < 1000 or row.std == 0 else f"{row.std:.2g}"
    return f"{text} ± {spread}"


def _value(params: Mapping[str, object], name: str) -> str:
    return str(params[name]) if name in params else ""


def _numbers(trials: Sequence[int]) -> str:
    shown = ",".join(map(str, trials[:5]))
    return shown if len(trials) <= 5 else f"{shown},… ({len(trials)})"


def _incomplete(row: Row) -> str:
    parts = [
        f"{count} {state}"
        for state, count in row.states.items()
        if count and state is not TrialState.COMPLETE
    ]
    return ", ".join(parts)
