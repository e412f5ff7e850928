"""The coordinator's side of a search: when to ask for the next trials, what to record of them, when it is over.

The order of asks and tells is what a search is rebuilt from. An ask that was not recorded has not happened: it is made
again, by a process that knows what the ledger knows, and so leads to the same suggestion.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from repro_sweep.asking import Asked, AskingProcess
from repro_sweep.budget import Count
from repro_sweep.failpoints import failpoint
from repro_sweep.ledger import Ledger
from repro_sweep.search import base as searchers
from repro_sweep.states import StepKind, TrialState
from repro_sweep.sweep import SweepSpec

_T = TypeVar("_T")
_LOOK_S = 0.5
_SAVE_HOURS_S = 60.0

log = logging.getLogger(__name__)


class Desk(Protocol):
    """What a search sees of its coordinator."""

    def free_slots(self) -> int:
        """How many slots have nothing to run, less the trials that wait; negative where more wait."""

    def slot_count(self) -> int:
        """How many slots there are."""

    def may_ask(self) -> bool:
        """Whether anything may be handed out at all."""

    def is_idle(self) -> bool:
        """Whether nothing runs or waits."""

    def has_begun_all(self) -> bool:
        """Whether no trial waits that has never begun."""

    def add_trials(self, numbers: Sequence[int]) -> None:
        """New trials wait."""

    def withdraw(self) -> list[int]:
        """Take back the trials that wait and have never begun; returns their numbers."""


class Write(Protocol):
    """Commits a change of the ledger (``Journal.write``)."""

    def __call__(self, change: Callable[[Ledger], _T]) -> Awaitable[_T]:
        """Returns what the change returns, when it is durable."""


class Searching:
    """One search. Owned by the coordinator's event loop.

    Args:
        spec: the sweep's record.
        ledger: is read once, here.
        asker: the process that has the sampler.
        desk: the coordinator.
        write: commits a change of the ledger.
    """

    def __init__(
        self,
        spec: SweepSpec,
        ledger: Ledger,
        asker: AskingProcess,
        desk: Desk,
        write: Write,
    ) -> None:
        assert spec.search is not None
        self._asker = asker
        self._desk = desk
        self._write = write
        self._count = Count(spec)
        self._quick_until = searchers.asks_quickly_until(spec.search.sampler.name)
        self._next = ledger.next_number()
        self._hours_before = ledger.search_hours
        self._began = self._saved_at = time.monotonic()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._one_by_one = spec.search.repeats_pruner is not None
        self._exhausted: str | None = None
        self.over = ledger.search_over
        """Why it has ended; None while it goes on."""
        for number, (state, metrics) in ledger.ended_before_search().items():
            self._count.told(number, state, metrics)
        for step in ledger.steps():
            if step.kind is StepKind.TELL:
                self._count.told(step.data["trial"], TrialState(step.data["state"]), step.data["metrics"])
            elif step.kind is not StepKind.BEGIN:
                self._note_asked(step.data)

    @property
    def left(self) -> int | None:
        """How many trials it may still ask for; None where that is not limited."""
        return self._count.left()

    def told(self, seq: int, number: int, state: TrialState, metrics: Mapping[str, float]) -> None:
        """A trial has ended, which step ``seq`` records."""
        self._count.told(number, state, metrics)
        self._asker.tell(seq, number, state, metrics)

    def wake(self) -> None:
        """Something has changed."""
        self._wake.set()

    async def settle(self) -> None:
        """Wait for what was asked for. With one slot, a trial's end comes after it in the record, always."""
        if self._desk.slot_count() <= 1:
            await self._idle.wait()

    async def run(self) -> None:
        """Ask whenever a slot is free, or nearly, until the search is over.

        Raises:
            SweepError: the search cannot go on.
            LedgerError: it cannot be recorded.
        """
        while self.over is None:
            self._wake.clear()
            if (why := self._count.reached(self._hours())) is not None:
                await self._end(why, withdrawn=self._desk.withdraw())
            elif (why := self._exhausted or self._count.full()) is None:
                await self._fill()
            elif self._one_by_one:
                await self._finish_points(why)
            elif self._desk.has_begun_all():
                await self._end(why)
            else:
                await self._sleep()

    async def _fill(self) -> None:
        """Ask for new points, or wait until one is wanted."""
        if not self._desk.may_ask() or self._wanted() <= 0:
            await self._sleep()
            return
        asked = await self._ask(new=True)
        self._exhausted = asked.over

    async def _finish_points(self, why: str) -> None:
        """Ask for the repeats that points which have begun still lack, until there are none."""
        asked = await self._ask(new=False) if self._desk.may_ask() and self._wanted() > 0 else None
        if asked is not None and asked.over is not None and self._desk.is_idle():
            await self._end(why)
        elif asked is None or asked.over is not None:
            await self._sleep()

    async def _ask(self, *, new: bool) -> Asked:
        self._idle.clear()
        try:
            asked = await self._asker.ask(self._next, new=new)
            failpoint("search.asked")
            await self._write(lambda ledger: self._record(ledger, asked))
        finally:
            self._idle.set()
        failpoint("search.recorded")
        for _, data in asked.steps:
            self._note_asked(data)
        self._next += len(asked.trials)
        self._desk.add_trials([*asked.again, *(trial.number for trial in asked.trials)])
        return asked

    def _record(self, ledger: Ledger, asked: Asked) -> None:
        ledger.add_trials(asked.trials)
        for kind, data in asked.steps:
            ledger.add_step(kind, data)
        if asked.again:
            ledger.requeue(asked.again)
            ledger.set_withdrawn(sorted(ledger.withdrawn - set(asked.again)))
        ledger.set_search_hours(self._hours())

    def _note_asked(self, data: Mapping[str, object]) -> None:
        if not data.get("refused"):
            self._count.asked(data["suggestion"], data["trials"], data.get("repeats", 1))  # type: ignore[arg-type]

    def _wanted(self) -> int:
        """How many trials to ask for: one for each free slot, and some ahead where asking takes long.

        With one slot, and a sampler that is quick still, none: it then knows each result before it suggests the next.
        """
        slots = self._desk.slot_count()
        quick = self._quick_until is None or self._count.finished < self._quick_until
        ahead = 0 if quick and slots <= 1 else max(1, slots // 4)
        return self._desk.free_slots() + ahead

    def _hours(self) -> float:
        return self._hours_before + (time.monotonic() - self._began) / 3600

    async def _end(self, why: str, withdrawn: Sequence[int] = ()) -> None:
        def change(ledger: Ledger) -> None:
            ledger.set_search_over(why)
            ledger.set_withdrawn([*ledger.withdrawn, *withdrawn])

        await self._write(change)
        log.info("the search is over: %s", why)
        self.over = why

    async def _sleep(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), _LOOK_S)
        if time.monotonic() > self._saved_at + _SAVE_HOURS_S:
            await self.save_hours()

    async def save_hours(self) -> None:
        """Record for how long the search has run, which counts when it goes on."""
        self._saved_at = time.monotonic()
        hours = self._hours()
        await self._write(lambda ledger: ledger.set_search_hours(hours))
