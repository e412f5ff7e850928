"""Where trials run on a machine that does not see the sweep's directory: a folder that stands in for it.

The source comes from the coordinator, once for all workers here. An attempt has a directory of its own, whose files go
to the coordinator: the log while the trial runs, all others when it is over and before its result is sent. What the
folder holds is gone with the machine; only checkpoints outlive it, with ``sweep.checkpoint_uri``.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from repro_sweep import protocol, spool
from repro_sweep.errors import ProtocolError, SweepError
from repro_sweep.exchange import LOG_NAME, PIECE_BYTES
from repro_sweep.lease import ADDRESS_NAME
from repro_sweep.provenance import archive, source
from repro_sweep.sweep import SweepSpec
from repro_sweep.tracking.uri import sqlite_path
from repro_sweep.worker.checkpoints import CHECKPOINTS, Checkpoints, signature
from repro_sweep.worker.client import CoordinatorLostError
from repro_sweep.worker.link import Link
from repro_sweep.worker.site import Site

_TICK_S = 1.0

log = logging.getLogger(__name__)


class Scratch(Site):
    """A folder of this machine, for all workers of a sweep that share a process."""

    def __init__(self, folder: Path) -> None:
        self.directory = folder
        """What stands in for the sweep's directory."""
        self._lock = threading.Lock()
        self._announcing = threading.Lock()
        self._address = ""
        self._settled: dict[str, str] = {}
        folder.mkdir(mode=0o700, exist_ok=True)

    def announce(self, address: str) -> None:
        """Note where the coordinator listens: the text of its ``coordinator.json``. Each actor says it."""
        with self._announcing:
            if address != self._address:
                spool.write_file(self.directory / ADDRESS_NAME, address)
                self._address = address

    def settle(self, link: Link, spec: str) -> str:
        """Have the source here, and the record lead to it; see :meth:`Site.settle`."""
        with self._lock:
            if spec not in self._settled:
                folder = self.directory / f"source-{hashlib.sha256(spec.encode()).hexdigest()[:16]}"
                packed = folder.with_suffix(".tar.gz")
                try:
                    _fetch(link, packed)
                    archive.unpack(packed, folder)
                except OSError as error:
                    raise SweepError(f"the source cannot be stored in {folder}: {error}") from error
                finally:
                    packed.unlink(missing_ok=True)
                here = source.relocated(SweepSpec.model_validate_json(spec), folder, self.directory)
                self._settled[spec] = here.model_dump_json()
            return self._settled[spec]

    def placed(self, assignment: protocol.Assignment) -> protocol.Assignment:
        """See :meth:`Site.placed`; each attempt has a directory of its own."""
        return assignment.model_copy(
            update={"directory": str(self.directory / "attempts" / assignment.attempt)}
        )

    def visit(
        self, assignment: protocol.Assignment, link: Link, spec: SweepSpec
    ) -> contextlib.AbstractContextManager[None]:
        """Bring checkpoints here, and files back; see :meth:`Site.visit`."""
        checkpoints = None
        if spec.checkpoint_uri is not None:
            checkpoints = Checkpoints(
                spec.checkpoint_uri, spec.sweep_id, assignment.trial, assignment.attempt
            )
        return _visit(assignment, link, checkpoints)

    def why_no_mlflow(self, spec: SweepSpec) -> str | None:
        """A store that is a file of another machine cannot be reached from here."""
        if sqlite_path(spec.tracking.uri) is None:
            return None
        return (
            f"the store {spec.tracking.uri} is on the machine where the sweep was started, which this one does not see;"
            " set sweep.tracking.uri to an MLflow server's"
        )


