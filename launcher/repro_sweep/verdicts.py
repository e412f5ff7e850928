"""Which running trials are not worth going on with: asks the pruner's process, and makes no trial wait for it long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from repro_sweep import protocol
from repro_sweep.asking import AskingProcess
from repro_sweep.errors import SweepError
from repro_sweep.records import NewReport
from repro_sweep.sweep import SweepSpec

_PATIENCE_S = 1.5
_OVERDUE_S = 0.2


class Verdicts:
    """Owned by the coordinator's event loop.

    Args:
        spec: the sweep's record.
        asker: the process that has the pruner; None where nothing is pruned.
        warn: tells the user something.
    """

    def __init__(self, spec: SweepSpec, asker: AskingProcess | None, warn: Callable[[str], None]) -> None:
        self._pruner = spec.pruner.name if spec.pruner is not None else ""
        self._metric = spec.all_objectives[0].metric
        self._asker = asker if spec.pruner is not None else None
        self._warn = warn
        self._doomed: set[str] = set()
        self._due: set[asyncio.Task[None]] = set()
        self._reported = False
        self._failed = False

    async def on(
        self, reports: Sequence[protocol.Report], trial_of: Callable[[str], int | None]
    ) -> tuple[str, ...]:
        """The attempts that are to be pruned; ``trial_of`` gives the trial of one that runs.

        Training goes on where that cannot be told in time. A verdict that comes too late is for the attempt's next
        report, and nobody waits for long while one is due.
        """
        asked: list[asyncio.Task[None]] = []
        for report in reports:
            trial = trial_of(report.attempt)
            if self._asker is not None and trial is not None and self._metric in report.metrics:
                self._reported = True
                value = report.metrics[self._metric]
                asked.append(asyncio.create_task(self._judge(report.attempt, trial, report.step, value)))
        if asked:
            overdue = bool(self._due)
            self._due.update(asked)
            await asyncio.wait(asked, timeout=_OVERDUE_S if overdue else _PATIENCE_S)
        return tuple({report.attempt for report in reports} & self._doomed)

    def ended(self, attempt: str, trial: int, reports: Sequence[NewReport], *, whole: bool) -> None:
        """An attempt has ended; its last reports come with its end, and others are compared with them.

        ``whole``: it ran to its end, from the trial's beginning. A pruner that has nothing to go by then is said,
        once, as a metric's name may be mistyped.
        """
        self._doomed.discard(attempt)
        if self._asker is None:
            return
        for report in reports:
            if self._metric in report.metrics:
                self._reported = True
                self._asker.note(trial, report.step, report.metrics[self._metric])
        if whole and not self._reported:
            self._reported = True
            self._warn(
                f"sweep/pruner={self._pruner}: trial {trial} has ended and never reported"
                f" '{self._metric}' (repro_sweep.report), without which nothing is pruned"
            )

    async def _judge(self, attempt: str, trial: int, step: int, value: float) -> None:
        """Hear whether an attempt is to be pruned."""
        assert self._asker is not None
        try:
            if await self._asker.report(trial, step, value):
                self._doomed.add(attempt)
        except SweepError as error:
            if not self._failed:
                self._failed = True
                self._warn(f"nothing is pruned any more: {error}")
        finally:
            task = asyncio.current_task()
            if task is not None:
                self._due.discard(task)
