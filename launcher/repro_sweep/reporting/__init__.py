"""The report of a sweep: one HTML file in its directory, made from its ledger alone, with Optuna's own figures.

A sweep has it written by a process of its own, ``python -m repro_sweep.reporting DIRECTORY``. Optuna and plotly are
imported when something is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from repro_sweep.ledger import Ledger

if TYPE_CHECKING:
    import optuna

FILE_NAME = "report.html"


def write_report(ledger: Ledger, directory: Path) -> Path:
    """Write the report of a sweep into its directory, anew if it has one; returns its path.

    The same ledger gives the same file, byte for byte.

    Raises:
        LedgerError: the ledger cannot be read.
        OSError: the file cannot be written.
    """
    from repro_sweep.reporting import page

    return page.write(ledger, directory / FILE_NAME)


def study_of(ledger: Ledger) -> optuna.Study:
    """The study of a sweep: a trial for each point, in the order of the points' first trials.

    A COMPLETE trial has a value for each objective and, for each constraint, by how much it is violated. A PRUNED one
    has its last value where there is one objective. Points without a finite mean are FAIL. Conditional parameters are
    absent where they do not exist. Values that are neither numbers nor text are text.

    Raises:
        LedgerError: the ledger cannot be read.
    """
    from repro_sweep.reporting import study

    return study.study_from(study.read(ledger))
