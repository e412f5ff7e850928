"""What MLflow lacks of a sweep, told from two files: the ledger, and what the tracker has noted as sent."""

from __future__ import annotations

import sqlite3

from repro_sweep.ledger import Ledger
from repro_sweep.states import TrialState
from repro_sweep.tracking.sent import FILE_NAME, SWEEP

_WAIT_S = 0.2


def lacking(ledger: Ledger, *, whole: bool = False) -> int | None:
    """How many trials that have started MLflow lacks, or has not all of; None while a tracker is at work.

    ``whole``: the sweep's own run counts as well.
    """
    sent: dict[int, tuple[int, int]] = {}
    path = ledger.path.with_name(FILE_NAME)
    if path.is_file():
        try:
            db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_WAIT_S)
            try:
                rows = db.execute("SELECT trial, change, seq FROM sent WHERE NOT unsure")
                sent = {trial: (change, seq) for trial, change, seq in rows}
            finally:
                db.close()
        except sqlite3.Error:  # locked by a tracker, or just being made by one
            return None
    heads = ledger.report_heads()
    own = int(whole and SWEEP not in sent)
    return own + sum(
        sent.get(number, (-1, 0))[0] != change or sent.get(number, (-1, 0))[1] < heads.get(number, 0)
        for number, change, state, started in ledger.changes()
        if started or state is not TrialState.WAITING
    )
