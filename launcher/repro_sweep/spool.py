"""What outlives the process that made it: results that found no coordinator, and reports that were not yet sent.

A worker that cannot deliver a result writes it to ``workers/<id>/results/<attempt>.json``; the next coordinator finds
it there. A trial writes each report to ``reports-<attempt>.jsonl`` in its directory before it goes on, so that what a
checkpoint was made after is known even if the trial and its worker die at that instant.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import ValidationError

from repro_sweep import protocol
from repro_sweep.records import NewReport

_RESULTS = "results"
_SYNC_EVERY_S = 1.0
_NUMBER = struct.Struct("q")

log = logging.getLogger(__name__)


def worker_directory(sweep: Path, worker: str) -> Path:
    """The folder of a worker."""
    return sweep / "workers" / worker


# --- results -------------------------------------------------------------------------------------------------


def keep_result(sweep: Path, finish: protocol.Finish) -> None:
    """Write a result to disk; it is whole and durable on return.

    Raises:
        OSError: it cannot be written.
    """
    path = _result_path(sweep, finish.worker, finish.attempt)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_file(path, finish.model_dump_json())


def drop_result(sweep: Path, worker: str, attempt: str) -> None:
    """Forget a result: it was delivered."""
    _result_path(sweep, worker, attempt).unlink(missing_ok=True)


def results(sweep: Path) -> Iterator[protocol.Finish]:
    """All results that wait for a coordinator."""
    for path in sorted(sweep.glob(f"workers/*/{_RESULTS}/*.json")):
        found = _read(path)
        if found is not None:
            yield found


def result_of(sweep: Path, worker: str, attempt: str) -> protocol.Finish | None:
    """The result of one attempt, if it waits for a coordinator."""
    path = _result_path(sweep, worker, attempt)
    return _read(path) if path.exists() else None


def write_file(path: Path, text: str) -> None:
    """Replace a file in one step; only its owner may read it.

    Raises:
        OSError: it cannot be written; the old one is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(os.open(partial, flags, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _result_path(sweep: Path, worker: str, attempt: str) -> Path:
    return worker_directory(sweep, worker) / _RESULTS / f"{attempt}.json"


def _read(path: Path) -> protocol.Finish | None:
    try:
        return protocol.Finish.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        log.warning("%s is no whole result and is left alone: %s", path, str(error).splitlines()[0])
        return None


# --- reports -------------------------------------------------------------------------------------------------


class ReportLog:
    """A trial's own record of its reports, made with the first one.

    A report outlives any process as soon as :meth:`add` returns. It also outlives the machine if the one before is more
    than a second older, so a checkpoint written after it never knows more than the ledger will.
    """

    def __init__(self, trial: Path, attempt: str) -> None:
        self._path = _reports_path(trial, attempt)
        self._fd: int | None = None
        self._synced = float("-inf")
        self._shared = os.memfd_create("reports")  # the next number, for all processes that the trial forks
        os.ftruncate(self._shared, _NUMBER.size)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Keep other processes of the trial from reporting meanwhile."""
        fcntl.lockf(self._shared, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._shared, fcntl.LOCK_UN)

    def add(self, step: int, at: float, metrics: Mapping[str, float]) -> int:
        """Write one report; returns its number, from 0. What cannot be written (a full disk) is passed over."""
        number: int = _NUMBER.unpack(os.pread(self._shared, _NUMBER.size, 0))[0]
        os.pwrite(self._shared, _NUMBER.pack(number + 1), 0)
        line = json.dumps([number, step, at, dict(metrics)]).encode() + b"\n"
        with contextlib.suppress(OSError):
            if self._fd is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._fd = os.open(self._path, flags, 0o600)
            os.write(self._fd, line)
            if time.monotonic() - self._synced > _SYNC_EVERY_S:
                os.fdatasync(self._fd)
                self._synced = time.monotonic()
        return number


def reports_of(trial: Path, attempt: str) -> list[NewReport]:
    """The reports of an attempt that its trial has written, up to the first that is not whole."""
    found = []
    with contextlib.suppress(OSError, ValueError, TypeError):
        for line in _reports_path(trial, attempt).read_bytes().splitlines():
            seq, step, at, metrics = json.loads(line)
            found.append(NewReport(seq=seq, step=step, time=at, metrics=metrics))
    return found


def is_report_log(name: str) -> bool:
    """Whether a file in a trial's directory is such a record."""
    return name.startswith("reports-") and name.endswith(".jsonl")


def drop_reports(trial: Path, attempt: str) -> None:
    """Forget an attempt's own record of its reports: the ledger has them."""
    _reports_path(trial, attempt).unlink(missing_ok=True)


def _reports_path(trial: Path, attempt: str) -> Path:
    return trial / f"reports-{attempt}.jsonl"
