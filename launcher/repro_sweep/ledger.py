"""The ledger: one SQLite file in the sweep's directory, the truth about the sweep.

Only the coordinator that holds the sweep's lease writes it; anybody may read it. A change is durable when
:meth:`Ledger.commit` returns (``synchronous=FULL``; a write-ahead log, or a rollback journal where several machines use
the ledger), so the coordinator answers nobody before that.
``trials.change`` is a counter that grows with every change of a trial or its attempts, and ``reports.seq`` one that
grows with every report: a projection that remembers the last ones it has seen finds all that is new.

The ledger must never hold anything that another part could not do without: it is no log.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repro_sweep.errors import LeaseLostError, LedgerError, UnwritableError
from repro_sweep.records import (
    ATTEMPT_COLUMNS,
    TRIAL_COLUMNS,
    Attempt,
    NewReport,
    NewTrial,
    NextAttempt,
    Outcome,
    Report,
    Reused,
    Standing,
    Step,
    Trial,
    attempt_of,
    trial_of,
)
from repro_sweep.states import StepKind, TrialState
from repro_sweep.sweep import SweepSpec

FORMAT = 3
FILE_NAME = "ledger.db"

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE trials (
    number     INTEGER PRIMARY KEY,
    identity   TEXT NOT NULL UNIQUE,
    point      TEXT NOT NULL,
    directory  TEXT NOT NULL,
    overrides  TEXT NOT NULL,
    params     TEXT NOT NULL,
    repeat     TEXT NOT NULL,
    config     TEXT NOT NULL,
    state      TEXT NOT NULL,
    attempt    TEXT,
    change     INTEGER NOT NULL,
    cancelled  INTEGER NOT NULL DEFAULT 0,
    retries_from INTEGER NOT NULL DEFAULT 0,
    reused     TEXT
) STRICT;
CREATE INDEX trials_change ON trials (change);
CREATE INDEX trials_state ON trials (state);
CREATE TABLE attempts (
    id         TEXT PRIMARY KEY,
    trial      INTEGER NOT NULL REFERENCES trials (number),
    ordinal    INTEGER NOT NULL,
    worker     TEXT NOT NULL,
    slot       INTEGER NOT NULL,
    host       TEXT NOT NULL,
    state      TEXT NOT NULL,
    kind       TEXT,
    message    TEXT,
    metrics    TEXT,
    started_at REAL NOT NULL,
    ended_at   REAL,
    reports    INTEGER NOT NULL DEFAULT 0,
    code       TEXT NOT NULL
) STRICT;
CREATE INDEX attempts_trial ON attempts (trial, ordinal);
CREATE INDEX attempts_open ON attempts (id) WHERE state = 'RUNNING';
CREATE TABLE reports (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    trial      INTEGER NOT NULL REFERENCES trials (number),
    attempt    TEXT NOT NULL REFERENCES attempts (id),
    step       INTEGER NOT NULL,
    time       REAL NOT NULL,
    metrics    TEXT NOT NULL
) STRICT;
CREATE INDEX reports_trial ON reports (trial, seq);
CREATE INDEX reports_step ON reports (trial, step);
CREATE TABLE steps (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    kind       TEXT NOT NULL,
    data       TEXT NOT NULL
) STRICT;
"""


_FULL = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR})


