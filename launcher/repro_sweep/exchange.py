"""Files between the coordinator and machines that do not see the sweep's directory: the coordinator's side."""

from __future__ import annotations

import base64
import os
from pathlib import Path

from repro_sweep import protocol
from repro_sweep.errors import UnwritableError

ARCHIVE_NAME = "source.tar.gz"
BUNDLE = "submission"
"""The folder of what was submitted (``provenance.bundle``), with the archive of the source in it."""
BUNDLE_ID = "id"
"""A file there that is written last: the snapshot's id, and a hash of all the others."""
LOG_NAME = "trial.log"
RECORD_NAME = "record.json"
PIECE_BYTES = 1 << 20


def put(trial: Path, piece: protocol.Piece) -> None:
    """Write a piece of a file in a trial's directory; it may come twice.

    Raises:
        UnwritableError: it cannot be written.
    """
    path = trial / piece.path
    target = path if piece.grows else path.with_name(f".{path.name}.partial")
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if piece.offset == 0 and not piece.grows else 0)
    try:
        path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
        with os.fdopen(os.open(target, flags, 0o600), "wb") as file:
            file.seek(piece.offset)
            file.write(base64.b64decode(piece.data))
        if piece.last:
            target.replace(path)
    except OSError as error:
        raise UnwritableError(f"{path} cannot be written: {error}") from error


def log_size(trial: Path) -> int:
    """How long a trial's log is, in bytes."""
    try:
        return (trial / LOG_NAME).stat().st_size
    except OSError:
        return 0


def source_at(sweep: Path, offset: int) -> protocol.SourcePiece:
    """The archive of the sweep's source from a byte on."""
    try:
        with (sweep / BUNDLE / ARCHIVE_NAME).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(offset)
            return protocol.SourcePiece(data=base64.b64encode(file.read(PIECE_BYTES)).decode(), size=size)
    except OSError as error:
        return protocol.SourcePiece(error=f"the source cannot be had: {error}")
