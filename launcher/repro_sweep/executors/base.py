"""The port for executors: start and stop workers somewhere, and say how they are. Nothing else.

Workers pull their trials from the coordinator, so an executor never sees a trial. A new executor is one file in this
folder, or a module that an entry point of the group ``repro_sweep.executors`` refers to. It has two names: ``OPTIONS``,
a dataclass with the typed options of ``sweep/executor=<name>``, and ``EXECUTOR``, a class made from a
:class:`Context` and these options.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import ModuleType
from typing import Any

from repro_sweep import plugins
from repro_sweep.errors import SweepError
from repro_sweep.sweep import SweepSpec

ENTRY_POINT_GROUP = "repro_sweep.executors"
_PACKAGE = "repro_sweep.executors"


class WorkerState(StrEnum):
    """How a worker is, as its executor sees it. Unknown is alive: only what surely ended has ended.

    SUSPENDED: it stands still until its cluster lets it go on; another worker with a free slot gets its trials.
    MISSING: nothing knows of it any more; it has ended if it does not speak with its coordinator either.
    """

    ALIVE = "ALIVE"
    SUSPENDED = "SUSPENDED"
    MISSING = "MISSING"
    ENDED = "ENDED"


GONE = frozenset({WorkerState.ENDED, WorkerState.MISSING})
"""The states of workers that are not counted on any more."""


class Cause(StrEnum):
    """Why a worker ended.

    Of its own accord or by its own fault, killed, sent away by its cluster for others or as its time is over, lost with
    its machine, or by the user.
    """

    OWN = "OWN"
    KILLED = "KILLED"
    EVICTED = "EVICTED"
    LOST = "LOST"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """A worker's state; ``detail`` says in one line why it ended, ``cause`` whose doing that was."""

    state: WorkerState
    detail: str | None = None
    cause: Cause = Cause.OWN


ALIVE = WorkerStatus(state=WorkerState.ALIVE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What an executor gets: the sweep, and the Unix socket at which its coordinator listens on this machine."""

    spec: SweepSpec
    socket: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What would become of a sweep's workers, before any is started; one line each.

    ``problems`` would keep them from ever running, ``notes`` are worth knowing, ``script`` is what starts them.
    """

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    script: str = ""


class Executor(ABC):
    """Starts and stops workers.

    Owned by the coordinator; all methods are called from one thread, one at a time, and must not block for long.
    """

    def describe(self) -> str:
        """What it offers, in a few words, for ``repro-sweep plan``."""
        return type(self).__name__

    def outlook(self, trials: int) -> Outlook:
        """Ask whatever runs the workers whether it can, for so many trials; takes seconds at most, starts nothing."""
        del trials
        return Outlook()

    @abstractmethod
    def wanted(self, trials: int) -> int:
        """How many workers would be useful while ``trials`` trials are waiting or running."""

    @abstractmethod
    def start(self, count: int) -> list[str]:
        """Start workers; returns their new ids.

        Raises:
            SweepError: they cannot be started at all (not: they end soon, which :meth:`poll` says).
        """

    @abstractmethod
    def poll(self) -> Mapping[str, WorkerStatus]:
        """The status of every worker started so far, in one look.

        Those that an earlier coordinator of the sweep has started and that still live are among them.
        """

    @abstractmethod
    def stop(self, workers: Iterable[str]) -> None:
        """Ask workers to end: they kill their trials and leave. Returns at once."""

    @abstractmethod
    def close(self, timeout_s: float) -> None:
        """End whatever is still there, by force after ``timeout_s``; returns when nothing is left."""


def load(name: str) -> ModuleType:
    """The module of an executor.

    Raises:
        SweepError: there is none of that name.
    """
    module = plugins.load(_PACKAGE, ENTRY_POINT_GROUP, name)
    if module is None:
        raise SweepError(f"sweep/executor: '{name}' is not an executor ({', '.join(_names())})")
    return module


def create(spec: SweepSpec, socket: str = "") -> Executor:
    """The executor of a sweep; nothing is started yet.

    Raises:
        SweepError: its options cannot be met.
    """
    module = load(spec.executor_name)
    executor: Executor = module.EXECUTOR(Context(spec=spec, socket=socket), module.OPTIONS(**spec.executor))
    return executor


def is_remote(spec: SweepSpec) -> bool:
    """Whether the workers are on other machines: their module's ``REMOTE`` says it, or finds out from its options."""
    return _says(spec, "REMOTE")


def shares_machine(spec: SweepSpec) -> bool:
    """Whether trials may run on the coordinator's machine: they do, or their module says ``SHARES_MACHINE``."""
    return not is_remote(spec) or _says(spec, "SHARES_MACHINE")


def ships_source(spec: SweepSpec) -> bool:
    """Whether the workers' machines may not see this one's files: their module's ``SHIPS_SOURCE``, as ``REMOTE``."""
    return _says(spec, "SHIPS_SOURCE")


def is_spread(spec: SweepSpec) -> bool:
    """Whether other machines take part: the workers', or the login node from which its user looks after a job."""
    return is_remote(spec) or "SLURM_JOB_ID" in os.environ


def host(spec: SweepSpec) -> str | None:
    """Where the coordinator must listen for other machines (``server.Server``); None: there are none."""
    if not is_spread(spec):
        return None
    given = spec.executor.get("host")
    return "*" if given is None else str(given)


def spans_nodes(name: str) -> bool:
    """Whether the workers of an executor may have several nodes each."""
    return bool(getattr(load(name), "SPANS_NODES", False))


def coordinator_job(spec: SweepSpec) -> Mapping[str, Any] | None:
    """How the coordinator itself is submitted as a job (``submitting.Submission``'s parameters); None: it cannot be."""
    module = load(spec.executor_name)
    if not hasattr(module, "coordinator_job"):
        return None
    found: Mapping[str, Any] = module.coordinator_job(module.OPTIONS(**spec.executor))
    return found


def options() -> dict[str, type]:
    """The options dataclass of every executor, by name."""
    return {name: load(name).OPTIONS for name in _names()}


def _says(spec: SweepSpec, name: str) -> bool:
    """What an executor's module says of itself: a constant, or a function of its options; False where it is silent."""
    module = load(spec.executor_name)
    said = getattr(module, name, False)
    return bool(said(module.OPTIONS(**spec.executor)) if callable(said) else said)


def _names() -> tuple[str, ...]:
    return plugins.names(_PACKAGE, ENTRY_POINT_GROUP)