class Ledger:
    """An open ledger.

    One thread at a time may use it. Changes belong to one open transaction until :meth:`commit`.

    Raises:
        LedgerError: the file is missing, of another format, or cannot be read or written.
        LeaseLostError: at a commit: the sweep has another coordinator by now.
        UnwritableError: the disk is full or broken for now.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._db = connection
        self._epoch: str | None = None
        self._change = self._scalar_int("SELECT coalesce(max(change), 0) FROM trials")

    @classmethod
    def create(cls, directory: Path, spec: SweepSpec, *, shared: bool = False) -> Ledger:
        """Make the ledger of a new sweep; its directory exists. If another process is faster, the ledger is its.

        ``shared``: see :meth:`share`.
        """
        path = directory / FILE_NAME
        partial = path.with_name(f"{FILE_NAME}.{uuid.uuid4().hex}.partial")
        partial.touch(mode=0o600)
        try:
            db = _connect(partial)
            db.executescript(_SCHEMA)
            db.executemany(
                "INSERT INTO meta VALUES (?, ?)",
                [("format", str(FORMAT)), ("spec", spec.model_dump_json()), ("epoch", "0")],
            )
            db.commit()
            if not shared:
                db.execute(f"PRAGMA journal_mode = {_WAL}")
            db.close()
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(partial)
        except sqlite3.Error as error:
            raise _meaning(path, error) from error
        except OSError as error:
            raise LedgerError(f"{path}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path, *, readonly: bool = False) -> Ledger:
        """Open the ledger of an existing sweep; ``readonly`` for all but its coordinator."""
        path = directory / FILE_NAME
        if not path.is_file():
            raise LedgerError(f"{directory}: there is no sweep here (no {FILE_NAME})")
        try:
            db = _connect(path, readonly=readonly)
            _clean_up(path, db)
            row = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
            if row is None or row[0] != str(FORMAT):
                found = "none" if row is None else row[0]
                raise LedgerError(f"{path}: format {found}, this version reads format {FORMAT}")
            if not readonly and _journal_mode(db) != _WAL:
                db.execute(f"PRAGMA journal_mode = {_ROLLBACK}")
            return cls(path, db)
        except sqlite3.Error as error:
            raise _meaning(path, error) from error

    def share(self, shared: bool) -> None:
        """Let processes on other machines use the ledger too, or not any more. Its user holds the sweep's lease.

        A write-ahead log needs memory that all of its users share. Without it, who reads keeps the writer waiting for a
        moment, and a commit takes one more sync to the disk.

        Raises:
            LedgerError: others have it open.
        """
        wanted = _ROLLBACK if shared else _WAL
        deadline = time.monotonic() + _SHARE_S
        while (mode := _journal_mode(self._db)) != wanted:
            try:
                mode = self._db.execute(f"PRAGMA journal_mode = {wanted}").fetchone()[0]
            except sqlite3.OperationalError as error:
                if _primary(error) != sqlite3.SQLITE_BUSY:
                    raise _meaning(self.path, error) from error
            if mode != wanted and time.monotonic() > deadline:
                raise LedgerError(
                    f"{self.path}: another process reads it, and it must not while the sweep moves to"
                    f" {'several machines' if shared else 'one machine'}; end that process ('repro-sweep logs -f'?)"
                )
            if mode != wanted:
                time.sleep(_SHARE_LOOK_S)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Ledger]:
        """All that stands in the ledger now, to be read for long: a copy, so that the coordinator can go on writing."""
        copy = sqlite3.connect(":memory:", check_same_thread=False)
        try:
            self._db.backup(copy)
            yield Ledger(self.path, copy)
        except sqlite3.Error as error:
            raise _meaning(self.path, error) from error
        finally:
            copy.close()

    def close(self) -> None:
        """Close the file; what was not committed is dropped."""
        self._db.close()

    # --- writing ---------------------------------------------------------------------------------------------

    def begin(self, wait_s: float) -> bool:
        """Begin a change that nobody else's can come between; returns whether that was possible within the time."""
        wait_ms = int(wait_s * 1000)
        if wait_ms != _BUSY_MS:
            self._execute(f"PRAGMA busy_timeout = {wait_ms}")
        try:
            self._db.execute("BEGIN IMMEDIATE")
            return True
        except sqlite3.OperationalError as error:
            if _primary(error) == sqlite3.SQLITE_BUSY:
                return False
            raise _meaning(self.path, error) from error
        finally:
            if wait_ms != _BUSY_MS:
                self._execute(f"PRAGMA busy_timeout = {_BUSY_MS}")

    def fence(self, epoch: int) -> None:
        """From now on, commit only while this is the ledger's epoch: it grows with each new coordinator."""
        self._epoch = str(epoch)
        self._change = self._scalar_int("SELECT coalesce(max(change), 0) FROM trials")

    def begin_change(self) -> None:
        """Begin a change of the one coordinator that may make some: nobody's writes come between."""
        if not self.begin(_BUSY_MS / 1000):
            raise LedgerError(f"{self.path}: locked by another process")
        self._check_epoch()

    def commit(self) -> None:
        """Make all changes durable."""
        try:
            if self._db.in_transaction:
                self._check_epoch()
            self._db.commit()
        except sqlite3.Error as error:
            if _primary(error) == sqlite3.SQLITE_BUSY:
                raise UnwritableError(f"{self.path}: somebody reads it and does not end") from error
            raise _meaning(self.path, error) from error

    def rollback(self) -> None:
        """Drop the changes since the last commit."""
        self._db.rollback()

    def update_spec(self, spec: SweepSpec) -> None:
        """Replace the sweep's record (the same sweep, submitted again)."""
        self._execute("UPDATE meta SET value = ? WHERE key = 'spec'", (spec.model_dump_json(),))

    def set_meta(self, key: str, value: str) -> None:
        """Set one of the ledger's own values (the fencing epoch, for one)."""
        self._execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (key, value),
        )

    def add_trials(self, trials: Iterable[NewTrial]) -> None:
        """Record trials as WAITING; their numbers and identities are new."""
        sql = (
            "INSERT INTO trials (number, identity, point, directory, overrides, params, repeat, config, state, change)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        )
        for trial in trials:
            overrides, params, repeat = (
                json.dumps(each) for each in (trial.overrides, trial.params, trial.repeat)
            )
            row = (trial.number, trial.identity, trial.point, trial.directory, overrides, params, repeat)
            self._execute(sql, (*row, trial.config, TrialState.WAITING, self._next_change()))

    def start_attempt(self, attempt: Attempt) -> bool:
        """Record that an attempt has been handed out; its trial is RUNNING.

        Returns:
            False, having changed nothing, where there is or was an attempt of that id.

        Raises:
            LedgerError: the trial is not WAITING: it must not be handed out.
        """
        row = (attempt.id, attempt.trial, attempt.ordinal, attempt.worker, attempt.slot, attempt.host)
        added = self._execute(
            "INSERT INTO attempts (id, trial, ordinal, worker, slot, host, state, started_at, code)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
            (*row, attempt.state, attempt.started_at, attempt.code),
        )
        if added.rowcount != 1:
            return False
        moved = self._execute(
            "UPDATE trials SET state = ?, attempt = ?, change = ? WHERE number = ? AND state = ?",
            (TrialState.RUNNING, attempt.id, self._next_change(), attempt.trial, TrialState.WAITING),
        )
        if moved.rowcount != 1:
            raise LedgerError(f"{self.path}: trial {attempt.trial} does not wait")
        return True

    def add_reports(self, attempt: str, reports: Sequence[NewReport]) -> bool:
        """Record reports of a running attempt, each once: those with a number that is larger than all before.

        Returns:
            False where the attempt has ended without some of them: they are not recorded.

        They come in order, perhaps again. A step that an earlier attempt of the trial has reported with the same
        metrics is counted but not kept: a trial that goes on from a checkpoint has one history without repetitions.
        """
        found = self._execute(
            "SELECT trial, ordinal, reports, state FROM attempts WHERE id = ?", (attempt,)
        ).fetchone()
        if found is None or found[3] != TrialState.RUNNING:
            return found is not None and all(report.seq < found[2] for report in reports)
        trial, ordinal, taken, _ = found
        rows = []
        for report in reports:
            if report.seq >= taken:
                taken = report.seq + 1
                rows.append((trial, attempt, report.step, report.time, json.dumps(dict(report.metrics))))
        try:
            if ordinal == 0:
                self._db.executemany(_ADD_REPORT, rows)
            else:
                self._db.executemany(
                    _ADD_NEW_REPORT, [(*row, trial, row[2], row[4], attempt) for row in rows]
                )
        except sqlite3.Error as error:
            raise _meaning(self.path, error) from error
        if rows:
            self._execute("UPDATE attempts SET reports = ? WHERE id = ?", (taken, attempt))
        return True

    def finish_attempt(
        self, attempt: str, outcome: Outcome, *, again: bool = False, cancelled: bool = False
    ) -> bool:
        """Record an attempt's end, once; returns False, having changed nothing, where it has ended before.

        ``again``: its trial waits for another attempt instead of ending. ``cancelled``: the user has cancelled it.
        """
        end = (
            outcome.state,
            outcome.kind,
            outcome.message,
            json.dumps(dict(outcome.metrics)),
            outcome.ended_at,
        )
        done = self._execute(
            "UPDATE attempts SET state = ?, kind = ?, message = ?, metrics = ?, ended_at = ?"
            " WHERE id = ? AND state = 'RUNNING' RETURNING trial",
            (*end, attempt),
        ).fetchone()
        if done is None:
            return False
        self._execute(
            "UPDATE trials SET state = ?, cancelled = ?, change = ? WHERE number = ? AND attempt = ?",
            (
                TrialState.WAITING if again else outcome.state,
                int(cancelled),
                self._next_change(),
                done[0],
                attempt,
            ),
        )
        return True

    def note(self, attempt: str, text: str) -> None:
        """Add a remark to an attempt that has ended, once."""
        self._execute(
            "UPDATE attempts SET message = coalesce(message || '; ', '') || ?"
            " WHERE id = ? AND instr(coalesce(message, ''), ?) = 0",
            (text, attempt, text),
        )

    def reuse(self, number: int, found: Reused, code: str) -> None:
        """Record another sweep's result, found with the same code, as that of a waiting trial."""
        attempt = Attempt(
            id=uuid.uuid4().hex, trial=number, ordinal=len(self.attempts(number)), worker="", slot=0, host=found.host,
            state=TrialState.RUNNING, kind=None, message=None, metrics={}, started_at=found.started_at, ended_at=None,
            code=code,
        )  # fmt: skip
        self.start_attempt(attempt)
        outcome = Outcome(
            state=TrialState.COMPLETE, message=f"reused from {found.origin}", metrics=found.metrics,
            ended_at=found.ended_at,
        )  # fmt: skip
        self.finish_attempt(attempt.id, outcome)
        self._execute("UPDATE trials SET reused = ? WHERE number = ?", (found.run_id, number))

    def requeue(self, numbers: Iterable[int]) -> None:
        """Let trials that have failed or were cancelled wait again, with all their retries."""
        for number in numbers:
            self._execute(
                "UPDATE trials SET state = 'WAITING', cancelled = 0, change = ?,"
                " retries_from = (SELECT count(*) FROM attempts WHERE trial = number)"
                " WHERE number = ? AND state = 'FAIL'",
                (self._next_change(), number),
            )

    def cancel(self, numbers: Iterable[int]) -> None:
        """Cancel trials: those that wait end now, those that run at the end of their attempt."""
        for number in numbers:
            self._execute(
                "UPDATE trials SET state = iif(state = 'WAITING', 'FAIL', state), cancelled = 1, change = ?"
                " WHERE number = ? AND state IN ('WAITING', 'RUNNING')",
                (self._next_change(), number),
            )

    def add_step(self, kind: StepKind, data: Mapping[str, Any]) -> int:
        """Record a step of the sweep's search; returns its ``seq``."""
        row = self._execute("INSERT INTO steps (kind, data) VALUES (?, ?)", (kind, json.dumps(data)))
        return row.lastrowid or 0

    def set_search_over(self, why: str | None) -> None:
        """Note why a search has ended, or that it goes on."""
        self.set_meta("search_over", why or "")

    def set_search_hours(self, hours: float) -> None:
        """For how long the search has run."""
        self.set_meta("search_hours", str(hours))

    def set_withdrawn(self, numbers: Iterable[int]) -> None:
        """Note the trials that are no part of the sweep any more: they stay as they are, and are not handed out."""
        self.set_meta("withdrawn", json.dumps(list(numbers)))

    @property
    def search_over(self) -> str | None:
        """Why the search has ended; None while it goes on, and for a grid."""
        return self.meta("search_over") or None

    @property
    def search_hours(self) -> float:
        """For how long the search has run."""
        return float(self.meta("search_hours") or 0.0)

    @property
    def withdrawn(self) -> frozenset[int]:
        """The trials that are no part of the sweep any more."""
        return frozenset(json.loads(self.meta("withdrawn") or "[]"))

    @property
    def cancelled(self) -> frozenset[int]:
        """The trials that the user has cancelled."""
        return frozenset(number for (number,) in self._execute("SELECT number FROM trials WHERE cancelled"))

    # --- reading ---------------------------------------------------------------------------------------------

    @property
    def spec(self) -> SweepSpec:
        """The sweep's record."""
        return SweepSpec.model_validate_json(self.meta("spec") or "")

    def meta(self, key: str) -> str | None:
        """One of the ledger's own values, None where it was never set."""
        row = self._execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def counts(self) -> dict[TrialState, int]:
        """How many trials are in each state (every state is a key)."""
        counts = dict.fromkeys(TrialState, 0)
        for state, count in self._execute("SELECT state, count(*) FROM trials GROUP BY state"):
            counts[TrialState(state)] = count
        return counts

    def states(self) -> list[tuple[int, TrialState]]:
        """Number and state of every trial, by number: all that a coordinator keeps in memory."""
        rows = self._execute("SELECT number, state FROM trials ORDER BY number")
        return [(number, TrialState(state)) for number, state in rows]

    def next_number(self) -> int:
        """The number that the next new trial gets."""
        return self._scalar_int("SELECT coalesce(max(number) + 1, 0) FROM trials")

    def directories(self) -> dict[str, int]:
        """The number of the trial that each directory belongs to."""
        return dict(self._execute("SELECT directory, number FROM trials"))

    def identities(self) -> dict[str, tuple[int, TrialState]]:
        """Number and state of every trial by its identity."""
        rows = self._execute("SELECT identity, number, state FROM trials")
        return {identity: (number, TrialState(state)) for identity, number, state in rows}

    def trial(self, number: int) -> Trial:
        """One trial."""
        row = self._execute(f"SELECT {TRIAL_COLUMNS} FROM trials WHERE number = ?", (number,)).fetchone()
        if row is None:
            raise LedgerError(f"{self.path}: there is no trial {number}")
        return trial_of(row)

    def next_attempt(self, number: int) -> NextAttempt:
        """What a trial's next attempt needs, in one look."""
        row = self._execute(
            "SELECT overrides, config, identity, directory, cancelled,"
            " (SELECT count(*) FROM attempts WHERE trial = number) FROM trials WHERE number = ?",
            (number,),
        ).fetchone()
        if row is None:
            raise LedgerError(f"{self.path}: there is no trial {number}")
        overrides, config, identity, directory, cancelled, ordinal = row
        return NextAttempt(
            ordinal=ordinal, overrides=tuple(json.loads(overrides)), config=config, identity=identity,
            directory=directory, cancelled=bool(cancelled),
        )  # fmt: skip

    def standing(self, attempt: str) -> Standing | None:
        """How an attempt stands, in one look; None where it is not known."""
        row = self._execute(
            "SELECT trial, attempts.state, ended_at, cancelled FROM attempts JOIN trials ON number = trial"
            " WHERE id = ?",
            (attempt,),
        ).fetchone()
        if row is None:
            return None
        trial, state, ended_at, cancelled = row
        return Standing(trial=trial, state=TrialState(state), ended_at=ended_at, cancelled=bool(cancelled))

    def trials(
        self, *, states: Sequence[TrialState] | None = None, changed_after: int = -1
    ) -> Iterator[Trial]:
        """Trials in the order of their latest change; filtered by state if ``states`` is given."""
        where = "change > ?"
        args: list[object] = [changed_after]
        if states is not None:
            where += f" AND state IN ({', '.join('?' * len(states))})"
            args.extend(states)
        for row in self._execute(
            f"SELECT {TRIAL_COLUMNS} FROM trials WHERE {where} ORDER BY change", args
        ).fetchall():
            yield trial_of(row)

    def attempts(self, trial: int | None = None) -> list[Attempt]:
        """The attempts of one trial in their order, or of all trials."""
        where, args = ("", ()) if trial is None else ("WHERE trial = ?", (trial,))
        rows = self._execute(f"SELECT {ATTEMPT_COLUMNS} FROM attempts {where} ORDER BY trial, ordinal", args)
        return [attempt_of(row) for row in rows]

    def open_attempts(self) -> list[Attempt]:
        """The attempts that are RUNNING."""
        rows = self._execute(
            f"SELECT {ATTEMPT_COLUMNS} FROM attempts WHERE state = 'RUNNING' ORDER BY started_at"
        )
        return [attempt_of(row) for row in rows]

    def attempt(self, attempt: str) -> Attempt | None:
        """One attempt by its id, None where it is not known."""
        row = self._execute(f"SELECT {ATTEMPT_COLUMNS} FROM attempts WHERE id = ?", (attempt,)).fetchone()
        return None if row is None else attempt_of(row)

    def reports(self, *, after: int = 0, trial: int | None = None, limit: int = 10_000) -> list[Report]:
        """Reports with ``seq > after`` by ``seq``, at most ``limit``; of one trial if it is given."""
        where, args = ("", [after]) if trial is None else ("AND trial = ?", [after, trial])
        rows = self._execute(
            "SELECT seq, trial, attempt, step, time, metrics FROM reports"
            f" WHERE seq > ? {where} ORDER BY seq LIMIT {limit:d}",
            args,
        )
        return [
            Report(seq=seq, trial=number, attempt=attempt, step=step, time=at, metrics=json.loads(metrics))
            for seq, number, attempt, step, at, metrics in rows
        ]

    def steps(self) -> list[Step]:
        """The steps of the search that the sweep is now, from its BEGIN on; empty for a grid."""
        rows = self._execute(
            "SELECT seq, kind, data FROM steps WHERE seq >="
            " (SELECT coalesce(max(seq), 0) FROM steps WHERE kind = 'BEGIN') ORDER BY seq"
        )
        return [Step(seq=seq, kind=StepKind(kind), data=json.loads(data)) for seq, kind, data in rows]

    def ended_before_search(self) -> dict[int, tuple[TrialState, dict[str, float]]]:
        """State and final metrics of the sweep's trials whose ends are not among :meth:`steps`."""
        told = {step.data["trial"] for step in self.steps() if step.kind is StepKind.TELL}
        apart = told | self.withdrawn
        metrics = {attempt.trial: attempt.metrics for attempt in self.attempts()}
        return {
            number: (state, metrics.get(number, {}))
            for number, state in self.states()
            if state.is_finished() and number not in apart
        }

    def changes(self, *, after: int = -1) -> list[tuple[int, int, TrialState, bool]]:
        """Number, change, state and whether it ever started, of every trial changed later than ``after``."""
        rows = self._execute(
            "SELECT number, change, state, attempt IS NOT NULL FROM trials WHERE change > ? ORDER BY change",
            (after,),
        )
        return [(number, change, TrialState(state), bool(started)) for number, change, state, started in rows]

    def report_heads(self, *, after: int = 0) -> dict[int, int]:
        """The highest ``seq`` of the reports of each trial that has reports with ``seq > after``."""
        return dict(
            self._execute("SELECT trial, max(seq) FROM reports WHERE seq > ? GROUP BY trial", (after,))
        )

    def _check_epoch(self) -> None:
        """Within a transaction that has the write lock, so that it stays true until the commit."""
        if self._epoch is not None and self.meta("epoch") != self._epoch:
            self.rollback()
            raise LeaseLostError(f"{self.path}: the sweep has another coordinator by now")

    # --- inside ----------------------------------------------------------------------------------------------

    def _execute(self, sql: str, args: Sequence[object] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(sql, args)
        except sqlite3.Error as error:
            if _primary(error) == sqlite3.SQLITE_READONLY:
                _clean_up(self.path, self._db)
                return self._execute_again(sql, args)
            raise _meaning(self.path, error) from error

    def _execute_again(self, sql: str, args: Sequence[object]) -> sqlite3.Cursor:
        try:
            return self._db.execute(sql, args)
        except sqlite3.Error as error:
            raise _meaning(self.path, error) from error

    def _scalar_int(self, sql: str) -> int:
        return int(self._execute(sql).fetchone()[0])

    def _next_change(self) -> int:
        self._change += 1
        return self._change


_ADD_REPORT = "INSERT INTO reports (trial, attempt, step, time, metrics) VALUES (?, ?, ?, ?, ?)"
_ADD_NEW_REPORT = (
    "INSERT INTO reports (trial, attempt, step, time, metrics) SELECT ?, ?, ?, ?, ? WHERE NOT EXISTS"
    " (SELECT 1 FROM reports WHERE trial = ? AND step = ? AND metrics = ? AND attempt <> ?)"
)
_BUSY_MS = 30_000
_WAL = "wal"
_ROLLBACK = "truncate"
_SHARE_S = 10.0
_SHARE_LOOK_S = 0.1


def _primary(error: sqlite3.Error) -> int:
    """SQLite's primary result code."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _journal_mode(db: sqlite3.Connection) -> str:
    return str(db.execute("PRAGMA journal_mode").fetchone()[0])


def _clean_up(path: Path, reader: sqlite3.Connection) -> None:
    """Undo what a writer that was killed within a commit has left, which one who only reads may not."""
    try:
        reader.execute("SELECT 1 FROM meta").fetchone()
    except sqlite3.OperationalError as error:
        if _primary(error) != sqlite3.SQLITE_READONLY:
            raise
        with contextlib.closing(_connect(path)) as writer:
            writer.execute("SELECT 1 FROM meta").fetchone()


def _meaning(path: Path, error: sqlite3.Error) -> LedgerError:
    if _primary(error) in _FULL:
        return UnwritableError(f"{path}: {error}")
    return LedgerError(f"{path}: {error}")


def _connect(path: Path, *, readonly: bool = False) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}{'?mode=ro' if readonly else ''}"
    db = sqlite3.connect(uri, uri=True, check_same_thread=False, timeout=_BUSY_MS / 1000)
    if not readonly:
        db.execute("PRAGMA synchronous = FULL")
    return db
