"""``python -m repro_sweep.cli.coordinate DIRECTORY``: the coordinator of a detached sweep, from its ledger alone.

No command of the user's: a job's keeper starts it (see ``keeper``).
"""

from __future__ import annotations

import sys
from pathlib import Path

from repro_sweep.cli import session, summary
from repro_sweep.cli.main import fail, say
from repro_sweep.errors import ReproSweepError
from repro_sweep.ledger import Ledger


def main(arguments: list[str]) -> int:
    """Run the sweep in the given directory as it is recorded; returns the exit status."""
    (directory,) = map(Path, arguments)
    try:
        ledger = Ledger.open(directory)
        return session.run(
            ledger, ledger.spec.name, lambda ledger: say(f"{ledger.spec.name}: {summary.tally(ledger)}")
        )
    except ReproSweepError as error:
        return fail(str(error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
