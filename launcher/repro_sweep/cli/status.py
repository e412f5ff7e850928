"""``repro-sweep status NAME``: how a sweep is, whether or not its coordinator lives; nothing is changed."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from repro_sweep.cli.arguments import Parser

if TYPE_CHECKING:
    from repro_sweep.cli.overview import Job, Overview, Running

_SHOWN = 10
_SHOWN_RUNNING = 40
_START_S = 5.0


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        SweepError: there is no such sweep.
        LedgerError: its ledger cannot be read.
    """
    parser = Parser(
        prog="repro-sweep status",
        description="How a sweep is: its trials, its coordinator, what failed where, what MLflow lacks."
        " It changes nothing, and needs no coordinator.",
    )
    parser.add_argument("name", metavar="NAME", help="the sweep's name, or its directory")
    parser.add_argument("--json", action="store_true", help="everything as JSON; stamps are seconds UTC")
    args = parser.parse_args(arguments)

    from repro_sweep.cli.finding import find
    from repro_sweep.cli.overview import look

    directory = find(args.name)
    overview = look(directory)
    if args.json:
        print(json.dumps(asdict(overview), indent=2))
    else:
        print("\n".join(_lines(overview, directory)))
    return 0


def _lines(overview: Overview, directory: Path) -> Iterator[str]:
    from repro_sweep.cli.finding import reference

    name = reference(directory)
    yield _head(overview)
    if overview.best is not None:
        yield (
            f"best         {overview.metric} {overview.best.value:.5g}, trial {overview.best.trial}"
            f" ({overview.direction})"
        )
    yield f"coordinator  {_coordinator(overview, name)}"
    if overview.paused is not None:
        yield f"paused       {overview.paused}"
    yield f"retries      {_retries(overview)}"
    yield f"MLflow       {_mlflow(overview, name)}"
    if overview.results_on_disk:
        yield f"on disk      {_results(overview.results_on_disk)} for a coordinator"
    if overview.running:
        yield from ("", "running:", *map(_running, overview.running[:_SHOWN_RUNNING]))
    if len(overview.running) > _SHOWN_RUNNING:
        yield f"  … {len(overview.running) - _SHOWN_RUNNING} more: --json has them"
    yield from _failures(overview)
    if overview.cancelled:
        yield from ("", f"cancelled: {_numbers(overview.cancelled)}")
    if overview.withdrawn:
        yield from ("", f"no part of the sweep any more: {_numbers(overview.withdrawn)}")


def _head(overview: Overview) -> str:
    from repro_sweep.cli.display import duration
    from repro_sweep.states import TrialState

    counts = overview.counts
    done = counts[TrialState.COMPLETE] + counts[TrialState.PRUNED]
    parts = [f"{overview.name}: {done}/{sum(counts.values())} done"]
    parts += [
        f"{count} {word}"
        for count, word in (
            (counts[TrialState.PRUNED], "of them pruned"),
            (counts[TrialState.RUNNING], "running"),
            (counts[TrialState.FAIL], "failed"),
            (counts[TrialState.WAITING], "waiting"),
            (len(overview.cancelled), "cancelled"),
        )
        if count
    ]
    if overview.slots:
        parts.append(f"{overview.slots} slots {overview.busy or 0:.0%} busy")
    if overview.seconds_left and not overview.finished:
        parts.append(f"{duration(overview.seconds_left)} left")
    return ", ".join(parts)


def _coordinator(overview: Overview, name: str) -> str:
    from repro_sweep.states import TrialState

    found, counts = overview.coordinator, overview.counts
    left = counts[TrialState.WAITING] + counts[TrialState.RUNNING]
    go_on = ""
    if not overview.finished:
        go_on = f"; 'repro-sweep resume {name}' {'goes on' if left else 'runs again what failed'}"
    job = overview.job
    if job is not None and (found is None or not found.alive):
        return f"none yet: {_waiting(job)}; 'repro-sweep cancel {name}' cancels it"
    if found is None:
        return f"none{go_on}"
    who = f"process {found.pid} on {found.host}" + (f", job {job.id}," if job is not None else "")
    since = f"since {_clock(found.since)} (epoch {found.epoch})"
    if not found.alive:
        return f"none: {who} died{go_on}"
    if not found.answers:
        starting = time.time() - found.since < _START_S
        return f"{who} {since} {'is starting' if starting else 'does not answer'}"
    return f"{who} {since}" + (", nothing new starts" if overview.draining else "")


