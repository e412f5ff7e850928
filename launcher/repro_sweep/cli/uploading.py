"""Waits until a sweep's tracker has brought MLflow up to date; sees beforehand that MLflow will let it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from pathlib import Path

from repro_sweep.cli.backlog import lacking
from repro_sweep.cli.main import say
from repro_sweep.ledger import Ledger
from repro_sweep.sweep import Tracking
from repro_sweep.tracking import access
from repro_sweep.tracking.base import Trouble
from repro_sweep.tracking.process import TrackerProcess

PATIENCE_S = 60.0
"""So long without getting any further is waited for a server that is away, or that says nothing."""
BUSY_S = 900.0
"""The same for one that is there and answers slowly: others use it too."""
DENIED_S = 5.0
"""The same for one that refuses the credentials: renewed ones are noticed at once."""
_LOOK_S = 0.5


def check_access(tracking: Tracking, *, remedy: str | None = None) -> None:
    """See that MLflow will let this user write what a sweep has to say; a server that is away is no obstacle.

    Raises:
        TrackingError: it will not; the message says what to do.
    """
    note = access.check(tracking.uri, tracking.experiment, remedy=remedy or access.ELSEWHERE)
    if note is not None:
        say(note)


async def upload(tracker: TrackerProcess, look: Callable[[], None] = lambda: None) -> int:
    """Let a tracker finish; returns how many trials MLflow lacks when it has ended.

    It is given up when it has got no further for some time, which depends on what the server says. ``look`` is called
    now and then. Cancelled, it leaves the tracker as it is.
    """
    uploading = asyncio.create_task(tracker.finish(math.inf))
    left, moved, since = tracker.progress.left, tracker.progress.moved, time.monotonic()
    try:
        while not (await asyncio.wait([uploading], timeout=_LOOK_S))[0]:
            look()
            progress = tracker.progress
            # not when a file is sent again from its beginning
            if progress.left != left or progress.moved > moved:
                left, moved, since = progress.left, max(moved, progress.moved), time.monotonic()
            elif time.monotonic() - since > _patience_s(progress.trouble):
                return left
        return uploading.result()
    finally:
        uploading.cancel()


def _patience_s(trouble: Trouble | None) -> float:
    if trouble is Trouble.BUSY:
        return max(BUSY_S, PATIENCE_S)
    return min(DENIED_S, PATIENCE_S) if trouble is Trouble.DENIED else PATIENCE_S


def unsent(directory: Path, left: int) -> int:
    """How many runs MLflow lacks after a tracker has ended, whatever it said last: it may have died before it spoke."""
    ledger = Ledger.open(directory, readonly=True)
    try:
        found = lacking(ledger, whole=True)
    finally:
        ledger.close()
    return max(left, 1 if found is None else found)
