"""``repro-sweep logs TRIAL``: what a trial has printed, and prints."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from repro_sweep.cli.arguments import Parser, at_least
from repro_sweep.cli.main import say

if TYPE_CHECKING:
    from repro_sweep.ledger import Ledger
    from repro_sweep.records import Trial

_READ_EVERY_S = 0.1
_LOOK_EVERY_S = 0.5
_ASK_EVERY_S = 10.0
_CHUNK = 1 << 20


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        SweepError: there is no such sweep or trial.
        LedgerError: the sweep's ledger cannot be read.
    """
    parser = Parser(prog="repro-sweep logs", description="Shows what a trial has printed.")
    parser.add_argument(
        "trial",
        metavar="TRIAL",
        help="NAME/NUMBER; a NUMBER alone is a trial of the sweep in multirun/ that changed last",
    )
    parser.add_argument(
        "-f",
        "--follow",
        action="store_true",
        help="wait for more until the trial has ended, retries included",
    )
    parser.add_argument(
        "-n", "--lines", type=partial(at_least, 0), metavar="N", help="begin with the last N lines"
    )
    args = parser.parse_args(arguments)

    from repro_sweep.cli.finding import check_trials, reference
    from repro_sweep.ledger import Ledger

    directory, number = _which(args.trial)
    ledger = Ledger.open(directory, readonly=True)
    try:
        check_trials(ledger, [number])
        if "/" not in args.trial:
            say(f"trial {number} of sweep {reference(directory)}")
        return _Log(ledger, number).show(args.lines, follow=args.follow)
    finally:
        ledger.close()


def _which(text: str) -> tuple[Path, int]:
    from repro_sweep.cli import finding
    from repro_sweep.errors import SweepError

    name, _, number = text.rpartition("/")
    if not (number.isascii() and number.isdigit()):
        raise SweepError(f"'{text}' names no trial: say NAME/NUMBER, such as {name or text}/0")
    return finding.find(name) if name else finding.latest(), int(number)


class _Log:
    """The log file of a trial."""

    def __init__(self, ledger: Ledger, number: int) -> None:
        from repro_sweep.exchange import LOG_NAME

        self._ledger = ledger
        self._number = number
        self._asked_at = float("-inf")
        self._job_exists = False
        self._path = ledger.path.parent / ledger.trial(number).directory / LOG_NAME

    def show(self, lines: int | None, *, follow: bool) -> int:
        """Print it; returns the exit status."""
        if not self._path.exists():
            say(self._why_none())
            if not follow or not self._comes():
                return 1
        out = sys.stdout.buffer
        with self._path.open("rb") as file:
            if lines is not None:
                file.seek(_start_of_last(file, lines))
            _copy(file, out)
            if follow:
                self._follow(file, out)
        return 0

    def _comes(self) -> bool:
        """Wait for the log; returns False when the trial has ended without one."""
        while not self._path.exists():
            if self._ended():
                return self._path.exists()  # it may have come and ended meanwhile
            time.sleep(_LOOK_EVERY_S)
        return True

    def _follow(self, file: BinaryIO, out: BinaryIO) -> None:
        warned = False
        looked = float("-inf")
        ended = False
        while not ended:
            if time.monotonic() - looked >= _LOOK_EVERY_S:
                ended, looked = self._ended(), time.monotonic()
                if not (ended or warned) and not self._has_coordinator():
                    warned = True
                    say(f"no coordinator runs the sweep, which {self._how_to_go_on()}; Ctrl-C ends this")
            _copy(file, out)
            if not ended:
                time.sleep(_READ_EVERY_S)

    def _ended(self) -> bool:
        return self._trial().state.is_finished()

    def _trial(self) -> Trial:
        return self._ledger.trial(self._number)

    def _has_coordinator(self) -> bool:
        from repro_sweep import detached
        from repro_sweep.cli.contact import coordinator_of

        if coordinator_of(self._ledger) is not None:
            return True
        now = time.monotonic()
        if now - self._asked_at > _ASK_EVERY_S:
            self._job_exists, self._asked_at = detached.find(self._ledger.path.parent) is not None, now
        return self._job_exists

    def _how_to_go_on(self) -> str:
        from repro_sweep.cli.finding import reference

        return f"goes on with 'repro-sweep resume {reference(self._ledger.path.parent)}'"

    def _why_none(self) -> str:
        trial = self._trial()
        if trial.reused is not None:
            attempt = self._ledger.attempts(self._number)[-1]
            return f"trial {self._number} did not run here: {attempt.message or 'its result was reused'}"
        text = f"trial {self._number} is {trial.state} and has no log"
        if not trial.state.is_finished():
            text += " yet" if self._has_coordinator() else f" yet; its sweep {self._how_to_go_on()}"
        return text


def _start_of_last(file: BinaryIO, lines: int) -> int:
    """Where the last lines of a file begin."""
    end = position = file.seek(0, 2)
    found = 0
    while position > 0:
        size = min(_CHUNK, position)
        position -= size
        file.seek(position)
        data = file.read(size)
        at = len(data)
        while (at := data.rfind(b"\n", 0, at)) >= 0:
            if position + at + 1 < end:  # the newline that ends the file ends its last line
                found += 1
            if found == lines:
                return position + at + 1
    return 0 if lines else end


def _copy(file: BinaryIO, out: BinaryIO) -> None:
    while data := file.read(_CHUNK):
        out.write(data)
    out.flush()
