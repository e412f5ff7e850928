"""A ranking as text: for the end of a sweep and for ``repro-sweep rank``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from repro_sweep.standings import (
    Row,
    columns,
    incomplete,
    infeasible_text,
    mean_and_std,
    reproduced,
    trials_text,
    value_text,
)

_TRIALS = 5
_LONG_NUMBER = 10
"""A sampler's numbers have up to 17 digits; JSON and CSV have all of them."""


def table(rows: Sequence[Row], metrics: Sequence[str], *, grouped: bool = False) -> str:
    """An aligned table, a line for each point (or group of them) with the means of these metrics; empty for none.

    Columns that are empty in all lines are left out, but for those of params and metrics.
    """
    if not rows:
        return ""
    columns_of = [
        ("#", ["-" if row.rank is None else str(row.rank) for row in rows]),
        *_optional("sweep", [row.sweep for row in rows]),
        *((name, [_value(row.params, name) for row in rows]) for name in columns(rows)),
        *(
            (name, [mean_and_std(row.means[index], row.stds[index]) for row in rows])
            for index, name in enumerate(metrics)
        ),
        ("n", [str(row.n) for row in rows]),
        *(_of_groups(rows) if grouped else ()),
        ("trials", [trials_text(row.trials, _TRIALS, ",") for row in rows]),
        *_optional("not complete", [incomplete(row) if row.n < len(row.trials) else "" for row in rows]),
        *_optional("reproduced", [reproduced(row) for row in rows]),
        *_optional("", [infeasible_text(row) for row in rows]),
    ]
    lines = [[head for head, _ in columns_of], *zip(*(cells for _, cells in columns_of), strict=True)]
    widths = [max(map(len, (head, *cells))) for head, cells in columns_of]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _optional(head: str, cells: list[str]) -> list[tuple[str, list[str]]]:
    return [(head, cells)] if any(cells) else []


def _of_groups(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    best = [mean_and_std(row.best_mean, None) for row in rows]
    return [("points", [str(row.points) for row in rows]), ("best point", best)]


def _value(params: Mapping[str, object], name: str) -> str:
    if name not in params:
        return ""
    value = params[name]
    text = str(value)
    return value_text(value) if len(text) > _LONG_NUMBER else text
