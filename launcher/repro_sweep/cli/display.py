"""The live display of a running sweep: one line that changes on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from repro_sweep.progress import Progress
from repro_sweep.states import TrialState

_REFRESH_S = 0.5
_LINE_EVERY_S = 10.0


class Display:
    """Shows a sweep's progress while its ``async with`` block runs."""

    def __init__(self, progress: Callable[[], Progress]) -> None:
        self._progress = progress
        self._console = Console(stderr=True)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        follow = self._follow_live if self._console.is_terminal else self._follow_lines
        self._task = asyncio.create_task(follow())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):  # OSError: the terminal is gone
            await self._task

    async def _follow_live(self) -> None:
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(table(self._progress()), refresh=True)
                await asyncio.sleep(_REFRESH_S)

    async def _follow_lines(self) -> None:
        shown: object = None
        refusal: str | None = None
        due = 0.0
        while True:
            progress = self._progress()
            now = time.monotonic()
            tracking = None if _unfinished(progress) else progress.not_tracked
            state = (dict(progress.counts), tracking, progress.paused, progress.denied)
            if progress.denied != refusal:  # at once: the command may not run much longer
                due, refusal = now, progress.denied
            if now >= due and state != shown:
                for text in filter(None, (line(progress), denied(progress))):
                    print(f"repro-sweep: {text}", file=sys.stderr, flush=True)
                shown, due = state, now + _LINE_EVERY_S
            await asyncio.sleep(_REFRESH_S)


def line(progress: Progress) -> str:
    """The state of a sweep in one line."""
    counts = progress.counts
    done = counts[TrialState.COMPLETE] + counts[TrialState.PRUNED]
    parts = [
        f"{progress.name}: {_done_of(done, progress)} done",
        f"{counts[TrialState.RUNNING]} running",
        f"{counts[TrialState.FAIL] - progress.cancelled} failed",
        f"{counts[TrialState.WAITING]} waiting",
    ]
    if progress.retried:
        parts.append(f"{progress.retried} retried")
    if progress.best is not None:
        parts.append(f"best {progress.best.value:.5g} (trial {progress.best.trial})")
    if progress.slots:
        parts.append(f"{progress.slots} slots {progress.busy:.0%} busy")
    if _unfinished(progress):
        if progress.seconds_left is not None:
            parts.append(f"{duration(progress.seconds_left)} left")
    elif progress.not_tracked:
        parts.append(f"{runs(progress.not_tracked)} on the way to MLflow")
    if progress.draining and counts[TrialState.RUNNING]:
        parts.append("nothing new starts")
    if progress.paused is not None:
        parts.append(f"paused: {progress.paused}")
    return ", ".join(parts)


def denied(progress: Progress) -> str | None:
    """What else there is to say while MLflow lets nothing in."""
    return None if progress.denied is None else waiting(progress.denied, progress.not_tracked)


def waiting(denial: str, left: int) -> str:
    """That so many runs wait, and why."""
    return f"{denial}: {runs(left)} wait, and their results are safe"


def _done_of(done: int, progress: Progress) -> str:
    """Of how many, where that is known: a search without a number of trials in its budget has no end to show."""
    if progress.searching and progress.planned is None:
        return str(done)
    return f"{done}/{progress.planned or sum(progress.counts.values())}"


def table(progress: Progress) -> Table:
    """The same with a bar, for a terminal."""
    counts = progress.counts
    known = sum(counts.values())
    total = progress.planned or known
    finished = known - counts[TrialState.WAITING] - counts[TrialState.RUNNING]
    grid = Table.grid(padding=(0, 1), expand=False)
    grid.add_column(width=24)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    grid.add_row(ProgressBar(total=max(total, 1), completed=finished, width=24), line(progress))
    trouble = denied(progress)
    if trouble is not None:
        grid.add_row("", trouble)
    return grid


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def runs(count: int) -> str:
    """So many runs of MLflow."""
    return "1 run" if count == 1 else f"{count} runs"


def _unfinished(progress: Progress) -> bool:
    return bool(
        progress.counts[TrialState.RUNNING]
        or ((progress.searching or progress.counts[TrialState.WAITING]) and not progress.draining)
    )
