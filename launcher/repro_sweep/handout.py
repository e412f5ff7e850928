"""Which waiting trial a free slot gets. Pure: it knows neither the ledger nor any worker's link.

A *group* is a set of slots that have something in common: the same GPU, or, without GPUs, the same worker. A trial that
needs to be alone gets a group of its own as soon as the trials that run there have ended.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from itertools import chain

Group = tuple[str, tuple[str, ...]]
"""A worker's id and the GPUs of its slot."""


class Handout:
    """The waiting trials, in their order, and the groups that are busy."""

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._waiting = deque(numbers)
        self._alone: deque[int] = deque()
        self._reserved: dict[Group, int] = {}
        self._started: set[int] = set()
        self._busy: Counter[Group] = Counter()

    def __len__(self) -> int:
        reserved = sum(number not in self._started for number in self._reserved.values())
        return len(self._waiting) + len(self._alone) + reserved

    @property
    def some_alone(self) -> bool:
        """Whether a trial waits, or runs, that needs to be alone."""
        return bool(self._alone or self._reserved)

    def add(self, number: int, *, first: bool = False, alone: bool = False) -> None:
        """A trial waits, ahead of all others if ``first``."""
        queue = self._alone if alone else self._waiting
        if first:
            queue.appendleft(number)
        else:
            queue.append(number)

    def discard(self, numbers: Iterable[int]) -> set[int]:
        """Trials wait no more; returns those that did."""
        unwanted = set(numbers)
        reserved = {number for number in self._reserved.values() if number not in self._started}
        found = unwanted.intersection(chain(self._waiting, self._alone, reserved))
        self._waiting = deque(number for number in self._waiting if number not in found)
        self._alone = deque(number for number in self._alone if number not in found)
        self._reserved = {group: number for group, number in self._reserved.items() if number not in found}
        return found

    def take(self, group: Group) -> int | None:
        """The trial for a free slot of a group, None where it must wait; the slot is busy from then on."""
        if group not in self._reserved and self._alone:
            self._reserved[group] = self._alone.popleft()
        number = self._reserved.get(group)
        if number is not None:
            if number in self._started or self._busy[group]:
                return None
            self._started.add(number)
        elif self._waiting:
            number = self._waiting.popleft()
        else:
            return None
        self._busy[group] += 1
        return number

    def is_alone(self, number: int) -> bool:
        """Whether a trial that was handed out has its group for itself."""
        return number in self._started

    def occupy(self, group: Group) -> None:
        """A slot of a group is busy with a trial that was handed out before."""
        self._busy[group] += 1

    def release(self, group: Group, number: int) -> None:
        """A slot of a group has ended its trial."""
        if self._busy[group] > 0:  # its worker may have been forgotten
            self._busy[group] -= 1
        if self._reserved.get(group) == number:
            del self._reserved[group]
            self._started.discard(number)

    def forget(self, worker: str) -> None:
        """A worker is gone: a trial that was waiting to be alone there waits for another one."""
        for group in [group for group in self._reserved if group[0] == worker]:
            number = self._reserved.pop(group)
            if number not in self._started:
                self._alone.appendleft(number)
            self._started.discard(number)
        for group in [group for group in self._busy if group[0] == worker]:
            del self._busy[group]
