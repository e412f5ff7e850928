"""``repro-sweep card NAME``: a reproducibility card of a sweep, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repro_sweep.cli.arguments import Parser


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        ReproSweepError: there is no such sweep, MLflow cannot be read, or the file cannot be written.
    """
    parser = Parser(
        prog="repro-sweep card",
        description="A Markdown card after the machine learning reproducibility checklist (Pineau et al. 2020):"
        " space, runs, choice, seeds, results, compute, code, data. What is unknown is called so.",
    )
    parser.add_argument("name", metavar="NAME", help="the sweep's name")
    parser.add_argument("--output", type=Path, help="the file to write (default: print it)")
    parser.add_argument("--metric", help="rank by this one alone; by default by the sweep's own")
    parser.add_argument(
        "--uri", help="the MLflow tracking URI (default: MLFLOW_TRACKING_URI, else mlflow.db here)"
    )
    args = parser.parse_args(arguments)

    from repro_sweep import originals
    from repro_sweep.card import Facts, card, kinds
    from repro_sweep.errors import SweepError
    from repro_sweep.ranking import rank
    from repro_sweep.results import find_sweep, read_trials, reading_uri, tags_of_trials

    uri = reading_uri(args.uri)
    sweep = find_sweep(args.name, uri)
    trials = read_trials(sweep)
    tags = tags_of_trials(sweep)
    recorded = [(sweep, trial) for trial in trials if tags.get(trial.number, {}).get("snapshot")]
    found = kinds(originals.load(recorded))
    ranking = rank(args.name, metric=args.metric, uri=uri)
    text = card(Facts(ranking=ranking, trials=trials, tags=tags, originals=found))
    if args.output is None:
        print(text, end="")
        return 0
    try:
        args.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SweepError(f"--output: {args.output} cannot be written: {error}") from error
    print(args.output)
    return 0
