"""``repro-sweep cancel NAME [TRIAL...]``: stops a sweep, or cancels some of its trials."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repro_sweep.cli.arguments import Parser, trial_numbers
from repro_sweep.cli.main import say
from repro_sweep.errors import SweepError

_ITSELF_S = 10.0


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 1 where something could not be cancelled.

    Raises:
        SweepError: there is no such sweep or trial, or its coordinator does not answer.
        LedgerError: the ledger cannot be read or written.
    """
    parser = Parser(
        prog="repro-sweep cancel",
        description="Stops a sweep: running trials are stopped, and run again with 'repro-sweep resume'. With trials:"
        " cancels only these, for good, whether they run or wait; they run again only if 'resume' names them.",
    )
    parser.add_argument("name", metavar="NAME", help="the sweep's name, or its directory")
    parser.add_argument(
        "trials", metavar="TRIAL", nargs="*", default=[], help="trials to cancel, such as 3 4"
    )
    args = parser.parse_args(arguments)
    trials = trial_numbers(args.trials)

    from repro_sweep.cli.finding import find

    directory = find(args.name)
    return _cancel_trials(directory, trials) if trials else _stop(directory)


def _stop(directory: Path) -> int:
    from repro_sweep import detached
    from repro_sweep.cli import cancelling, contact, finding, summary
    from repro_sweep.ledger import Ledger

    name = finding.reference(directory)
    ledger = Ledger.open(directory, readonly=True)
    try:
        running = len(ledger.open_attempts())
        holder = contact.coordinator_of(ledger)
        gone = True
        job = detached.find(directory)
        if job is not None and (holder is None or not contact.answers(directory, holder)):
            say(f"cancelling {job.describe()}, which is to run sweep {name}")
            if not detached.cancel(directory):
                raise SweepError(f"{job.describe()} has not ended yet; try again")
            holder = contact.await_end(ledger)
        if holder is not None:
            say(f"stopping sweep {name} ({holder.describe()})")
            gone = cancelling.with_coordinator(directory, holder, None)
        elif finding.is_finished(ledger):
            say(f"sweep {name} is finished: there is nothing to stop")
            return 0
        else:
            finding.check_place(directory, ledger)
            cancelling.without_coordinator(directory, None)
        counts = summary.tally(ledger)
        again = "" if finding.is_finished(ledger) else f"; 'repro-sweep resume {name}' goes on"
    finally:
        ledger.close()
    if (
        gone
        and job is not None
        and not (detached.await_end(directory, _ITSELF_S) or detached.cancel(directory))
    ):
        say(f"job {job.id} of its coordinator has not ended yet")
    if not gone and holder is not None:
        say(f"sweep {name} is stopping ({counts}), but process {holder.pid} has not ended yet{again}")
        return 1
    word = "stopped" if holder is not None or job is not None or running else "not running"
    say(f"sweep {name} is {word}: {counts}{again}")
    return 0


def _cancel_trials(directory: Path, trials: tuple[int, ...]) -> int:
    from repro_sweep.cli import cancelling, contact, finding
    from repro_sweep.ledger import Ledger
    from repro_sweep.states import TrialState

    name = finding.reference(directory)
    ledger = Ledger.open(directory, readonly=True)
    try:
        finding.check_trials(ledger, trials)
        before = {number: ledger.trial(number) for number in trials}
        withdrawn = ledger.withdrawn
        open_ones = tuple(
            number
            for number, trial in before.items()
            if not trial.state.is_finished() and number not in withdrawn
        )
        holder = contact.coordinator_of(ledger)
        if holder is not None and open_ones:
            cancelling.with_coordinator(directory, holder, open_ones)
        elif open_ones:
            finding.check_place(directory, ledger)
            cancelling.without_coordinator(directory, open_ones)
        after = {number: ledger.trial(number) for number in trials}
    finally:
        ledger.close()
    done = [number for number in trials if after[number].cancelled]
    for number in trials:
        was, is_ = before[number].state, after[number].state
        if number in withdrawn:
            say(f"trial {number} is no part of the sweep any more")
        elif number not in done and is_ is TrialState.RUNNING:
            say(f"trial {number} is still being stopped")
        elif number not in done:
            say(f"trial {number} is {is_}" + ("" if was is is_ else ": it ended before it could be stopped"))
        elif before[number].cancelled:
            say(f"trial {number} was cancelled before")
        else:
            say(f"trial {number} is cancelled" + (" and stopped" if was is TrialState.RUNNING else ""))
    if done:
        numbers = " ".join(map(str, done))
        say(f"'repro-sweep resume {name} {numbers}' would run {'it' if len(done) == 1 else 'them'} after all")
    return int(len(done) < len(trials))
