"""``repro-sweep resume NAME [TRIAL...]``: goes on with a sweep from its ledger alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from repro_sweep.cli.arguments import Parser, trial_numbers
from repro_sweep.cli.main import say

if TYPE_CHECKING:
    from repro_sweep.ledger import Ledger


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        ReproSweepError: there is no such sweep or trial, it is running already, or it cannot go on.
    """
    parser = Parser(
        prog="repro-sweep resume",
        description="Goes on with a sweep as it was submitted, without its command line: runs what waits and what"
        " failed. Cancelled trials run only if they are named. What an earlier coordinator's workers run goes on.",
    )
    parser.add_argument("name", metavar="NAME", help="the sweep's name, or its directory")
    parser.add_argument(
        "trials", metavar="TRIAL", nargs="*", default=[], help="cancelled trials to run after all"
    )
    parser.add_argument(
        "--here",
        action="store_true",
        help="run the coordinator in this process, also where sweep.detach is set",
    )
    args = parser.parse_args(arguments)
    named = trial_numbers(args.trials)

    from repro_sweep.cli.finding import find

    directory = find(args.name)
    if _has_nothing_left(directory, named):
        return 0
    return _run(directory, named, here=args.here)


def _has_nothing_left(directory: Path, named: Sequence[int]) -> bool:
    """Check that the sweep can go on; show it if it is finished."""
    from repro_sweep.cli import summary
    from repro_sweep.cli.finding import check_place, is_finished, reference
    from repro_sweep.executors import base as executors
    from repro_sweep.ledger import Ledger

    ledger = Ledger.open(directory, readonly=True)
    try:
        _check(ledger, named)
        check_place(directory, ledger)
        executors.create(ledger.spec)
        if not is_finished(ledger) or ledger.cancelled.intersection(named):
            return False
        cancelled = len(ledger.cancelled)
        some = f" ({cancelled} cancelled: name those that shall run after all)" if cancelled else ""
        say(f"sweep {reference(directory)} is finished; nothing to run{some}")
        summary.show(ledger, directory)
        return True
    finally:
        ledger.close()


def _check(ledger: Ledger, named: Sequence[int]) -> None:
    from repro_sweep.cli.finding import check_trials
    from repro_sweep.errors import SweepError

    check_trials(ledger, named)
    for number in named:
        state = ledger.trial(number).state
        if state.is_done():
            raise SweepError(f"trial {number} is {state}: it has its result and is not run again")
        if number in ledger.withdrawn:
            raise SweepError(
                f"trial {number} is no part of the sweep any more: the latest command that started it left it out"
            )


def _run(directory: Path, named: Sequence[int], *, here: bool) -> int:
    from repro_sweep.cli import session, summary
    from repro_sweep.cli.finding import failed
    from repro_sweep.cli.uploading import check_access
    from repro_sweep.ledger import Ledger

    ledger = Ledger.open(directory)

    def record(ledger: Ledger) -> None:
        ledger.requeue([*failed(ledger), *ledger.cancelled.intersection(named)])
        ledger.commit()
        say(f"resumed: {summary.tally(ledger)}")

    spec = ledger.spec
    try:
        check_access(spec.tracking, remedy="until then nothing is lost")
    except BaseException:
        ledger.close()
        raise
    if spec.detach and not here:
        return session.submit(ledger, spec.name, record)
    return session.run(ledger, spec.name, record)
