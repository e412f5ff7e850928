"""The reports of a worker's trials on their way to the coordinator, and the trials that wait for its verdict."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from repro_sweep import protocol

_MOST_REPORTS = 5000

Answer: TypeAlias = Callable[[int, bool], None]
"""Tells a trial about its reports up to this ``seq``, and whether it is to stop; it must not block."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """A report; ``answer`` is set where its trial waits to hear whether to go on."""

    report: protocol.Report
    answer: Answer | None


class Outbox:
    """Holds each report until the coordinator has it. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[Entry] = []
        self._waiting: dict[str, Entry] = {}
        self._urgent = threading.Event()

    def add(self, report: protocol.Report, answer: Answer | None = None) -> None:
        """Queue a report, to be sent at once if its trial waits."""
        entry = Entry(report=report, answer=answer)
        with self._lock:
            self._entries.append(entry)
            if answer is not None:
                self._waiting[report.attempt] = entry
        if answer is not None:
            self._urgent.set()

    def gather(self, longest_s: float) -> Sequence[Entry]:
        """What is to be sent, after ``longest_s`` seconds or as soon as a trial waits; it stays here until then."""
        self._urgent.wait(longest_s)
        self._urgent.clear()
        with self._lock:
            return self._entries[:_MOST_REPORTS]

    def sent(self, entries: Sequence[Entry], prune: Collection[str]) -> None:
        """The coordinator has these; the attempts in ``prune`` are to stop."""
        gone = set(map(id, entries))
        answered = {entry.report.attempt: entry for entry in entries if entry.answer is not None}
        with self._lock:
            self._entries = [entry for entry in self._entries if id(entry) not in gone]
            for attempt, entry in answered.items():
                waiting = self._waiting.get(attempt)
                if waiting is not None and waiting.report.seq <= entry.report.seq:
                    del self._waiting[attempt]
        for attempt, entry in answered.items():
            _tell(entry, prune=attempt in prune)

    def excuse(self) -> None:
        """There is no coordinator: let all trials go on. What one decides of them later, they are told later."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for entry in waiting.values():
            _tell(entry, prune=False)

    def take(self, attempt: str) -> tuple[protocol.Report, ...]:
        """Take out the reports of an attempt that has ended; its result takes them along."""
        with self._lock:
            mine = tuple(self._of(attempt))
            self._entries = [entry for entry in self._entries if entry.report.attempt != attempt]
            self._waiting.pop(attempt, None)
        return mine

    def _of(self, attempt: str) -> Iterator[protocol.Report]:
        return (entry.report for entry in self._entries if entry.report.attempt == attempt)


def _tell(entry: Entry, *, prune: bool) -> None:
    if entry.answer is not None:
        entry.answer(entry.report.seq, prune)