@contextlib.contextmanager
def _visit(assignment: protocol.Assignment, link: Link, checkpoints: Checkpoints | None) -> Iterator[None]:
    here = Path(assignment.directory)
    here.mkdir(parents=True, mode=0o700)
    try:
        if checkpoints is not None:
            checkpoints.restore(here / CHECKPOINTS)
        sender = _Sender(assignment, link, checkpoints)
        thread = threading.Thread(
            target=sender.follow, daemon=True, name=f"files of trial {assignment.trial}"
        )
        thread.start()
        try:
            yield
        finally:
            sender.over.set()
            thread.join()
        with contextlib.suppress(CoordinatorLostError):  # nor will its result be sent
            sender.send_all()
    finally:
        shutil.rmtree(here, ignore_errors=True)


class _Sender:
    """Sends an attempt's files to the coordinator, and its checkpoints to where they are kept."""

    def __init__(self, assignment: protocol.Assignment, link: Link, checkpoints: Checkpoints | None) -> None:
        self._assignment = assignment
        self._here = Path(assignment.directory)
        self._link = link
        self._checkpoints = checkpoints
        self._logged = 0
        self._saved = self._last = signature(self._here / CHECKPOINTS)
        self.over = threading.Event()

    def follow(self) -> None:
        """Send what the log has more, and checkpoints that have not changed for a second, until it is over."""
        with contextlib.suppress(CoordinatorLostError, ProtocolError):
            while not self.over.wait(_TICK_S):
                self._send_log()
                self._save(when_quiet=True)

    def send_all(self) -> None:
        """Send everything, now that the attempt is over."""
        self._send_log()
        for path in sorted(self._here.rglob("*")):
            name = path.relative_to(self._here)
            if path.is_file() and name.parts[0] != CHECKPOINTS and not _is_ours(name):
                try:
                    self._send_file(path, str(name))
                except (OSError, ValueError, ProtocolError) as error:  # a name that no JSON can hold is one
                    log.warning("trial %d: %r is left behind: %s", self._assignment.trial, str(name), error)
        self._save()

    def _save(self, *, when_quiet: bool = False) -> None:
        """Keep checkpoints that have changed; ``when_quiet``: if they have not since the last look."""
        if self._checkpoints is None:
            return
        now = signature(self._here / CHECKPOINTS)
        before, self._last = self._last, now
        due = now != self._saved and (now == before or not when_quiet)
        if due and self._checkpoints.save(self._here / CHECKPOINTS):
            self._saved = now

    def _send_log(self) -> None:
        try:
            file = (self._here / LOG_NAME).open("rb")
        except OSError:  # not yet
            return
        with file:
            file.seek(self._logged)
            while data := file.read(PIECE_BYTES):
                self._send(LOG_NAME, self._assignment.log_size + self._logged, data, grows=True)
                self._logged += len(data)

    def _send_file(self, path: Path, name: str) -> None:
        with path.open("rb") as file:
            offset, data = 0, file.read(PIECE_BYTES)
            while True:
                following = file.read(PIECE_BYTES)
                self._send(name, offset, data, last=not following)
                if not following:
                    return
                offset, data = offset + len(data), following

    def _send(self, name: str, offset: int, data: bytes, *, grows: bool = False, last: bool = False) -> None:
        piece = protocol.Piece(
            attempt=self._assignment.attempt, path=name, offset=offset, data=base64.b64encode(data).decode(),
            grows=grows, last=last,
        )  # fmt: skip
        if self._link.post("/piece", piece, protocol.Acknowledged).refused:
            raise CoordinatorLostError("the attempt has been given up")


def _is_ours(name: Path) -> bool:
    """The log, which has been sent, and the attempt's own record of its reports."""
    return len(name.parts) == 1 and (name.name == LOG_NAME or spool.is_report_log(name.name))


def _fetch(link: Link, archive: Path) -> None:
    with archive.open("wb") as file:
        size = 1
        while file.tell() < size:
            piece = link.post("/source", protocol.SourceRequest(offset=file.tell()), protocol.SourcePiece)
            if piece.error is not None:
                raise SweepError(piece.error)
            size = piece.size
            file.write(base64.b64decode(piece.data))
