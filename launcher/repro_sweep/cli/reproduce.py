"""``repro-sweep reproduce TRIAL``: runs a trial again, from MLflow alone, and says whether it came out the same."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repro_sweep.cli.arguments import Parser
from repro_sweep.cli.main import INTERRUPTED, say
from repro_sweep.states import Verdict

if TYPE_CHECKING:
    from argparse import Namespace

    from repro_sweep.originals import Original
    from repro_sweep.reproducing import Repetition, Result

STATUS = {Verdict.EXACT: 0, Verdict.WITHIN_TOLERANCE: 3, Verdict.DIFFERS: 4, Verdict.UNVERIFIABLE: 5}
"""The exit status for each verdict; of several the first one of :data:`_WORST`."""
_WORST = (Verdict.DIFFERS, Verdict.UNVERIFIABLE, Verdict.WITHIN_TOLERANCE, Verdict.EXACT)
_FOLDER = "reproduced"


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        ReproSweepError: there is no such trial, MLflow cannot be read, or the repetition cannot run.
    """
    parser = Parser(
        prog="repro-sweep reproduce",
        description="Runs a trial again, from what MLflow has of it alone, and compares every metric at every step.",
        epilog="Exit status: 0 EXACT, 3 WITHIN TOLERANCE, 4 DIFFERS, 5 UNVERIFIABLE; 2 something to correct first.",
    )
    parser.add_argument(
        "what", nargs="+", metavar="TRIAL",
        help="SWEEP/NUMBER, 'best of SWEEP', or the id of an MLflow run; several of them may be given; with --all a"
        " sweep's name. Overrides such as sweep/executor=slurm sweep.executor.partition=gpu may follow",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="all trials of a sweep that have a result")
    parser.add_argument("--rtol", type=_tolerance, default=0.0, metavar="R", help="relative tolerance")
    parser.add_argument(
        "--env", action="store_true", help="build the recorded Python environment first, with venv and pip"
    )
    parser.add_argument(
        "--anyway",
        action="store_true",
        help="run in this Python environment although it is another one, and with frozen data although those here have"
        " changed",
    )
    parser.add_argument("--directory", type=Path, help=f"where to work (default: a new folder in {_FOLDER}/)")
    parser.add_argument(
        "--experiment", help="the MLflow experiment that the new runs go to (default: that of the original)"
    )
    parser.add_argument("--format", choices=["text", "json"], default="text")
    parser.add_argument(
        "--uri", help="the MLflow tracking URI (default: MLFLOW_TRACKING_URI, else mlflow.db here)"
    )
    args = parser.parse_intermixed_args(arguments)

    from repro_sweep import originals
    from repro_sweep.results import reading_uri
    from repro_sweep.specification import executor_of

    uri = reading_uri(args.uri)
    overrides = [word for word in args.what if "=" in word]
    names = [word for word in args.what if "=" not in word]
    if names[:2] == ["best", "of"]:
        names = [" ".join(names)]
    executor = executor_of(overrides) if overrides else None
    if args.all:
        wanted = originals.all_of(" ".join(names), uri)
    else:
        named = (originals.find(name, uri) for name in names)
        wanted = list({trial.run_id: (sweep, trial) for sweep, trial in named}.values())
    results: list[Result] = []
    for result in _results(list(originals.load(wanted)), args, uri, executor):
        _record(result, uri)
        results.append(result)
        if args.format == "text":
            print(_text(result), flush=True)
    if args.format == "json":
        json.dump([_document(result) for result in results], sys.stdout, indent=2)
        print()
    elif len(results) > 1:
        counts = Counter(result.verdict for result in results)
        parts = [f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]]
        print(f"{', '.join(parts)} of {len(results)}")
    return STATUS[next(each for each in _WORST if any(result.verdict is each for result in results))]


def _tolerance(text: str) -> float:
    with contextlib.suppress(ValueError):
        value = float(text)
        if 0 <= value < 1:
            return value
    raise ArgumentTypeError(f"must be a number from 0 to less than 1, got {text}")


