"""``repro-sweep rank NAME``: the ranking of a sweep, from MLflow."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from repro_sweep.cli.arguments import Parser, at_least

if TYPE_CHECKING:
    from repro_sweep.ranking import Ranking
    from repro_sweep.standings import Row


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        TrackingError: there is no such sweep or metric, or MLflow cannot be read.
    """
    parser = Parser(prog="repro-sweep rank", description="The points of a sweep, best first.")
    parser.add_argument("name", help="the sweep's name")
    parser.add_argument("--metric", help="by default the sweep's own")
    parser.add_argument(
        "--direction",
        choices=["maximize", "minimize"],
        help="by default the sweep's own, or what is usual for the name of another metric",
    )
    parser.add_argument("--top", type=partial(at_least, 1), metavar="N", help="only the best N points")
    parser.add_argument("--format", choices=["table", "json", "csv"], default="table")
    parser.add_argument(
        "--uri", help="the MLflow tracking URI (default: MLFLOW_TRACKING_URI, else mlflow.db here)"
    )
    args = parser.parse_args(arguments)

    from repro_sweep.ranking import rank

    ranking = rank(args.name, metric=args.metric, direction=args.direction, top=args.top, uri=args.uri)
    {"table": _print_table, "json": _print_json, "csv": _print_csv}[args.format](ranking)
    return 0


def _print_table(ranking: Ranking) -> None:
    from repro_sweep.cli.rankings import table

    print(f"{ranking.sweep}: {ranking.metric}, {ranking.direction}")
    print(table(ranking.rows, ranking.metric) or "no trials yet")


def _print_json(ranking: Ranking) -> None:
    document = {
        "sweep": ranking.sweep,
        "metric": ranking.metric,
        "direction": ranking.direction,
        "points": [
            {**_record(row), "params": dict(row.params), "trials": list(row.trials)} for row in ranking.rows
        ],
    }
    json.dump(document, sys.stdout, indent=2, default=str)
    print()


def _print_csv(ranking: Ranking) -> None:
    figures = ["rank", "mean", "std", "n"]
    states = [name for name in (_record(ranking.rows[0]) if ranking.rows else {}) if name not in figures]
    writer = csv.writer(sys.stdout)
    writer.writerow([*figures, *states, "trials", *(f"params.{name}" for name in ranking.params)])
    for row in ranking.rows:
        record = _record(row)
        params = [_cell(row.params, name) for name in ranking.params]
        writer.writerow(
            [*(record[name] for name in (*figures, *states)), " ".join(map(str, row.trials)), *params]
        )


def _record(row: Row) -> dict[str, object]:
    """The figures of a row; JSON has no NaN and no infinities, so these are text."""
    states = {state.lower(): count for state, count in row.states.items()}
    return {"rank": row.rank, "mean": _number(row.mean), "std": _number(row.std), "n": row.n, **states}


def _number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _cell(params: Mapping[str, object], name: str) -> object:
    return params.get(name, "")
