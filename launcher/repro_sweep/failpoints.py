"""Named places where a process can be told to die, so that tests can show that dying there loses nothing.

``REPRO_SWEEP_FAILPOINT=NAME`` kills the process with SIGKILL when it first comes to that place, ``NAME:5`` when it does
so for the fifth time. Without the variable a place costs the look at one global.
"""

from __future__ import annotations

import os
import signal

ENVIRONMENT = "REPRO_SWEEP_FAILPOINT"

COORDINATOR = (
    "lease.before_take",
    "lease.taken",
    "lease.announced",
    "lease.before_renew",
    "record.before_commit",
    "record.committed",
    "spool.read",
    "spool.recorded",
    "workers.before_start",
    "workers.started",
    "journal.before_change",
    "journal.before_commit",
    "journal.committed",
    "register.received",
    "register.answering",
    "claim.received",
    "claim.answering",
    "report.received",
    "report.answering",
    "finish.received",
    "finish.answering",
    "heartbeat.received",
    "heartbeat.answering",
    "sweep.over",
    "lease.before_release",
)
"""The places of a coordinator: wherever it writes or answers."""

SEARCH = ("search.asked", "search.recorded")
"""The further places of one that runs a search: a suggestion was made; it is recorded, and not handed out."""

_name, _, _count = os.environ.get(ENVIRONMENT, "").partition(":")
_left = int(_count or 1)


def failpoint(name: str) -> None:
    """Die here, if this is the place."""
    global _left
    if name != _name:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
