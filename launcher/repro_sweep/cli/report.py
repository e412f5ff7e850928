"""``repro-sweep report NAME``: writes the report of a sweep anew."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from repro_sweep.cli.arguments import Parser


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        SweepError: there is no such sweep, or the report cannot be written.
        LedgerError: its ledger cannot be read.
    """
    parser = Parser(
        prog="repro-sweep report",
        description="Writes report.html into the sweep's directory: its best points, and Optuna's figures of its"
        " history, of the parameters that matter, and of what was reported. It reads the ledger alone, of a running"
        " sweep too.",
    )
    parser.add_argument("name", metavar="NAME", help="the sweep's name, or its directory")
    args = parser.parse_args(arguments)

    from repro_sweep.cli.finding import find
    from repro_sweep.errors import SweepError
    from repro_sweep.ledger import Ledger

    directory = find(args.name)
    with contextlib.closing(Ledger.open(directory, readonly=True)) as ledger:
        from repro_sweep.reporting import FILE_NAME, write_report

        try:
            path = write_report(ledger, directory)
        except OSError as error:
            why = error.strerror or str(error)
            raise SweepError(f"{directory / FILE_NAME}: cannot be written ({why})") from error
    print(path)
    return 0