def _results(
    found: Sequence[Original], args: Namespace, uri: str, executor: tuple[str, dict[str, object]] | None
) -> Iterator[Result]:
    from repro_sweep import reproducing

    whole = []
    for each in found:
        lacking = reproducing.unverifiable(each)
        if lacking is None:
            whole.append(each)
        else:
            yield lacking
    _check_access(whole, uri, args.experiment)
    groups = reproducing.groups(whole)
    directory = _new_directory(args.directory, found[0])
    for number, group in enumerate(groups):
        place = directory if len(groups) == 1 else directory / f"{directory.name}-{number}"
        yield from _repeat(group, place, args, uri, executor)


def _check_access(found: Sequence[Original], uri: str, experiment: str | None) -> None:
    """See that the new runs may be written, before anything is built or run for them.

    Raises:
        TrackingError: they may not.
    """
    from repro_sweep.cli.uploading import check_access
    from repro_sweep.sweep import Tracking

    named = {each.spec.tracking.experiment for each in found if each.spec is not None}
    for name in sorted({experiment} if found and experiment is not None else named):
        where = Tracking(uri=uri, experiment=name)
        check_access(where, remedy="--experiment names another one for the new runs")


def _repeat(
    group: Sequence[Original],
    directory: Path,
    args: Namespace,
    uri: str,
    executor: tuple[str, dict[str, object]] | None,
) -> Iterator[Result]:
    from repro_sweep import reproducing
    from repro_sweep.errors import SweepError
    from repro_sweep.provenance import environment
    from repro_sweep.reproducing import Result

    record, old = group[0].record, group[0].spec
    assert record is not None
    assert old is not None
    assert old.source is not None
    other = reproducing.check_environment(record.environment, environment.inspect(), old.source.roots)
    if other and args.env:
        yield from _elsewhere(group, args, uri, directory)
        return
    if other and not args.anyway:
        reasons = (*other, "build the recorded environment with --env, or run in this one with --anyway")
        for each in group:
            yield Result(original=each, verdict=Verdict.UNVERIFIABLE, reasons=reasons)
        return
    command = shlex.join(["repro-sweep", *sys.argv[1:]])
    try:
        tracking = old.tracking.model_copy(
            update={"uri": uri, "experiment": args.experiment or old.tracking.experiment}
        )
        made = reproducing.rebuild(
            group, directory, executor, tracking=tracking, command=command, anyway=args.anyway
        )
    except SweepError as error:
        reproducing.discard(directory)
        for each in group:
            yield Result(original=each, verdict=Verdict.UNVERIFIABLE, reasons=(f"{each.name}: {error}",))
        return
    if made.lacking:
        more = f" and {len(made.lacking) - 5} more" if len(made.lacking) > 5 else ""
        remedy = "" if args.anyway else "; --anyway takes what still lies where it lay"
        say(f"not frozen, so not there: {', '.join(made.lacking[:5])}{more}{remedy}")
    read, lie = reproducing.check_data(made)
    trouble = read if args.anyway else [*read, *lie]
    if trouble:
        reproducing.discard(directory)
        for each in group:
            yield Result(original=each, verdict=Verdict.UNVERIFIABLE, reasons=tuple(trouble))
        return
    yield from _run(replace(made, known=tuple(lie)), args)


def _run(made: Repetition, args: Namespace) -> Iterator[Result]:
    from repro_sweep import reproducing
    from repro_sweep.cli import session
    from repro_sweep.executors import base as executors
    from repro_sweep.ledger import Ledger
    from repro_sweep.results import read_trials, sweep_of

    spec = made.spec
    directory = Path(spec.directory)
    outlook = executors.create(spec).outlook(len(made.trials))
    if outlook.problems:
        from repro_sweep.errors import SweepError

        reproducing.discard(directory)
        raise SweepError("\n".join(outlook.problems))
    for name, value in made.variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    ledger = Ledger.create(directory, spec, shared=executors.is_spread(spec))

    def record(ledger: Ledger) -> None:
        ledger.add_trials(made.trials)
        ledger.commit()
        count = len(made.trials)
        say(f"runs {'a trial' if count == 1 else f'{count} trials'} again, in {directory}")

    if session.run(ledger, spec.name, record, summary=False) == INTERRUPTED:
        raise KeyboardInterrupt
    sweep = sweep_of(spec.sweep_id, spec.tracking.uri)
    again = {} if sweep is None else {trial.number: trial for trial in read_trials(sweep)}
    ledger = Ledger.open(directory, readonly=True)
    try:
        for number, original in made.originals.items():
            yield reproducing.judge(
                original, made, ledger, again.get(number), rtol=args.rtol, anyway=args.anyway
            )
    finally:
        ledger.close()


