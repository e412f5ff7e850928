"""The right to be a sweep's coordinator: one process at a time, with a fencing epoch that only grows."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

from repro_sweep.errors import SweepError
from repro_sweep.ledger import Ledger

FILE_NAME = "coordinator.json"


class Lease:
    """Held from :meth:`acquire` to :meth:`release`, or until the process ends, however it ends."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    @classmethod
    def acquire(cls, directory: Path, name: str) -> Lease:
        """Take the lease of the sweep in ``directory``.

        Raises:
            SweepError: another process holds it; the message says which, and since when.
        """
        path = directory / FILE_NAME
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise SweepError(
                f"sweep '{name}' is already running: {_holder(path)}; see it with 'repro-sweep rank {name}'"
            ) from None
        return cls(path, fd)

    def announce(self, ledger: Ledger, socket_path: str) -> int:
        """Write who holds the lease and where it listens; returns the new epoch, recorded in the ledger."""
        epoch = int(ledger.meta("epoch") or 0) + 1
        ledger.set_meta("epoch", str(epoch))
        ledger.commit()
        record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.time(),
            "epoch": epoch,
            "socket": socket_path,
        }
        data = json.dumps(record).encode()
        os.pwrite(self._fd, data, 0)
        os.ftruncate(self._fd, len(data))
        return epoch

    def release(self) -> None:
        """Give the lease back."""
        os.ftruncate(self._fd, 0)
        os.close(self._fd)


def _holder(path: Path) -> str:
    try:
        record = json.loads(path.read_text())
        since = datetime.fromtimestamp(record["since"], UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return (
            f"process {record['pid']} on {record['host']} since {since} (kill -INT {record['pid']} ends it)"
        )
    except (OSError, ValueError, KeyError):
        return f"another process has locked {path}"
