"""``repro-sweep rank NAME...``: the ranking of a sweep, or of several, from MLflow."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from repro_sweep.cli.arguments import Parser, at_least
from repro_sweep.states import TrialState
from repro_sweep.tracking.encoding import json_number

if TYPE_CHECKING:
    from repro_sweep.ranking import Ranking
    from repro_sweep.standings import Row


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        TrackingError: there is no such sweep or metric, or MLflow cannot be read.
    """
    parser = Parser(prog="repro-sweep rank", description="The points of a sweep, best first.")
    parser.add_argument(
        "name", nargs="+", help="the sweep's name, USER/NAME for that user's; several are ranked together"
    )
    parser.add_argument(
        "--metric",
        help="rank by this one alone; by default by the sweep's own, of several by their Pareto front",
    )
    parser.add_argument(
        "--direction",
        choices=["maximize", "minimize"],
        help="by default the sweep's own, or what is usual for the name of another metric",
    )
    parser.add_argument("--top", type=partial(at_least, 1), metavar="N", help="only the best N points")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITIONS",
        help="only these, such as 'optimizer=Adam, val_loss<0.5' (may be repeated; all must hold)",
    )
    parser.add_argument(
        "--by", default=[], metavar="PARAMS", help="group by these params, by the mean of all their trials"
    )
    parser.add_argument("--format", choices=["table", "json", "csv"], default="table")
    parser.add_argument(
        "--uri", help="the MLflow tracking URI (default: MLFLOW_TRACKING_URI, else mlflow.db here)"
    )
    args = parser.parse_args(arguments)

    from repro_sweep.ranking import rank

    ranking = rank(
        args.name, metric=args.metric, direction=args.direction, top=args.top, where=args.where, by=args.by,
        uri=args.uri,
    )  # fmt: skip
    {"table": _print_table, "json": _print_json, "csv": _print_csv}[args.format](ranking)
    return 0


def _print_table(ranking: Ranking) -> None:
    from repro_sweep.cli.rankings import table
    from repro_sweep.standings import front_text

    several = len(ranking.objectives) > 1
    by = (
        front_text(ranking.objectives, ranking.front) if several else f"{ranking.metric}, {ranking.direction}"
    )
    print(f"{ranking.sweep}: {by}")
    metrics = [each.metric for each in ranking.objectives]
    print(table(ranking.rows, metrics, grouped=bool(ranking.by)) or "no trials")
    if ranking.test is not None:
        print(ranking.test.text)


def _print_json(ranking: Ranking) -> None:
    document = {
        "sweep": ranking.sweep,
        "sweeps": list(ranking.sweeps),
        "metric": ranking.metric,
        "direction": ranking.direction,
        "objectives": [each.model_dump() for each in ranking.objectives],
        "constraints": [each.model_dump() for each in ranking.constraints],
        "by": list(ranking.by),
        "first_against_second": _test(ranking),
        "points": [_point(row, ranking) for row in ranking.rows],
    }
    json.dump(document, sys.stdout, indent=2, default=str)
    print()


def _test(ranking: Ranking) -> dict[str, object] | None:
    from repro_sweep.significance import NAME

    test = ranking.test
    if test is None:
        return None
    figures = {"p": test.p, "t": json_number(test.t), "df": test.df}
    return {"test": NAME, **figures, "n": list(test.n), "why": test.why or None}


def _point(row: Row, ranking: Ranking) -> dict[str, object]:
    names = [each.metric for each in ranking.objectives]
    groups = {"points": row.points, "best_mean": json_number(row.best_mean)} if ranking.by else {}
    return {
        **_record(row),
        **({"sweep": row.sweep} if row.sweep else {}),
        **groups,
        "means": dict(zip(names, map(json_number, row.means), strict=True)),
        "stds": dict(zip(names, map(json_number, row.stds), strict=True)),
        "infeasible": list(row.infeasible),
        "last_values": [json_number(value) for value in row.last],
        "params": dict(row.params),
        "trials": list(row.trials),
        "reproduced": {str(verdict): count for verdict, count in row.verdicts.items()},
    }


def _print_csv(ranking: Ranking) -> None:
    """``mean`` and ``std`` are of the first objective; of several, each has columns of its own as well."""
    figures = ["rank", "mean", "std", "n"]
    states = [state.lower() for state in TrialState]
    several = [each.metric for each in ranking.objectives] if len(ranking.objectives) > 1 else []
    head = [*figures, *states, "trials", *(f"{each}.{name}" for name in several for each in ("mean", "std"))]
    head += ["infeasible"] if ranking.constraints else []
    head += ["points", "best_mean"] if ranking.by else []
    head += ["sweep"] if _of_several(ranking) else []
    writer = csv.writer(sys.stdout)
    writer.writerow([*head, *(f"params.{name}" for name in ranking.params)])
    for row in ranking.rows:
        record = _record(row)
        cells: list[object] = [
            *(record[name] for name in (*figures, *states)),
            " ".join(map(str, row.trials)),
        ]
        if several:
            cells += [json_number(each) for pair in zip(row.means, row.stds, strict=True) for each in pair]
        cells += [", ".join(row.infeasible)] if ranking.constraints else []
        cells += [row.points, json_number(row.best_mean)] if ranking.by else []
        cells += [row.sweep] if _of_several(ranking) else []
        writer.writerow([*cells, *(_cell(row.params, name) for name in ranking.params)])


def _of_several(ranking: Ranking) -> bool:
    """Whether each row belongs to one of several sweeps."""
    return len(ranking.sweeps) > 1 and not ranking.by


def _record(row: Row) -> dict[str, object]:
    """The figures of a row."""
    states = {state.lower(): count for state, count in row.states.items()}
    return {
        "rank": row.rank,
        "mean": json_number(row.mean),
        "std": json_number(row.std),
        "n": row.n,
        **states,
    }


def _cell(params: Mapping[str, object], name: str) -> object:
    return params.get(name, "")
