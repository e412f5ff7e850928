"""``repro-sweep export TRIAL``: a trial as a folder or a zip file that is complete in itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repro_sweep.cli.arguments import Parser
from repro_sweep.cli.main import say


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        ReproSweepError: there is no such trial, MLflow lacks something, or it cannot be written.
    """
    parser = Parser(
        prog="repro-sweep export",
        description="Writes a trial to a folder or a zip file: source, config, lock, data's fingerprints, and a README"
        " that says how to run it without repro-sweep.",
    )
    parser.add_argument(
        "what", nargs="+", metavar="TRIAL", help="SWEEP/NUMBER, 'best of SWEEP', or the id of an MLflow run"
    )
    parser.add_argument(
        "--output", type=Path, help="a folder or FILE.zip that does not exist (default: SWEEP-NUMBER)"
    )
    parser.add_argument(
        "--uri", help="the MLflow tracking URI (default: MLFLOW_TRACKING_URI, else mlflow.db here)"
    )
    args = parser.parse_args(arguments)

    from repro_sweep import originals
    from repro_sweep.exporting import export
    from repro_sweep.results import reading_uri

    sweep, trial = originals.find(" ".join(args.what), reading_uri(args.uri))
    [original] = originals.load([(sweep, trial)])
    target = args.output or Path(f"{sweep.name}-{trial.number}")
    lacking = export(original, target)
    for each in lacking:
        say(f"not in it: {each}")
    print(target)
    return 0
