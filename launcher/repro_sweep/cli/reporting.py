"""Has a sweep's report drawn by processes of their own: it takes Optuna, plotly and a second or two of CPU.

While the sweep runs, these take at most a small share of one CPU, at the lowest priority.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from repro_sweep.errors import LedgerError
from repro_sweep.ledger import Ledger
from repro_sweep.states import TrialState

PATIENCE_S = 120.0
FIRST_S = 20.0
"""A running sweep's first report is drawn so long after its start, if there is something to show by then."""
EVERY_S = 60.0
SHARE = 0.02
"""The part of one CPU that reports of a running sweep may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What became of a report: ``problem`` is one line, None where it was written; ``cost_s`` is what it took."""

    problem: str | None
    cost_s: float


async def write_report(directory: Path, patience_s: float = PATIENCE_S) -> Drawn:
    """Write the report of the sweep in a directory."""
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "repro_sweep.reporting",
        str(directory),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(patience_s):
            said, errors = await process.communicate()
    except (TimeoutError, asyncio.CancelledError) as error:
        process.kill()
        await process.wait()
        if isinstance(error, asyncio.CancelledError):
            raise
        return Drawn(problem=f"it took longer than {patience_s:.0f} s", cost_s=time.monotonic() - began)
    cost_s = time.monotonic() - began
    if process.returncode == 0:
        with contextlib.suppress(ValueError):
            cost_s = float(said)  # of CPU: it may have waited for one most of the time
        return Drawn(problem=None, cost_s=cost_s)
    lines = errors.decode(errors="replace").strip().splitlines()
    problem = lines[-1] if lines else f"its process ended with status {process.returncode}"
    return Drawn(problem=problem, cost_s=cost_s)


def pause_s(cost_s: float) -> float:
    """How long to wait after a report that took so much, seconds."""
    return max(EVERY_S, cost_s / SHARE)


@contextlib.asynccontextmanager
async def refreshing(ledger: Ledger) -> AsyncIterator[None]:
    """Within this context, a report is drawn again and again from what is new in a running sweep's ledger."""
    task = asyncio.create_task(_refresh(ledger)) if ledger.spec.report else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _refresh(ledger: Ledger) -> None:
    """What goes wrong is said by the last report, if it still does then."""
    news = _News(ledger)
    wait_s = FIRST_S
    while True:
        await asyncio.sleep(wait_s)
        wait_s = EVERY_S
        try:
            due = news.look()
        except LedgerError:  # the coordinator says so itself
            return
        if due:
            wait_s = pause_s((await write_report(ledger.path.parent, 5 * PATIENCE_S)).cost_s)


class _News:
    """Tells whether a ledger has something new that a report would show."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._change = -1
        self._seq = 0
        self._some = False

    def look(self) -> bool:
        changes = self._ledger.changes(after=self._change)
        heads = self._ledger.report_heads(after=self._seq)
        self._change = max((change for _, change, _, _ in changes), default=self._change)
        self._seq = max(heads.values(), default=self._seq)
        self._some |= any(state is TrialState.COMPLETE for _, _, state, _ in changes)
        return self._some and bool(changes or heads)
