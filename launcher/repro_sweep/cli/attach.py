"""``repro-sweep attach NAME``: the live display of a sweep whose coordinator is another process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from repro_sweep.cli.arguments import Parser
from repro_sweep.cli.main import say

if TYPE_CHECKING:
    from repro_sweep.lease import Holder
    from repro_sweep.progress import Progress

_ASK_EVERY_S = 0.5
_START_S = 30.0
_FIRST_PAUSE_S = 1.0
_PAUSE_S = 10.0


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        SweepError: there is no such sweep, or nobody runs it.
        LedgerError: its ledger cannot be read.
    """
    parser = Parser(
        prog="repro-sweep attach",
        description="Watches a running sweep from another terminal. Ctrl-C ends the watching, not the sweep.",
    )
    parser.add_argument("name", metavar="NAME", help="the sweep's name, or its directory")
    args = parser.parse_args(arguments)

    from repro_sweep.cli.finding import find, reference

    directory = find(args.name)
    try:
        last = asyncio.run(_watch(directory))
    except KeyboardInterrupt:
        name = reference(directory)
        say(f"detached: the sweep goes on; 'repro-sweep cancel {name}' would stop it")
        return 130
    return _sum_up(directory, last)


async def _watch(directory: Path) -> Holder | None:
    """Show what coordinators say, one after the other, until there is none; returns the last one that was seen."""
    from repro_sweep.cli.display import Display

    last: Holder | None = None
    while True:
        found = _coordinator(directory)
        if found is None:
            if await _await_job(directory):
                continue
            return last
        last = found
        progress = await _first_answer(directory, found)
        if progress is None:
            continue
        follower = _Follower(directory, found, progress)
        async with Display(follower.latest):
            await follower.follow()


async def _await_job(directory: Path) -> bool:
    """Wait while a job of the sweep's has no coordinator yet; returns whether there may be one now."""
    from repro_sweep import detached

    said, pause_s = "", _FIRST_PAUSE_S
    while (job := await asyncio.to_thread(detached.find, directory)) is not None:
        if job.describe() != said:
            said = job.describe()
            say(f"{said} is to run the sweep")
        due = time.monotonic() + pause_s
        pause_s = min(2 * pause_s, _PAUSE_S)
        while time.monotonic() < due:
            if _coordinator(directory) is not None:
                return True
            await asyncio.sleep(_ASK_EVERY_S)
    return _coordinator(directory) is not None


class _Follower:
    """Keeps asking one coordinator, as long as it answers."""

    def __init__(self, directory: Path, holder: Holder, progress: Progress) -> None:
        self._directory = directory
        self._holder = holder
        self._progress = progress

    def latest(self) -> Progress:
        """What it said last."""
        return self._progress

    async def follow(self) -> None:
        """Ask until there is no answer any more."""
        from repro_sweep.cli.contact import ask_progress

        while True:
            await asyncio.sleep(_ASK_EVERY_S)
            progress = await asyncio.to_thread(ask_progress, self._directory, self._holder)
            if progress is None:
                return
            self._progress = progress


def _coordinator(directory: Path) -> Holder | None:
    from repro_sweep.cli.contact import coordinator_of
    from repro_sweep.ledger import Ledger

    ledger = Ledger.open(directory, readonly=True)
    try:
        return coordinator_of(ledger)
    finally:
        ledger.close()


async def _first_answer(directory: Path, holder: Holder) -> Progress | None:
    """What a coordinator says first, which may have only just started; None when it has ended before that.

    Raises:
        SweepError: it lives, and cannot be reached or does not answer.
    """
    from repro_sweep.cli import contact

    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        progress = await asyncio.to_thread(contact.ask_progress, directory, holder)
        if progress is not None:
            return progress
        now = _coordinator(directory)
        if now is None or now.epoch != holder.epoch:
            return None
        await asyncio.sleep(_ASK_EVERY_S)
    raise contact.no_answer(directory, holder)


def _sum_up(directory: Path, last: Holder | None) -> int:
    """Say what became of a sweep that has no coordinator any more; returns the exit status.

    Raises:
        SweepError: there was none when the command began, and the sweep is not finished.
    """
    from repro_sweep.cli import finding
    from repro_sweep.cli.summary import show, tally
    from repro_sweep.errors import SweepError
    from repro_sweep.lease import holder_of
    from repro_sweep.ledger import Ledger

    name = finding.reference(directory)
    resume = f"'repro-sweep resume {name}'"
    ledger = Ledger.open(directory, readonly=True)
    try:
        ended, counts = finding.has_ended(ledger), tally(ledger)
        if last is None and not ended:
            raise SweepError(f"nobody runs sweep {name} ({counts}); {resume} goes on with it")
        if last is not None and holder_of(ledger) is not None and not ended:
            say(f"{counts}; its coordinator, process {last.pid} on {last.host}, has died")
            say(f"what its workers run goes on without it; {resume} takes over")
            return 1
        say(f"sweep {name} has ended" if ended else f"sweep {name} was stopped")
        complete = show(ledger, directory)
        if not complete:
            print(f"{resume} {'runs again what failed' if ended else 'goes on'}")
        return int(not complete)
    finally:
        ledger.close()