def _elsewhere(group: Sequence[Original], args: Namespace, uri: str, directory: Path) -> Iterator[Result]:
    """Do it in an environment that is built for it, by the same command there."""
    from repro_sweep.provenance import venv
    from repro_sweep.reproducing import Result

    record = group[0].record
    assert record is not None
    directory.mkdir(parents=True, exist_ok=True)
    say(f"builds the recorded environment in {directory / 'venv'}")
    python = venv.build(record.environment, directory / "venv")
    command = [
        str(python), "-P", "-m", "repro_sweep.cli.main", "reproduce", *(each.trial.run_id for each in group),
        *(word for word in args.what if "=" in word), "--uri", uri, "--rtol", str(args.rtol), "--format", "json",
        "--directory", str(directory / directory.name), *["--anyway"] * args.anyway,
        *(["--experiment", args.experiment] if args.experiment is not None else []),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    try:
        said = {each["original_run_id"]: each for each in json.loads(done.stdout)}
    except ValueError:
        said = {}
    for each in group:
        about = said.get(each.trial.run_id)
        if about is not None:
            yield _read(each, about)
            continue
        reasons = (f"the command in {python} has ended with status {done.returncode}",)
        yield Result(original=each, verdict=Verdict.UNVERIFIABLE, reasons=reasons)


def _new_directory(wanted: Path | None, first: Original) -> Path:
    from repro_sweep.errors import SweepError

    if wanted is not None:
        if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
            raise SweepError(f"--directory: {wanted} is not empty")
        return wanted.absolute()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    base = Path.cwd() / _FOLDER / f"{first.sweep.name}-{stamp}"
    directory, count = base, 1
    while directory.exists():
        count += 1
        directory = base.with_name(f"{base.name}-{count}")
    return directory


def _record(result: Result, uri: str) -> None:
    """Note the verdict at the original's run; that nothing could be verified here takes no earlier verdict back."""
    from repro_sweep.errors import TrackingError
    from repro_sweep.results import note_verdict, tags_of

    run_id = result.original.trial.run_id
    try:
        if result.verdict is Verdict.UNVERIFIABLE and tags_of(run_id, uri).get("reproduced"):
            return
        note_verdict(result.original.trial, result.verdict, result.run_id)
    except TrackingError as error:
        say(f"the verdict cannot be noted in MLflow: {error}")


def _text(result: Result) -> str:
    lines = [f"{result.original.name}: {result.verdict}"]
    found = result.comparison
    if found is not None and found.values:
        lines[0] += f" ({found.values} values)" if found.first is None else f": {found.first}"
    lines += [f"  {reason}" for reason in result.reasons]
    if result.differences:
        lines += ["  what is different here:", *(f"    {each}" for each in result.differences)]
    if result.run_id is not None:
        lines.append(f"  run {result.run_id} beside {result.original.trial.run_id}")
    return "\n".join(lines)


def _document(result: Result) -> dict[str, Any]:
    from repro_sweep.tracking.encoding import json_number

    found = result.comparison
    first = None if found is None else found.first
    return {
        "trial": result.original.name,
        "run_id": result.run_id,
        "original_run_id": result.original.trial.run_id,
        "verdict": result.verdict,
        "values": 0 if found is None else found.values,
        "first_difference": first
        and {
            "metric": first.metric,
            "step": first.step,
            "was": json_number(first.was),
            "now": json_number(first.now),
        },
        "reasons": list(result.reasons),
        "differences": list(result.differences),
    }


def _read(original: Original, document: Mapping[str, Any]) -> Result:
    """What :func:`_document` has written."""
    from repro_sweep.comparison import Comparison, Difference
    from repro_sweep.reproducing import Result

    verdict, first = Verdict(document["verdict"]), Difference.parse(document["first_difference"])
    return Result(
        original=original, verdict=verdict, reasons=tuple(document["reasons"]),
        differences=tuple(document["differences"]), run_id=document["run_id"],
        comparison=Comparison(verdict=verdict, values=document["values"], first=first),
    )  # fmt: skip