def _waiting(job: Job) -> str:
    if job.state == "PENDING":
        return f"job {job.id} waits in SLURM's queue" + (f" ({job.reason})" if job.reason else "")
    if job.state == "UNKNOWN":
        return f"job {job.id} was submitted, and SLURM does not say how it is"
    return f"job {job.id} is {job.state}, its coordinator starts"


def _retries(overview: Overview) -> str:
    parts = [
        f"{kind} {'as often as it takes' if limit is None else limit}"
        for kind, limit in overview.retries.items()
    ]
    return ", ".join(parts) or "none"


def _mlflow(overview: Overview, name: str) -> str:
    from repro_sweep.cli.display import runs, waiting

    left, uri = overview.not_in_mlflow, overview.mlflow
    if left is None:
        return f"{uri}, a tracker is at work"
    if overview.mlflow_denies is not None and left:
        return waiting(overview.mlflow_denies, left)
    if not left:
        return f"{uri} has everything"
    if overview.coordinator is not None and overview.coordinator.answers:
        return f"{uri}, {runs(left)} on the way"
    return f"{uri} lacks {runs(left)}; 'repro-sweep sync {name}' sends what is missing"


def _results(count: int) -> str:
    return "1 result waits" if count == 1 else f"{count} results wait"


def _running(running: Running) -> str:
    from repro_sweep.cli.display import duration

    now = time.time()
    since = f"{_clock(running.since)} ({duration(max(0.0, now - running.since))})"
    parts = [f"  trial {running.trial}  attempt {running.attempt} on {running.host} since {since}"]
    if running.reported_at is None:
        parts.append("no report yet")
    else:
        ago = duration(max(0.0, now - running.reported_at))
        parts.append(f"step {running.step} reported {ago} ago")
    if running.ended:
        parts.append("ended, its result waits on disk")
    elif running.worker == "ALIVE":
        parts.append("its worker goes on with it")
    elif running.worker == "ENDED":
        parts.append("its worker is gone")
    return ", ".join(parts)


def _failures(overview: Overview) -> Iterator[str]:
    failed = [each for each in overview.failed_attempts if each.kind != "CANCELLED"]
    kinds = Counter(str(each.kind) for each in failed)
    if kinds:
        yield ""
        yield f"failed attempts: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}"
    places: dict[int, list[str]] = {}
    for each in failed:
        places.setdefault(each.trial, []).append(f"{each.kind} on {each.host}")
    for number, found in list(places.items())[:_SHOWN]:
        yield f"  trial {number}  {', '.join(found)}"
    if len(places) > _SHOWN:
        yield f"  … {len(places) - _SHOWN} more trials: --json has them"
    if overview.failed:
        yield from ("", f"{len(overview.failed)} failed:")
    for trial in overview.failed[:_SHOWN]:
        message = trial.message.splitlines()[0] if trial.message else ""
        yield f"  trial {trial.trial}  {trial.kind}  {message}  {trial.log}"
    if len(overview.failed) > _SHOWN:
        yield f"  … {len(overview.failed) - _SHOWN} more: --json has them"


def _clock(at: float) -> str:
    """A stamp as a person reads it: the time, with its day where that is not today's."""
    stamp, today = datetime.fromtimestamp(at, UTC), datetime.now(UTC).date()
    return stamp.strftime("%H:%M:%S UTC" if stamp.date() == today else "%Y-%m-%d %H:%M:%S UTC")


def _numbers(numbers: Sequence[int]) -> str:
    more = f", … ({len(numbers)})" if len(numbers) > 2 * _SHOWN else ""
    return f"trial{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[: 2 * _SHOWN]))}{more}"
