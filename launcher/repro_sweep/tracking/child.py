"""The tracker's process as the coordinator's side sees it: a child and two pipes.

To import MLflow takes seconds of CPU. A command that is about to run a sweep starts the process at once
(:func:`start_early`), so that this happens while the sweep is composed; what to do it is told later.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import subprocess
import sys
from collections.abc import Sequence

_MODULE = "repro_sweep.tracking.process"
_LINE_LIMIT = 1_000_000

_early: subprocess.Popen[bytes] | None = None


def start_early() -> None:
    """Start what the next :meth:`Child.start` of this process takes; it ends with this process if there is none."""
    global _early
    if _early is None:
        _early = _popen(())
        atexit.register(_end_early)


def _end_early() -> None:
    if _early is not None:
        _early.kill()
        _early.wait()


def _take_early() -> subprocess.Popen[bytes] | None:
    global _early
    taken, _early = _early, None
    if taken is None or taken.poll() is None:
        return taken
    with taken:  # closes its pipes
        return None


def _popen(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", _MODULE, *arguments],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


class Child:
    """A running process of :mod:`.process`. One event loop's.

    Attributes:
        lines: what it says; ends when it has.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], lines: asyncio.StreamReader, pipe: asyncio.WriteTransport
    ) -> None:
        self.lines = lines
        self._process = process
        self._pipe = pipe

    @classmethod
    async def start(cls, arguments: Sequence[str]) -> Child:
        """Start it with these arguments."""
        early = _take_early()
        process = early or _popen(arguments)
        loop = asyncio.get_running_loop()
        lines = asyncio.StreamReader(limit=_LINE_LIMIT)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), process.stdout)
        pipe, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, process.stdin)
        child = cls(process, lines, pipe)
        if early is not None:
            child.send(list(arguments))
        return child

    def send(self, message: object) -> None:
        """Write a line of JSON to it; it is lost if the process is no more."""
        if not self._pipe.is_closing():
            self._pipe.write(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """Close its input."""
        self._pipe.close()

    def kill(self) -> None:
        """End it by force."""
        self._process.kill()

    async def wait(self) -> int:
        """Its exit status."""
        return await asyncio.to_thread(self._process.wait)
