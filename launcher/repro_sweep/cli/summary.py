"""What the user reads when a sweep has ended: the ranking, the failures, and where to look next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from repro_sweep.cli.display import duration
from repro_sweep.cli.rankings import table
from repro_sweep.ledger import Ledger
from repro_sweep.progress import Failure, Progress
from repro_sweep.standings import Entry, rank_points
from repro_sweep.states import TrialState
from repro_sweep.sweep import SweepSpec
from repro_sweep.tracking.uri import is_http
from repro_sweep.worker.agent import LOG_NAME

_SHOWN_POINTS = 10
_SHOWN_FAILURES = 10
_SHOWN_ALIKE = 3


def summarise(spec: SweepSpec, progress: Progress, left: int) -> bool:
    """Print the summary; returns whether some trial failed or was left waiting.

    ``left`` is the number of trials that MLflow does not have yet.
    """
    _print_ranking(spec)
    _print_failures(progress)
    counts = progress.counts
    parts = [f"{counts[state]} {state.lower()}" for state in TrialState if counts[state]]
    print(f"\n{spec.name}: {', '.join(parts)}", end="")
    if progress.elapsed_s > 0:
        print(f"; slots {progress.busy:.0%} busy over {duration(progress.elapsed_s)}", end="")
    print()
    if counts[TrialState.WAITING]:
        print("the same command again goes on with what is waiting")
    if left:
        print(
            f"{left} trials are not in MLflow yet ({spec.tracking.uri}); the same command again brings them there"
        )
    uri = shlex.quote(spec.tracking.uri)
    if is_http(spec.tracking.uri):
        print(f"MLflow: {spec.tracking.uri}, experiment {spec.tracking.experiment}")
    else:
        print(f"see it in a browser: mlflow ui --backend-store-uri {uri}")
    return bool(progress.failures) or counts[TrialState.WAITING] > 0


def _print_ranking(spec: SweepSpec) -> None:
    ledger = Ledger.open(Path(spec.directory), readonly=True)
    try:
        values = {
            attempt.trial: attempt.metrics.get(spec.ranked_by)
            for attempt in ledger.attempts()
            if attempt.state is TrialState.COMPLETE
        }
        names = sorted({name for attempt in ledger.attempts() for name in attempt.metrics})
        entries = [
            Entry(
                number=trial.number,
                params=trial.params,
                state=trial.state,
                value=values.get(trial.number),
                point=trial.point,
            )
            for trial in ledger.trials()
        ]
    finally:
        ledger.close()
    if all(value is None for value in values.values()):
        _print_no_ranking(spec, names)
        return
    rows = rank_points(entries, spec.direction)
    print(f"\nby {spec.ranked_by}, {spec.direction}:\n{table(rows[:_SHOWN_POINTS], spec.ranked_by)}")
    if len(rows) > _SHOWN_POINTS:
        print(f"… {len(rows) - _SHOWN_POINTS} more: repro-sweep rank {spec.name}")


def _print_no_ranking(spec: SweepSpec, names: Sequence[str]) -> None:
    if spec.metric is None and names:
        print(f"\nno ranking: the sweep names no metric (sweep.metric={'|'.join(names[:5])});", end=" ")
        print(f"see repro-sweep rank {spec.name} --metric {names[0]}")


def _print_failures(progress: Progress) -> None:
    if not progress.failures:
        return
    print(f"\n{len(progress.failures)} failed:")
    alike: dict[tuple[str, str], list[Failure]] = {}
    for failure in sorted(progress.failures, key=lambda each: each.trial):
        alike.setdefault((failure.kind, failure.message), []).append(failure)
    shown = [failure for group in alike.values() for failure in group[:_SHOWN_ALIKE]][:_SHOWN_FAILURES]
    for failure in shown:
        message = failure.message.splitlines()[0] if failure.message else ""
        print(f"  trial {failure.trial}  {failure.kind}  {message}  {Path(failure.directory) / LOG_NAME}")
    if len(progress.failures) > len(shown):
        print(f"  … {len(progress.failures) - len(shown)} more: see trial.log in each one's directory")
