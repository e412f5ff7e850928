"""The ledger: one SQLite file in the sweep's directory, the truth about the sweep.

Only the coordinator that holds the sweep's lease writes it; anybody may read it. A change is durable when
:meth:`Ledger.commit` returns (write-ahead log, ``synchronous=FULL``), so the coordinator answers nobody before that.
``trials.change`` is a counter that grows with every change of a trial or its attempts, and ``reports.seq`` one that
grows with every report: a projection that remembers the last ones it has seen finds all that is new.

The ledger must never hold anything that another part could not do without: it is no log.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from repro_sweep.errors import LedgerError
from repro_sweep.states import FailureKind, TrialState
from repro_sweep.sweep import SweepSpec

FORMAT = 1
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
    change     INTEGER NOT NULL
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
    ended_at   REAL
) STRICT;
CREATE INDEX attempts_trial ON attempts (trial, ordinal);
CREATE TABLE reports (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    trial      INTEGER NOT NULL REFERENCES trials (number),
    attempt    TEXT NOT NULL REFERENCES attempts (id),
    step       INTEGER NOT NULL,
    time       REAL NOT NULL,
    metrics    TEXT NOT NULL
) STRICT;
CREATE INDEX reports_trial ON reports (trial, seq);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTrial:
    """A trial to be recorded: its Hydra overrides, swept values, and its composed config as YAML.

    ``directory`` is where its files go, below the sweep's directory unless it is absolute. ``point`` is the same for
    the repeats of one point, and for nothing else; empty where that is told by ``params`` alone.
    """

    number: int
    identity: str
    directory: str
    overrides: tuple[str, ...]
    params: Mapping[str, object]
    repeat: Mapping[str, object]
    config: str
    point: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A recorded trial. ``attempt`` is the id of its latest attempt."""

    number: int
    identity: str
    directory: str
    overrides: tuple[str, ...]
    params: dict[str, object]
    repeat: dict[str, object]
    config: str
    state: TrialState
    attempt: str | None
    change: int
    point: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One execution of a trial. Times are seconds UTC; ``metrics`` are the final ones."""

    id: str
    trial: int
    ordinal: int
    worker: str
    slot: int
    host: str
    state: TrialState
    kind: FailureKind | None
    message: str | None
    metrics: dict[str, float]
    started_at: float
    ended_at: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Metrics that a trial reported at one step; ``time`` is seconds UTC."""

    seq: int
    trial: int
    attempt: str
    step: int
    time: float
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an attempt ended."""

    state: TrialState
    kind: FailureKind | None = None
    message: str | None = None
    metrics: Mapping[str, float]
    ended_at: float


class Ledger:
    """An open ledger.

    One thread at a time may use it. Changes belong to one open transaction until :meth:`commit`.

    Raises:
        LedgerError: the file is missing, of another format, or cannot be read or written.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._db = connection
        self._change = self._scalar_int("SELECT coalesce(max(change), 0) FROM trials")

    @classmethod
    def create(cls, directory: Path, spec: SweepSpec) -> Ledger:
        """Make the ledger of a new sweep; its directory exists."""
        path = directory / FILE_NAME
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        partial.touch(mode=0o600)
        try:
            db = _connect(partial)
            db.executescript(_SCHEMA)
            db.executemany(
                "INSERT INTO meta VALUES (?, ?)",
                [("format", str(FORMAT)), ("spec", spec.model_dump_json())],
            )
            db.commit()
            db.close()
        except sqlite3.Error as error:
            raise LedgerError(f"{path}: {error}") from error
        partial.rename(path)
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path, *, readonly: bool = False) -> Ledger:
        """Open the ledger of an existing sweep; ``readonly`` for all but its coordinator."""
        path = directory / FILE_NAME
        if not path.is_file():
            raise LedgerError(f"{directory}: there is no sweep here (no {FILE_NAME})")
        try:
            db = _connect(path, readonly=readonly)
            row = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
            if row is None or row[0] != str(FORMAT):
                found = "none" if row is None else row[0]
                raise LedgerError(f"{path}: format {found}, this version reads format {FORMAT}")
            if not readonly:
                db.execute("PRAGMA journal_mode = WAL")
            return cls(path, db)
        except sqlite3.Error as error:
            raise LedgerError(f"{path}: {error}") from error

    def close(self) -> None:
        """Close the file; what was not committed is dropped."""
        self._db.close()

    # --- writing ---------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Make all changes durable."""
        try:
            self._db.commit()
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path}: {error}") from error

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

    def start_attempt(self, attempt: Attempt) -> None:
        """Record that an attempt has been handed out; its trial is RUNNING."""
        self._execute(
            "INSERT INTO attempts (id, trial, ordinal, worker, slot, host, state, started_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                attempt.id,
                attempt.trial,
                attempt.ordinal,
                attempt.worker,
                attempt.slot,
                attempt.host,
                attempt.state,
                attempt.started_at,
            ),
        )
        self._set_trial(attempt.trial, TrialState.RUNNING, attempt.id)

    def add_reports(
        self, trial: int, attempt: str, reports: Sequence[tuple[int, float, Mapping[str, float]]]
    ) -> None:
        """Record (step, time, metrics) triples of a running attempt."""
        rows = [(trial, attempt, step, at, json.dumps(metrics)) for step, at, metrics in reports]
        sql = "INSERT INTO reports (trial, attempt, step, time, metrics) VALUES (?, ?, ?, ?, ?)"
        try:
            self._db.executemany(sql, rows)
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path}: {error}") from error

    def finish_attempt(self, attempt: str, trial: int, outcome: Outcome, *, again: bool = False) -> None:
        """Record an attempt's end, once; ``again``: its trial waits for another attempt instead of ending."""
        done = self._execute(
            "UPDATE attempts SET state = ?, kind = ?, message = ?, metrics = ?, ended_at = ?"
            " WHERE id = ? AND state = 'RUNNING'",
            (
                outcome.state,
                outcome.kind,
                outcome.message,
                json.dumps(dict(outcome.metrics)),
                outcome.ended_at,
                attempt,
            ),
        )
        if done.rowcount:
            self._set_trial(trial, TrialState.WAITING if again else outcome.state, attempt)

    def close_open_attempts(self, why: str) -> None:
        """Before a coordinator takes over: attempts still RUNNING were lost, and their trials wait again."""
        for attempt in self.attempts():
            if attempt.state is TrialState.RUNNING:
                outcome = Outcome(
                    state=TrialState.FAIL, kind=FailureKind.NODE_LOST, message=why, metrics={}, ended_at=now()
                )
                self.finish_attempt(attempt.id, attempt.trial, outcome, again=True)

    def set_withdrawn(self, numbers: Iterable[int]) -> None:
        """Note the trials that are no part of the sweep any more: they stay as they are, and are not handed out."""
        self.set_meta("withdrawn", json.dumps(list(numbers)))

    @property
    def withdrawn(self) -> frozenset[int]:
        """The trials that are no part of the sweep any more."""
        return frozenset(json.loads(self.meta("withdrawn") or "[]"))

    def set_states(self, numbers: Iterable[int], state: TrialState) -> None:
        """Set the state of trials that no attempt is running."""
        for number in numbers:
            self._execute(
                "UPDATE trials SET state = ?, change = ? WHERE number = ?",
                (state, self._next_change(), number),
            )

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
        row = self._execute(f"SELECT {_TRIAL} FROM trials WHERE number = ?", (number,)).fetchone()
        if row is None:
            raise LedgerError(f"{self.path}: there is no trial {number}")
        return _trial(row)

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
            f"SELECT {_TRIAL} FROM trials WHERE {where} ORDER BY change", args
        ).fetchall():
            yield _trial(row)

    def attempts(self, trial: int | None = None) -> list[Attempt]:
        """The attempts of one trial in their order, or of all trials."""
        where, args = ("", ()) if trial is None else ("WHERE trial = ?", (trial,))
        rows = self._execute(f"SELECT {_ATTEMPT} FROM attempts {where} ORDER BY trial, ordinal", args)
        return [_attempt(row) for row in rows]

    def attempt(self, attempt: str) -> Attempt | None:
        """One attempt by its id, None where it is not known."""
        row = self._execute(f"SELECT {_ATTEMPT} FROM attempts WHERE id = ?", (attempt,)).fetchone()
        return None if row is None else _attempt(row)

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

    # --- inside ----------------------------------------------------------------------------------------------

    def _execute(self, sql: str, args: Sequence[object] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(sql, args)
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path}: {error}") from error

    def _scalar_int(self, sql: str) -> int:
        return int(self._execute(sql).fetchone()[0])

    def _next_change(self) -> int:
        self._change += 1
        return self._change

    def _set_trial(self, number: int, state: TrialState, attempt: str) -> None:
        self._execute(
            "UPDATE trials SET state = ?, attempt = ?, change = ? WHERE number = ?",
            (state, attempt, self._next_change(), number),
        )


