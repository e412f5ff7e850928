"""Stops a sweep or cancels trials of it, with its coordinator if it has one, else as its coordinator for a moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from repro_sweep import protocol
from repro_sweep.cli import contact
from repro_sweep.coordinator import Coordinator
from repro_sweep.executors import base as executors
from repro_sweep.executors.base import WorkerState
from repro_sweep.lease import Holder, Lease
from repro_sweep.ledger import Ledger
from repro_sweep.records import Attempt, now
from repro_sweep.server import Server
from repro_sweep.states import FailureKind, TrialState

_END_S = 120.0
_KILL_S = 15.0
_LOOK_S = 0.1


def with_coordinator(directory: Path, holder: Holder, trials: tuple[int, ...] | None) -> bool:
    """Let the coordinator do it; returns whether that has been done completely, within some time.

    For trials that is when those that ran have ended, for the whole sweep when the coordinator has ended.

    Raises:
        SweepError: it cannot be reached, or does not answer.
    """
    if not contact.ask_cancel(directory, holder, trials):
        raise contact.no_answer(directory, holder)
    if trials is None:
        ledger = Ledger.open(directory, readonly=True)
        try:
            return _until(lambda: not contact.is_still(ledger, holder), _END_S)
        finally:
            ledger.close()
    return _until(lambda: not _running(directory, trials), _KILL_S)


def without_coordinator(directory: Path, trials: tuple[int, ...] | None) -> None:
    """Do it as the sweep's coordinator for a moment: starts no worker and no trial.

    Raises:
        SweepError: another process has become its coordinator.
        LedgerError: the ledger cannot be written.
    """
    ledger = Ledger.open(directory)
    try:
        lease = Lease.acquire(ledger, ledger.spec.name)
    except BaseException:
        ledger.close()
        raise
    coordinator = Coordinator(ledger.spec, ledger, None, lease)
    coordinator.drain()
    asyncio.run(_serve(coordinator, lease, directory, trials))


async def _serve(
    coordinator: Coordinator, lease: Lease, directory: Path, trials: tuple[int, ...] | None
) -> None:
    server = Server(coordinator, executors.host(coordinator.spec))
    try:
        await server.start()
        lease.announce(server.path, server.tcp, server.token)
        if trials is None:
            coordinator.stop()
            await coordinator.run(executors.create(coordinator.spec, server.path))
        else:
            await _cancel(coordinator, directory, trials)
    finally:
        await server.stop()
        await coordinator.close()


async def _cancel(coordinator: Coordinator, directory: Path, trials: tuple[int, ...]) -> None:
    """Cancel trials and leave all others alone: workers come, are told what to stop, and go on without us."""
    await coordinator.recover()
    await coordinator.cancel(protocol.Cancel(trials=trials))
    workers = executors.create(coordinator.spec)
    deadline = time.monotonic() + _KILL_S
    while left := _running(directory, trials):
        status = workers.poll()
        for attempt in left:
            found = status.get(attempt.worker)
            if time.monotonic() > deadline or found is None or found.state is WorkerState.ENDED:
                await coordinator.finish(_stopped(attempt))
        await asyncio.sleep(_LOOK_S)


def _stopped(attempt: Attempt) -> protocol.Finish:
    """What a worker that is gone would have said. If it is not, it will be told to stop the attempt."""
    return protocol.Finish(
        worker=attempt.worker, attempt=attempt.id, state=TrialState.FAIL, kind=FailureKind.CANCELLED,
        message="stopped", ended_at=now(),
    )  # fmt: skip


def _running(directory: Path, trials: Sequence[int]) -> list[Attempt]:
    ledger = Ledger.open(directory, readonly=True)
    try:
        return [attempt for attempt in ledger.open_attempts() if attempt.trial in trials]
    finally:
        ledger.close()


def _until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True
