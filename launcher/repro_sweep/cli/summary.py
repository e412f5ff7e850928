"""What the user reads when a sweep has ended: the ranking, the failures, and where to look next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from repro_sweep.cli import finding, overview
from repro_sweep.cli.display import duration, runs
from repro_sweep.cli.overview import FailedTrial
from repro_sweep.cli.rankings import table
from repro_sweep.ledger import Ledger
from repro_sweep.progress import Progress
from repro_sweep.standings import front_of, front_text, ranked_rows
from repro_sweep.states import FailureKind, TrialState
from repro_sweep.sweep import SweepSpec
from repro_sweep.tracking.uri import is_http

_SHOWN_POINTS = 10
_SHOWN_FAILURES = 10
_SHOWN_ALIKE = 3


def summarise(spec: SweepSpec, progress: Progress, left: int, error: str | None = None) -> bool:
    """Print the summary of a sweep whose coordinator has ended; returns whether some trial failed or was left waiting.

    ``left`` is the number of runs that MLflow does not have yet, ``error`` why.
    """
    directory = Path(spec.directory)
    name = finding.reference(directory)
    ledger = Ledger.open(directory, readonly=True)
    try:
        complete = show(ledger, directory, _how_it_ran(progress))
        waiting = overview.counts(ledger)[TrialState.WAITING]
        goes_on = ledger.spec.search is not None and ledger.search_over is None
    finally:
        ledger.close()
    if waiting:
        print(f"{_trials(waiting)} left: 'repro-sweep resume {name}' goes on")
    elif goes_on:
        print(f"the search is not over: 'repro-sweep resume {name}' goes on")
    if left:
        print(not_sent(spec, left, error))
    uri = shlex.quote(spec.tracking.uri)
    if is_http(spec.tracking.uri):
        print(f"MLflow: {spec.tracking.uri}, experiment {spec.tracking.experiment}")
    else:
        print(f"see it in a browser: mlflow ui --backend-store-uri {uri}")
    return not complete


def not_sent(spec: SweepSpec, left: int, error: str | None) -> str:
    """What MLflow lacks, why, and how it gets it, in one line."""
    why = f": {error}" if error else ""
    name = finding.reference(Path(spec.directory))
    return (
        f"MLflow lacks {runs(left)} ({spec.tracking.uri}{why}); 'repro-sweep sync {name}' or the next start"
        " sends what is missing"
    )


def show(ledger: Ledger, directory: Path, note: str = "") -> bool:
    """Print the ranking, the failures and the counts, with a note; returns whether nothing failed or is left to run."""
    _print_ranking(ledger)
    failed = overview.failed_trials(ledger, directory)
    _print_failures(failed)
    print(f"\n{ledger.spec.name}: {tally(ledger)}{note}")
    if ledger.search_over is not None:
        print(f"the search is over: {ledger.search_over}")
    return not failed and finding.is_finished(ledger)


def tally(ledger: Ledger) -> str:
    """How many trials are in which state: ``46 complete, 1 fail, 1 cancelled``."""
    counts = overview.counts(ledger)
    parts = [f"{counts[state]} {state.lower()}" for state in TrialState if counts[state]]
    if ledger.cancelled:
        parts.append(f"{len(ledger.cancelled)} cancelled")
    return ", ".join(parts) or "no trials"


def _how_it_ran(progress: Progress) -> str:
    note = ""
    if progress.retried:
        note = f"; {progress.retried} attempt{' was' if progress.retried == 1 else 's were'} retried"
    if progress.elapsed_s > 0:
        note += f"; slots {progress.busy:.0%} busy over {duration(progress.elapsed_s)}"
    return note


def _trials(count: int) -> str:
    return "1 trial is" if count == 1 else f"{count} trials are"


def _print_ranking(ledger: Ledger) -> None:
    spec = ledger.spec
    attempts = ledger.attempts()
    rows = ranked_rows(spec, ledger.trials(), attempts)
    if not any(row.n for row in rows):
        _print_no_ranking(spec, sorted({name for attempt in attempts for name in attempt.metrics}))
        return
    objectives = spec.all_objectives
    by = f"by {spec.ranked_by}, {spec.direction}"
    if len(objectives) > 1:
        by = front_text(objectives, len(front_of(rows)))
    print(f"\n{by}:\n{table(rows[:_SHOWN_POINTS], [each.metric for each in objectives])}")
    if len(rows) > _SHOWN_POINTS:
        print(f"… {len(rows) - _SHOWN_POINTS} more: repro-sweep rank {spec.name}")


def _print_no_ranking(spec: SweepSpec, names: Sequence[str]) -> None:
    if spec.metric is None and names:
        print(f"\nno ranking: the sweep names no metric (sweep.metric={'|'.join(names[:5])});", end=" ")
        print(f"see repro-sweep rank {spec.name} --metric {names[0]}")


def _print_failures(failed: Sequence[FailedTrial]) -> None:
    if not failed:
        return
    print(f"\n{len(failed)} failed:")
    alike: dict[tuple[FailureKind, str], list[FailedTrial]] = {}
    for failure in failed:
        alike.setdefault((failure.kind, failure.message), []).append(failure)
    shown = [failure for group in alike.values() for failure in group[:_SHOWN_ALIKE]][:_SHOWN_FAILURES]
    for failure in shown:
        message = failure.message.splitlines()[0] if failure.message else ""
        print(f"  trial {failure.trial}  {failure.kind}  {message}  {failure.log}")
    if len(failed) > len(shown):
        print(f"  … {len(failed) - len(shown)} more: see trial.log in each one's directory")
