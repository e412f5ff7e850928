"""``python -m repro_sweep.reporting DIRECTORY``: writes the report of a sweep, at low priority.

It says how many seconds of CPU that took, for whoever starts it to decide how often it is worth it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

_NICE = 10
_NOT_NEEDED = ("matplotlib", "sklearn")
"""Optuna imports these where they are there, which takes longer than the report; nothing here uses them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of the sweep in the given directory; returns 0, or 1 after one line that says why not."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m repro_sweep.reporting DIRECTORY\n")
        return 1
    _yield_to_trials()
    try:
        _write(Path(arguments[0]))
    except Exception as error:  # noqa: BLE001  (a sweep has ended well without its report)
        text = " ".join(str(error).split())
        sys.stderr.write(f"no report: {text or type(error).__name__}\n")
        return 1
    print(f"{time.process_time():.3f}")  # noqa: T201
    return 0


def _write(directory: Path) -> None:
    from repro_sweep.ledger import Ledger
    from repro_sweep.reporting import write_report

    with warnings.catch_warnings(), contextlib.closing(Ledger.open(directory, readonly=True)) as ledger:
        warnings.simplefilter("ignore")  # libraries' remarks are for those who write code
        write_report(ledger, directory)


def _yield_to_trials() -> None:
    os.nice(_NICE)
    # Linux may weigh sessions instead of processes
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(_NICE))


if __name__ == "__main__":
    sys.modules.update(dict.fromkeys(_NOT_NEEDED))  # type: ignore[arg-type]  # None: as if not installed
    sys.exit(main())
