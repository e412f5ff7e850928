"""A ranking as text: for the end of a sweep and for ``repro-sweep rank``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from repro_sweep.standings import Row, columns, incomplete, mean_and_std, reproduced

_LONG_NUMBER = 10
"""A sampler's numbers have up to 17 digits; JSON and CSV have all of them."""


def table(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """An aligned table, a line for each point with the means of these metrics; empty for no points."""
    if not rows:
        return ""
    params = columns(rows)
    head = ["#", *params, *metrics, "n", "trials"]
    failures = any(row.n < len(row.trials) for row in rows)
    if failures:
        head.append("not complete")
    again = any(row.verdicts for row in rows)
    if again:
        head.append("reproduced")
    infeasible = any(row.infeasible for row in rows)
    if infeasible:
        head.append("")
    lines = [head]
    for row in rows:
        cells = ["-" if row.rank is None else str(row.rank), *(_value(row.params, name) for name in params)]
        cells += map(mean_and_std, row.means, row.stds)
        cells += [str(row.n), _numbers(row.trials)]
        cells += [incomplete(row)] if failures else []
        cells += [reproduced(row)] if again else []
        lines.append([*cells, violated(row)] if infeasible else cells)
    widths = [max(len(line[index]) for line in lines) for index in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def violated(row: Row) -> str:
    """``infeasible: latency_ms 61 > 50``; empty where no constraint is violated."""
    return f"infeasible: {', '.join(row.infeasible)}" if row.infeasible else ""


def _value(params: Mapping[str, object], name: str) -> str:
    if name not in params:
        return ""
    value = params[name]
    text = str(value)
    return f"{value:.6g}" if isinstance(value, float) and len(text) > _LONG_NUMBER else text


def _numbers(trials: Sequence[int]) -> str:
    shown = ",".join(map(str, trials[:5]))
    return shown if len(trials) <= 5 else f"{shown},… ({len(trials)})"
