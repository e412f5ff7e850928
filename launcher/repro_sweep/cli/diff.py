"""``repro-sweep diff TRIAL TRIAL``: config, code, environment, data and metrics of two trials side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from repro_sweep.cli.arguments import Parser

if TYPE_CHECKING:
    from repro_sweep.differing import Line

_WIDEST = 60


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 1 if anything differs.

    Raises:
        ReproSweepError: there is no such trial, or MLflow cannot be read.
    """
    parser = Parser(
        prog="repro-sweep diff",
        description="What two trials do not have in common. Exit status: 0 nothing, 1 something.",
    )
    for name in ("one", "other"):
        parser.add_argument(
            name, metavar="TRIAL", help="SWEEP/NUMBER, 'best of SWEEP' (quoted), or the id of an MLflow run"
        )
    parser.add_argument("--format", choices=["text", "json"], default="text")
    parser.add_argument(
        "--uri", help="the MLflow tracking URI (default: MLFLOW_TRACKING_URI, else mlflow.db here)"
    )
    args = parser.parse_args(arguments)

    from repro_sweep import originals
    from repro_sweep.differing import diff
    from repro_sweep.results import reading_uri

    uri = reading_uri(args.uri)
    one, other = originals.load([originals.find(args.one, uri), originals.find(args.other, uri)])
    found = diff(one, other)
    if args.format == "json":
        json.dump(
            {name: [asdict(line) for line in lines] for name, lines in found.items()}, sys.stdout, indent=2
        )
        print()
    else:
        print(_text(one.name, other.name, found))
    return int(any(found.values()))


def _text(one: str, other: str, found: Mapping[str, Sequence[Line]]) -> str:
    parts = []
    for name, lines in found.items():
        if not lines:
            parts.append(f"{name}: the same")
            continue
        rows = [("", one, other), *((line.what, _short(line.one), _short(line.other)) for line in lines)]
        widths = [max(len(row[index]) for row in rows) for index in range(3)]
        parts.append(f"{name}:")
        for row, line in zip(rows, (None, *lines), strict=True):
            parts.append(
                "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            )
            if line is not None and line.text:
                parts += [f"    {each}" for each in line.text.splitlines()]
    return "\n".join(parts)


def _short(value: str | None) -> str:
    if value is None:
        return "-"
    return value if len(value) <= _WIDEST else f"{value[: _WIDEST - 1]}…"
