"""What a benchmark found, and its Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

OURS = "repro-sweep"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One system's figure, in the unit of its table."""

    system: str
    value: float
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A figure of ours that must not be larger than ``limit``."""

    what: str
    value: float
    limit: float
    unit: str

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.value <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A benchmark's result. Ratios refer to the row called :data:`OURS` and to ``ideal``, the physical bound.

    Where one figure for each system is not enough, ``grid`` is shown instead: a header and lines of the same length.
    """

    title: str
    text: str
    unit: str
    rows: Sequence[Row]
    ideal: float | None = None
    ideal_is: str = ""
    targets: Sequence[Target] = field(default_factory=tuple)
    grid: Sequence[Sequence[str]] = ()


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def markdown(table: Table) -> str:
    """The table with its text and its targets."""
    shown = _grid(table.grid[0], table.grid[1:]) if table.grid else _rows(table)
    parts = [f"## {table.title}", table.text, shown]
    parts += ["\n".join(_verdict(target) for target in table.targets)] if table.targets else []
    return "\n\n".join(parts) + "\n"


def _rows(table: Table) -> str:
    ours = next((row.value for row in table.rows if row.system == OURS), None)
    header = ["system", table.unit, f"/ {OURS}"]
    lines: list[list[str]] = []
    if table.ideal is not None:
        header.append("/ ideal")
        lines.append([f"*ideal: {table.ideal_is}*", number(table.ideal), _ratio(table.ideal, ours), "1.00"])
    for row in table.rows:
        cells = [
            f"**{row.system}**" if row.system == OURS else row.system,
            number(row.value),
            _ratio(row.value, ours),
        ]
        if table.ideal is not None:
            cells.append(_ratio(row.value, table.ideal))
        lines.append(cells)
    if any(row.note for row in table.rows):
        header.append("remarks")
        notes = [""] * (table.ideal is not None) + [row.note for row in table.rows]
        lines = [[*cells, note] for cells, note in zip(lines, notes, strict=True)]
    return _grid(header, lines)


def _verdict(target: Target) -> str:
    verdict = "reached" if target.met else "**MISSED**"
    limit, value = (f"{number(figure)} {target.unit}".strip() for figure in (target.limit, target.value))
    return f"- Target: {target.what} at most {limit}; measured {value}: {verdict}."


def _ratio(value: float, base: float | None) -> str:
    return "" if not base else number(value / base)


def _grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cells[column]) for cells in (header, *lines)) for column in range(len(header))]
    numeric = range(1, len(header) - (header[-1] == "remarks"))

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if column in numeric else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width - 1) + ":" if column in numeric else "-" * width for column, width in enumerate(widths)
    ]
    return "\n".join([line(header), line(rule), *map(line, lines)])
