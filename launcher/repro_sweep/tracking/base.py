"""What a tracker is: a background projection of a sweep's ledger into a tracking server.

A tracker only reads the ledger and never stands on a trial's path: it may be hours behind, and killing it at any
instant loses nothing, because whatever it has not recorded as sent it sends again, without duplicates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from repro_sweep.records import Reused


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRef:
    """Where the run of one trial is: the tracking URI, and the ids of the run and its experiment."""

    uri: str
    run_id: str
    experiment_id: str


class Trouble(StrEnum):
    """Why a tracker gets no further."""

    AWAY = "AWAY"
    """The server cannot be reached, or is broken."""
    BUSY = "BUSY"
    """The server is there, and has too much to do to answer in time."""
    DENIED = "DENIED"
    """The server refuses the credentials, or their user lacks a permission."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a tracker is.

    ``left`` counts the trials (and the sweep itself) that have something not uploaded yet. ``error`` is one line
    that says why nothing, or something, cannot be uploaded now; ``trouble`` is set where nothing can. ``done`` is true
    when a finishing tracker has uploaded all that the server takes, or another coordinator's tracker is to go on.
    ``moved`` counts the bytes of
    files and the points that went to the server: while it reaches new heights, a long upload is getting somewhere.
    """

    left: int
    error: str | None = None
    done: bool = False
    moved: int = 0
    trouble: Trouble | None = None


Answer = Callable[[RunRef | str], None]
"""Called once with the run, or with one line that says why there is none."""

AnswerElsewhere = Callable[[Mapping[str, Reused] | str], None]
"""Called once with results by the identity of their trial, or with one line that says why they are not known."""


class Tracker(ABC):
    """A projection of one sweep's ledger. All methods are called by one thread; none of them waits for the server."""

    @abstractmethod
    def sync(self) -> float:
        """Take notice of what is new in the ledger and start uploading it.

        Returns:
            After how many seconds there may be something to do again, if nothing wakes the caller before.
        """

    @abstractmethod
    def request_run(self, trial: int, answer: Answer) -> None:
        """Create or find the run of a trial now, ahead of all others, and pass it to ``answer``."""

    @abstractmethod
    def request_elsewhere(self, answer: AnswerElsewhere) -> None:
        """Look for the results that other sweeps have of the trials that wait, and pass them to ``answer``."""

    @abstractmethod
    def finish(self) -> None:
        """From now on, give trials that never started a run as well, and close the sweep's run."""

    @property
    @abstractmethod
    def progress(self) -> Progress:
        """How far the tracker is."""

    @abstractmethod
    def close(self) -> None:
        """Wait for the uploads under way, record them, and start no others."""
