"""What a tracker has sent already: ``tracking.db`` in the sweep's directory, written by the tracker only.

A row is marked ``unsure`` before something is sent for its trial and unmarked when the reply is recorded. So after a
crash or a lost reply it is known for which trials the server must be asked what it has.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from repro_sweep.errors import LedgerError
from repro_sweep.records import Attempt, Trial

FILE_NAME = "tracking.db"
LOCK_NAME = "tracking.lock"
SWEEP = -1
"""Stands for the sweep's own run where a trial's number stands for a trial's run."""
_CODES = "codes"

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


@dataclass(frozen=True, slots=True)
class Session:
    """From ``since`` (seconds UTC) on attempts start with ``code``; ``change`` was the ledger's last one before.

    ``epoch`` is that of the coordinator, or of the latest one with the same code.
    """

    epoch: int
    since: float
    change: int
    code: str


@dataclass(frozen=True, slots=True)
class Codes:
    """With which code the attempts of a sweep ran, as far as a tracker was there to see it.

    A sweep may be started again with other code, and what ran before may reach the server only then.
    """

    sessions: tuple[Session, ...] = ()

    def begin(self, session: Session) -> Codes:
        """The same with another coordinator's session."""
        if not self.sessions:
            return Codes((session,))
        *before, last = self.sessions
        if last.epoch >= session.epoch:
            return self
        if (
            last.epoch + 1 < session.epoch
        ):  # one has come and gone unseen: nobody knows which attempts were its
            return Codes((*self.sessions, replace(last, code=""), session))
        if last.code == session.code:
            return Codes((*before, replace(last, epoch=session.epoch)))
        return Codes((*self.sessions, session))

    def of(self, trial: Trial, latest: Attempt | None) -> str:
        """The code of a trial's latest attempt; empty where it is not known, or there is none."""
        if latest is None:
            return ""
        if trial.reused is not None:  # its attempt has the times of the run that it was taken from
            codes = [each.code for each in self.sessions if each.change < trial.change]
        else:
            codes = [each.code for each in self.sessions if each.since <= latest.started_at]
        return codes[-1] if codes else ""


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
        self._db.execute("DELETE FROM meta WHERE key <> ?", (_CODES,))
        self._commit()

    def codes(self) -> Codes:
        """With which code the sweep's attempts ran."""
        return Codes(tuple(Session(*each) for each in json.loads(self.meta(_CODES) or "[]")))

    def set_codes(self, codes: Codes) -> None:
        """Record with which code the sweep's attempts ran; durable."""
        self.set_meta(**{_CODES: json.dumps([astuple(each) for each in codes.sessions])})

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
