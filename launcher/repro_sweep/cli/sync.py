"""``repro-sweep sync NAME``: brings MLflow up to date with a sweep that nobody runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from repro_sweep.cli.arguments import Parser
from repro_sweep.cli.main import say

if TYPE_CHECKING:
    from repro_sweep.tracking.base import Progress
    from repro_sweep.tracking.process import TrackerProcess

_SAY_EVERY_S = 3.0


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 1 where MLflow still lacks something.

    Raises:
        SweepError: there is no such sweep.
        TrackingError: MLflow does not let this user write.
        LedgerError: its ledger cannot be read.
    """
    parser = Parser(
        prog="repro-sweep sync",
        description="Brings MLflow up to date with a sweep, from its ledger; nothing is run. It gives up when"
        " it gets no further for a minute (15 minutes, where the server is only slow); given again later, it goes on.",
    )
    parser.add_argument("name", metavar="NAME", help="the sweep's name, or its directory")
    args = parser.parse_args(arguments)

    from repro_sweep import detached
    from repro_sweep.cli import contact
    from repro_sweep.cli.display import runs
    from repro_sweep.cli.finding import check_place, find, reference
    from repro_sweep.cli.uploading import check_access
    from repro_sweep.ledger import Ledger

    directory = find(args.name)
    name = reference(directory)
    ledger = Ledger.open(directory, readonly=True)
    try:
        spec = ledger.spec
        holder = contact.coordinator_of(ledger)
        if holder is not None:
            progress = contact.ask_progress(directory, holder)
            left = "" if progress is None else f": {runs(progress.not_tracked)} on the way"
            say(f"sweep {name} is running, {holder.describe()}, and does this itself{left}")
            return 0
        job = detached.find(directory)
        if job is not None:
            say(f"{job.describe()} is to run sweep {name}, and does this itself")
            return 0
        check_place(directory, ledger)
        check_access(spec.tracking, remedy="until then nothing is lost")
    finally:
        ledger.close()
    return _sync(directory, name, spec.tracking.uri)


def _sync(directory: Path, name: str, uri: str) -> int:
    from repro_sweep.cli.display import runs
    from repro_sweep.cli.uploading import unsent
    from repro_sweep.tracking.process import LOG_NAME, TrackerProcess

    tracker = TrackerProcess(directory)
    interrupted = False
    try:
        left = asyncio.run(_upload(tracker))
    except KeyboardInterrupt:
        interrupted, left = True, max(1, tracker.progress.left)
    left = unsent(directory, left)
    if not left:
        say(f"MLflow has all of sweep {name} ({uri})")
        return 0
    error = tracker.progress.error
    why = f": {error}" if error else ""
    say(f"MLflow still lacks {runs(left)} of sweep {name} ({uri}{why}); see {directory / LOG_NAME}")
    return 130 if interrupted else 1


async def _upload(tracker: TrackerProcess) -> int:
    from repro_sweep.cli.display import runs
    from repro_sweep.cli.uploading import upload

    said: Progress | None = None
    due = time.monotonic() + _SAY_EVERY_S

    def look() -> None:
        nonlocal said, due
        progress = tracker.progress
        if time.monotonic() >= due and progress != said:
            say(f"{runs(progress.left)} to go" + (f": {progress.error}" if progress.error else ""))
            said, due = progress, time.monotonic() + _SAY_EVERY_S

    await tracker.start()
    try:
        return await upload(tracker, look)
    finally:
        await tracker.kill()
