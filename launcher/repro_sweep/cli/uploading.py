"""Waits until a sweep's tracker has brought MLflow up to date."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from repro_sweep.tracking.process import TrackerProcess

PATIENCE_S = 60.0
_LOOK_S = 0.5


async def upload(tracker: TrackerProcess, look: Callable[[], None] = lambda: None) -> int:
    """Let a tracker finish; returns how many trials MLflow lacks when it has ended.

    It is given up when it has got no further for :data:`PATIENCE_S`. ``look`` is called now and then. Cancelled, it
    leaves the tracker as it is.
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
            elif time.monotonic() - since > PATIENCE_S:
                return left
        return uploading.result()
    finally:
        uploading.cancel()
