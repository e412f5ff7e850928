"""What its worker says to a trial: answers to what it asks, verdicts on what it reports, and that it must leave.

Nothing here may make a trial wait for long: where no verdict comes, training goes on.
"""

from __future__ import annotations

import json
import mmap
import select
import socket
import struct
import time
from collections import deque
from typing import Any

PATIENCE_S = 2.0
"""How long a report waits for its verdict."""
_CHUNK = 1 << 16
_STATE = struct.Struct("=q???")


class Inbox:
    """Reads the trial's end of the channel to its worker.

    It is used by one thread at a time; of the processes that the trial forks, which share what is known of verdicts, by
    one at a time as well. The worker writes each line at once, so no process reads a part of one.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._buffer = b""
        self._answers: deque[dict[str, Any]] = deque()
        self._gone = False
        self._shared = mmap.mmap(-1, _STATE.size)
        self._note(answered=-1, overdue=False, stop=False, leave=False)

    @property
    def stop(self) -> bool:
        """Whether the trial was told to stop, as it is not worth going on with; it stays so."""
        return self._state()[2]

    @property
    def leave(self) -> bool:
        """Whether the trial was told that its worker must leave; it stays so."""
        return self._state()[3]

    def forked(self) -> None:
        """In a process that the trial has forked: what was read before is for the other one."""
        self._buffer = b""
        self._answers.clear()

    def answer(self) -> dict[str, Any] | None:
        """Wait for the answer to a question; None if the worker is gone."""
        while not self._answers and not self._gone:
            self._take(None)
        return self._answers.popleft() if self._answers else None

    def hear(self) -> None:
        """Take what has come meanwhile, such as a verdict that came too late for its report."""
        while self._take(0.0):
            pass

    def await_verdict(self, seq: int) -> None:
        """Wait until report ``seq`` is answered or :data:`PATIENCE_S` have passed.

        Who has not been answered in that time is not waited for again before something is heard of them: a coordinator
        that hangs costs a trial these seconds once, not with each report.
        """
        deadline = time.monotonic() + PATIENCE_S
        while not self._gone:
            answered, overdue, stop, leave = self._state()
            if answered >= seq or overdue or stop or leave:
                return
            left = deadline - time.monotonic()
            if left <= 0:
                self._note(answered=answered, overdue=True, stop=stop, leave=leave)
                return
            self._take(left)

    def _take(self, timeout_s: float | None) -> bool:
        """Read what there is, once; returns whether there was anything."""
        if self._gone or not self._poll.poll(None if timeout_s is None else 1000 * timeout_s):
            return False
        try:
            data = self._channel.recv(_CHUNK, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data = b""
        if not data:
            self._gone = True
            return False
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "verdict" in message:
                seq, prune = message["verdict"]
                answered, _, stop, leave = self._state()
                self._note(answered=max(seq, answered), overdue=False, stop=stop or prune, leave=leave)
            elif "leave" in message:
                answered, overdue, stop, _ = self._state()
                self._note(answered=answered, overdue=overdue, stop=stop, leave=True)
            else:
                self._answers.append(message)
        return True

    def _state(self) -> tuple[int, bool, bool, bool]:
        """The last report that was answered, whether a later one has waited in vain, whether to stop, or to leave."""
        answered, overdue, stop, leave = _STATE.unpack_from(self._shared)
        return answered, overdue, stop, leave

    def _note(self, *, answered: int, overdue: bool, stop: bool, leave: bool) -> None:
        _STATE.pack_into(self._shared, 0, answered, overdue, stop, leave)
