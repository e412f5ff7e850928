"""What a tracker has sent already: ``tracking.db`` in the sweep's directory, written by the tracker only.

A row is marked ``unsure`` before something is sent for its trial and unmarked when the reply is recorded. So after a
crash or a lost reply it is known for which trials the server must be asked what it has.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from repro_sweep.errors import LedgerError

FILE_NAME = "tracking.db"
LOCK_NAME = "tracking.lock"
SWEEP = -1
"""Stands for the sweep's own run where a trial's number stands for a trial's run."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS sent (
    trial        INTEGER PRIMARY KEY,
    run_id       TEXT,
    artifact_uri TEXT,
    change       INTEGER NOT NULL,
    seq          INTEGER NOT NULL,
    basics       INTEGER NOT NULL,
    final        TEXT,
    unsure       INTEGER NOT NULL,
    suspect      INTEGER NOT NULL
) STRICT;
"""


@dataclass(slots=True, kw_only=True)
class Sent:
    """What the server has of one trial's run.

    ``change`` and ``seq`` are the ledger's; ``basics`` are the params and the config; ``final`` is the attempt whose
    final metrics, log and artifacts are there. ``unsure``: more may be there. ``suspect``: the run may exist twice.
    """

    trial: int
    run_id: str | None = None
    artifact_uri: str | None = None
    change: int = -1
    seq: int = 0
    basics: bool = False
    final: str | None = None
    unsure: bool = False
    suspect: bool = False

    def take(self, other: Sent) -> None:
        """Become equal to another one."""
        for field in fields(self):
            setattr(self, field.name, getattr(other, field.name))


class SentLog:
    """The open file, exclusively locked: no two trackers work on one sweep.

    Raises:
        BlockingIOError: another tracker has the lock.
        LedgerError: the file cannot be read or written.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE_NAME
        self._lock = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path.touch(mode=0o600)
            self._db = sqlite3.connect(self.path, timeout=30.0)
            self._db.execute(
                "PRAGMA locking_mode = EXCLUSIVE"
            )  # before WAL: no shared memory, so NFS will do
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            os.close(self._lock)
            raise LedgerError(f"{self.path}: {error}") from error
        except OSError:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Close the file and let others have the lock."""
        self._db.close()
        os.close(self._lock)

    def meta(self, key: str) -> str | None:
        """A value of the log itself."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, **values: str) -> None:
        """Set values of the log itself; durable."""
        self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(values.items()))
        self._commit()

    def forget(self) -> None:
        """Drop everything about the server: it is another one, or has lost it."""
        self._db.execute("DELETE FROM sent")
        self._db.execute("DELETE FROM meta")
        self._commit()

    def get(self, trial: int) -> Sent:
        """What is there of one trial."""
        row = self._db.execute("SELECT * FROM sent WHERE trial = ?", (trial,)).fetchone()
        if row is None:
            return Sent(trial=trial)
        number, run_id, artifact_uri, change, seq, basics, final, unsure, suspect = row
        return Sent(
            trial=number,
            run_id=run_id,
            artifact_uri=artifact_uri,
            change=change,
            seq=seq,
            basics=bool(basics),
            final=final,
            unsure=bool(unsure),
            suspect=bool(suspect),
        )

    def put(self, rows: Iterable[Sent]) -> None:
        """Record what is there; durable on return.

        Raises:
            LedgerError: it could not be written.
        """
        try:
            self._db.executemany(
                "INSERT OR REPLACE INTO sent VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [astuple(row) for row in rows],
            )
            self._commit()
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path}: {error}") from error

    def heads(self) -> dict[int, tuple[int, int]]:
        """Change and report up to which each trial has been sent; unsure ones are left out."""
        rows = self._db.execute("SELECT trial, change, seq FROM sent WHERE NOT unsure")
        return {trial: (change, seq) for trial, change, seq in rows}

    def suspects(self) -> dict[int, str]:
        """The runs of trials that may have another one, left by a request that was lost and done late."""
        rows = self._db.execute("SELECT trial, run_id FROM sent WHERE suspect AND run_id IS NOT NULL")
        return dict(rows)

    def _commit(self) -> None:
        self._db.commit()
