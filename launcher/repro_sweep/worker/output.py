"""A trial's log file: everything it prints, up to a limit; of more, the head and the tail are kept."""

from __future__ import annotations

import contextlib
from collections import deque
from pathlib import Path


class CappedLog:
    """Writes output to a file as it comes. Past half of ``limit`` bytes it keeps the last half in memory only,
    and :meth:`close` appends it behind a line that says how much was left out. What a full disk does not take is left
    out too: no trial fails for its log."""

    def __init__(self, path: Path, limit: int) -> None:
        self._file = path.open("ab", buffering=0)
        self._room = limit // 2
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self._tail_limit = limit - limit // 2
        self._dropped = 0

    def write(self, data: bytes) -> None:
        """Take output."""
        if self._room > 0:
            self._write(data[: self._room])
            data, self._room = data[self._room :], max(0, self._room - len(data))
        if data:
            self._tail.append(data)
            self._tail_size += len(data)
            while self._tail_size - len(self._tail[0]) >= self._tail_limit:
                self._tail_size -= len(self._tail[0])
                self._dropped += len(self._tail.popleft())

    def close(self) -> None:
        """Write the tail and close the file."""
        if self._dropped:
            self._write(f"\n[repro-sweep: {self._dropped:,} bytes left out (sweep.log_limit_mb)]\n".encode())
        self._write(b"".join(self._tail))
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[self._file.write(data) or 0 :]
            except OSError:
                self._dropped += len(data)
                return
