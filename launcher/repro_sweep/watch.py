"""The coordinator's look at itself: its lease, its disk, and whether it was stopped for a while."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from repro_sweep.errors import LeaseLostError
from repro_sweep.lease import RENEW_S, Lease
from repro_sweep.ledger import Ledger

_LOOK_S = 1.0
_PAUSE_S = 5.0


class Watch:
    """Runs beside a coordinator.

    Args:
        directory: the sweep's.
        min_free_mb: nothing is handed out while less is free on its disk.
        lease: to be renewed; None in tests.
        write: commits a change of the ledger.
        on_change: called when ``no_space`` changes.
        on_pause: called when this process was stopped for a while, so that others only seem to have been silent.
    """

    def __init__(
        self,
        directory: Path,
        min_free_mb: float,
        lease: Lease | None,
        *,
        write: Callable[[Callable[[Ledger], None]], Awaitable[None]],
        on_change: Callable[[], None],
        on_pause: Callable[[], None],
    ) -> None:
        self._directory = directory
        self._min_free_mb = min_free_mb
        self._lease = lease
        self._write = write
        self._on_change = on_change
        self._on_pause = on_pause
        self.no_space: str | None = None
        """Why nothing may be handed out for want of space, None where there is enough."""

    async def run(self) -> None:
        """Look once a second, until cancelled or the lease is lost.

        Raises:
            LedgerError: the lease cannot be renewed, because the ledger cannot be written.
        """
        due, seen = 0.0, time.monotonic()
        while True:
            now = time.monotonic()
            if now - seen > _PAUSE_S:
                self._on_pause()
            seen = now
            self._look_at_disk()
            if self._lease is not None and now >= due:
                due = now + RENEW_S
                try:
                    await self._write(self._lease.renew)
                except LeaseLostError:
                    return
            await asyncio.sleep(min(_LOOK_S, RENEW_S))

    def _look_at_disk(self) -> None:
        try:
            free_mb = shutil.disk_usage(self._directory).free / 1e6
        except OSError:  # the ledger will say so better
            return
        before, self.no_space = self.no_space, None
        if free_mb < self._min_free_mb:
            limit = f"less than {self._min_free_mb:g} (sweep.min_free_mb)"
            self.no_space = f"{free_mb:.0f} MB are free in {self._directory}, {limit}"
        if (before is None) != (self.no_space is None):
            self._on_change()