_TRIAL = "number, identity, point, directory, overrides, params, repeat, config, state, attempt, change"
_ATTEMPT = "id, trial, ordinal, worker, slot, host, state, kind, message, metrics, started_at, ended_at"


def _trial(row: tuple[object, ...]) -> Trial:
    number, identity, point, directory, overrides, params, repeat, config, state, attempt, change = row
    return Trial(
        number=number,  # type: ignore[arg-type]  # STRICT tables: the columns have their declared types
        identity=str(identity),
        point=str(point),
        directory=str(directory),
        overrides=tuple(json.loads(str(overrides))),
        params=json.loads(str(params)),
        repeat=json.loads(str(repeat)),
        config=str(config),
        state=TrialState(str(state)),
        attempt=None if attempt is None else str(attempt),
        change=change,  # type: ignore[arg-type]
    )


def _attempt(row: tuple[object, ...]) -> Attempt:
    ident, trial, ordinal, worker, slot, host, state, kind, message, metrics, started_at, ended_at = row
    return Attempt(
        id=str(ident),
        trial=trial,  # type: ignore[arg-type]  # STRICT tables, as above
        ordinal=ordinal,  # type: ignore[arg-type]
        worker=str(worker),
        slot=slot,  # type: ignore[arg-type]
        host=str(host),
        state=TrialState(str(state)),
        kind=None if kind is None else FailureKind(str(kind)),
        message=None if message is None else str(message),
        metrics={} if metrics is None else json.loads(str(metrics)),
        started_at=started_at,  # type: ignore[arg-type]
        ended_at=ended_at,  # type: ignore[arg-type]
    )


def _connect(path: Path, *, readonly: bool = False) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}{'?mode=ro' if readonly else ''}"
    db = sqlite3.connect(uri, uri=True, check_same_thread=False, timeout=30.0)
    if not readonly:
        db.execute("PRAGMA synchronous = FULL")
    return db


def now() -> float:
    """Seconds UTC, the stamp that all records use."""
    return time.time()
