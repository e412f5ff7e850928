"""The coordinator: the one process that owns a sweep.

It hands waiting trials to workers that claim them, takes their reports and results, and keeps as many workers alive as
there is work for. It runs from the ledger alone and must never import the user's code. It answers nobody before what
it says is committed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from repro_sweep import protocol
from repro_sweep.errors import SweepError
from repro_sweep.executors.base import Executor, WorkerState
from repro_sweep.journal import Journal
from repro_sweep.ledger import Attempt, Ledger, Outcome, now
from repro_sweep.progress import Best, Failure, Meter, Progress
from repro_sweep.states import Direction, FailureKind, TrialState
from repro_sweep.sweep import SweepSpec
from repro_sweep.tracking.process import TrackerProcess

_POLL_S = 0.25
_WORKER_SILENT_S = 60.0
_FRUITLESS_WORKERS = 3
_CLOSE_S = 15.0
_MOST_LOSSES = 3

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Worker:
    host: str
    slots: int
    seen: float
    attempts: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Running:
    trial: int
    worker: str
    assignment: protocol.Assignment
    started: float
    reports: int = 0


class Coordinator:
    """Owns one sweep's ledger, workers and tracker. All methods belong to one event loop."""

    def __init__(
        self,
        spec: SweepSpec,
        ledger: Ledger,
        tracker: TrackerProcess | None,
    ) -> None:
        self.spec = spec
        self._journal = Journal(ledger)
        self._tracker = tracker
        withdrawn = ledger.withdrawn
        self._states = {number: state for number, state in ledger.states() if number not in withdrawn}
        self._waiting = deque(number for number, state in self._states.items() if state is TrialState.WAITING)
        self._counts = dict.fromkeys(TrialState, 0) | Counter(self._states.values())
        self._running: dict[str, _Running] = {}
        self._workers: dict[str, _Worker] = {}
        self._starting = 0
        self._changed = asyncio.Event()
        self._draining = False
        self._stopping = False
        self._fatal: SweepError | None = None
        self._fruitless = 0
        self._meter = Meter()
        self._best: Best | None = None
        self._failures: list[Failure] = []
        self._losses: Counter[int] = Counter()
        for attempt in ledger.attempts():  # what earlier runs of the sweep have found
            self._note_best(attempt.trial, attempt.state, attempt.metrics)

    # --- the user's side -------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Hand out nothing more; running trials finish."""
        self._draining = True
        self._notify()

    def stop(self) -> None:
        """Stop the running trials too; they can be run again later."""
        self.drain()
        self._stopping = True

    def progress(self) -> Progress:
        """A picture of the sweep now."""
        return Progress(
            name=self.spec.name,
            counts={**self._counts, TrialState.RUNNING: len(self._running)},
            slots=sum(worker.slots for worker in self._workers.values()),
            busy=self._meter.busy(),
            seconds_left=self._meter.seconds_left(len(self._waiting) + len(self._running)),
            elapsed_s=self._meter.elapsed_s(),
            best=self._best,
            failures=tuple(self._failures),
            draining=self._draining,
            not_tracked=self._tracker.progress.left if self._tracker is not None else 0,
        )

    async def run(self, executor: Executor) -> None:
        """Run until no trial is waiting or running, or until drained or stopped.

        Raises:
            SweepError: the sweep cannot go on (no worker stays alive, the task does not return the metric).
            LedgerError: the ledger cannot be written.
        """
        try:
            while not self._over():
                self._keep_workers(executor)
                await self._look_after_workers(executor)
                if self._stopping:
                    executor.stop(executor.poll())
                    break
                await self._wait_for_change(_POLL_S)
            await self._wait_for_workers(executor)
        finally:
            await asyncio.to_thread(executor.close, _CLOSE_S)
            for attempt in list(self._running):
                await self._end_lost(attempt, "its worker ended")
        if self._fatal is not None:
            raise self._fatal

    async def close(self) -> None:
        """Commit and close the ledger."""
        await self._journal.close()

    # --- the workers' side (see protocol) --------------------------------------------------------------------

    async def register(self, message: protocol.Register) -> protocol.Registered:
        """A worker offers its slots."""
        if message.worker not in self._workers:
            self._workers[message.worker] = _Worker(message.host, message.slots, time.monotonic())
            self._measure()
        return protocol.Registered(spec=self.spec.model_dump_json())

    async def claim(self, message: protocol.Claim) -> protocol.Claimed:
        """A free slot asks for a trial."""
        if message.finished is None:
            return await self._next(message, message.wait_s)
        if self._waiting and message.finished.state is not TrialState.FAIL:  # both in one commit
            _, claimed = await asyncio.gather(self.finish(message.finished), self._next(message, 0.0))
            return claimed
        await self.finish(message.finished)
        return await self._next(message, 0.0)

    async def _next(self, message: protocol.Claim, wait_s: float) -> protocol.Claimed:
        known = self._running.get(message.attempt)
        if known is not None:
            return protocol.Claimed(assignment=known.assignment)
        deadline = time.monotonic() + wait_s
        while True:
            if self._over() or self._draining or message.worker not in self._workers:
                return protocol.Claimed(over=True)
            if self._waiting:
                break
            left = deadline - time.monotonic()
            if left <= 0:
                return protocol.Claimed()
            await self._wait_for_change(left)
        number = self._waiting.popleft()
        self._starting += 1  # it is neither waiting nor running until it is committed
        try:
            return protocol.Claimed(assignment=await self._start(number, message))
        except BaseException:
            self._waiting.appendleft(number)
            raise
        finally:
            self._starting -= 1

    async def report(self, message: protocol.Reports) -> protocol.Acknowledged:
        """Metrics that running trials reported."""
        await self._record(message.reports)
        return protocol.Acknowledged()

    async def finish(self, message: protocol.Finish) -> protocol.Acknowledged:
        """An attempt ended; a repeated message changes nothing."""
        running = self._running.get(message.attempt)
        if running is None:
            return protocol.Acknowledged()
        await self._record(message.reports)
        outcome = Outcome(
            state=message.state,
            kind=message.kind,
            message=message.message,
            metrics=message.metrics,
            ended_at=message.ended_at,
        )
        if message.kind is not FailureKind.NODE_LOST:
            self._fruitless = 0
        if message.metric_missing and self._fatal is None:
            self._fatal = SweepError(message.message or "the task does not return the metric")
            self.stop()
        await self._end(message.attempt, outcome)
        return protocol.Acknowledged()

    async def heartbeat(self, message: protocol.Heartbeat) -> protocol.Acknowledged:
        """The worker lives, or leaves."""
        worker = self._workers.get(message.worker)
        if worker is not None:
            worker.seen = time.monotonic()
            if message.leaving:
                await self._lose(message.worker, "its worker left")
        return protocol.Acknowledged()

    async def run_reference(self, message: protocol.RunRequest) -> protocol.RunReference:
        """The MLflow run of a running trial."""
        running = self._running.get(message.attempt)
        if running is None or self._tracker is None:
            return protocol.RunReference(error="this attempt is not running any more")
        try:
            run = await self._tracker.run_ref(running.trial)
        except Exception as error:  # noqa: BLE001  (the trial must hear of it, whatever it is)
            return protocol.RunReference(error=str(error))
        return protocol.RunReference(run_id=run.run_id, uri=run.uri, experiment_id=run.experiment_id)

    # --- inside ----------------------------------------------------------------------------------------------

    def _over(self) -> bool:
        return not self._running and not self._starting and (self._draining or not self._waiting)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait_for_change(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    def _measure(self) -> None:
        slots = sum(worker.slots for worker in self._workers.values())
        self._meter.set(slots=slots, running=len(self._running))

    def _set_state(self, number: int, state: TrialState) -> None:
        self._counts[self._states[number]] -= 1
        self._counts[state] += 1
        self._states[number] = state

    async def _start(self, number: int, claim: protocol.Claim) -> protocol.Assignment:
        worker = self._workers[claim.worker]
        started_at = now()

        def change(ledger: Ledger) -> protocol.Assignment:
            trial = ledger.trial(number)
            ordinal = len(ledger.attempts(number))
            attempt = Attempt(
                id=claim.attempt, trial=number, ordinal=ordinal, worker=claim.worker, slot=claim.slot,
                host=worker.host, state=TrialState.RUNNING, kind=None, message=None, metrics={},
                started_at=started_at, ended_at=None,
            )  # fmt: skip
            ledger.start_attempt(attempt)
            return protocol.Assignment(
                attempt=claim.attempt, trial=number, ordinal=ordinal, overrides=trial.overrides, config=trial.config,
                directory=str(self.spec.trial_directory(trial.directory)),
            )  # fmt: skip

        assignment = await self._journal.write(change)
        self._running[claim.attempt] = _Running(number, claim.worker, assignment, time.monotonic())
        worker.attempts.add(claim.attempt)
        self._set_state(number, TrialState.RUNNING)
        self._measure()
        if claim.worker not in self._workers:
            await self._end_lost(claim.attempt, "its worker ended")
        return assignment

    async def _record(self, reports: tuple[protocol.Report, ...]) -> None:
        """Record reports that are new; each attempt's come in order, and again after a lost reply."""
        fresh: dict[str, list[tuple[int, float, protocol.Metrics]]] = {}
        for report in reports:
            running = self._running.get(report.attempt)
            if running is not None and report.seq == running.reports:
                running.reports += 1
                fresh.setdefault(report.attempt, []).append((report.step, report.time, report.metrics))
        if fresh:
            trials = {attempt: self._running[attempt].trial for attempt in fresh}

            def change(ledger: Ledger) -> None:
                for attempt, rows in fresh.items():
                    ledger.add_reports(trials[attempt], attempt, rows)

            await self._journal.write(change)

    async def _end(self, attempt: str, outcome: Outcome) -> None:
        running = self._running.get(attempt)
        if running is None:
            return
        number = running.trial
        again = self._again(number, outcome.kind)
        await self._journal.write(lambda ledger: ledger.finish_attempt(attempt, number, outcome, again=again))
        if self._running.pop(attempt, None) is None:
            return  # the same message, twice at the same time
        worker = self._workers.get(running.worker)
        if worker is not None:
            worker.attempts.discard(attempt)
        self._set_state(number, TrialState.WAITING if again else outcome.state)
        self._meter.finished(time.monotonic() - running.started)
        self._measure()
        if again:
            self._waiting.appendleft(number)
        elif outcome.state is TrialState.FAIL:
            self._note_failure(running, outcome)
        else:
            self._note_best(number, outcome.state, outcome.metrics)
        self._notify()

    def _again(self, number: int, kind: FailureKind | None) -> bool:
        """Whether a failed attempt is none of its trial's fault; one whose worker is lost again and again may be."""
        if kind is FailureKind.NODE_LOST:
            self._losses[number] += 1
            return self._losses[number] < _MOST_LOSSES
        return kind is FailureKind.CANCELLED

    def _note_failure(self, running: _Running, outcome: Outcome) -> None:
        self._failures.append(
            Failure(
                trial=running.trial,
                kind=outcome.kind or FailureKind.EXCEPTION,
                message=outcome.message or "",
                directory=running.assignment.directory,
            )
        )
        limit = self.spec.max_failures
        if limit is not None and len(self._failures) > limit and not self._draining:
            log.warning("more than %d trials have failed (sweep.max_failures): nothing new starts", limit)
            self.drain()

    def _note_best(self, number: int, state: TrialState, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self.spec.ranked_by)
        if value is None or not math.isfinite(value) or state is not TrialState.COMPLETE:
            return
        best = self._best
        larger = self.spec.direction is Direction.MAXIMIZE
        if best is None or (value > best.value if larger else value < best.value):
            self._best = Best(trial=number, value=value)

    async def _end_lost(self, attempt: str, why: str) -> None:
        outcome = Outcome(
            state=TrialState.FAIL, kind=FailureKind.NODE_LOST, message=why, metrics={}, ended_at=now()
        )
        await self._end(attempt, outcome)

    async def _lose(self, worker: str, why: str) -> None:
        lost = self._workers.pop(worker, None)
        if lost is None:
            return
        for attempt in list(lost.attempts):
            await self._end_lost(attempt, why)
        self._measure()
        self._notify()

    def _keep_workers(self, executor: Executor) -> None:
        if self._draining:
            return
        alive = sum(status.state is WorkerState.ALIVE for status in executor.poll().values())
        missing = executor.wanted(len(self._waiting) + len(self._running)) - alive
        if missing > 0:
            if self._fruitless >= _FRUITLESS_WORKERS:
                ended = [status.detail for status in executor.poll().values() if status.detail]
                raise SweepError(
                    f"sweep/executor={self.spec.executor_name}: {self._fruitless} workers in a row ended without"
                    f" finishing a trial (the last: {ended[-1] if ended else 'unknown'});"
                    f" see {self.spec.directory}/workers/*/worker.log"
                )
            executor.start(missing)
            self._fruitless += 1

    async def _look_after_workers(self, executor: Executor) -> None:
        status = executor.poll()
        for name, worker in list(self._workers.items()):
            found = status.get(name)
            if found is not None and found.state is WorkerState.ENDED:
                await self._lose(name, f"its worker {found.detail}")
            elif time.monotonic() - worker.seen > _WORKER_SILENT_S:
                await self._lose(name, f"its worker has been silent for {_WORKER_SILENT_S:.0f} s")

    async def _wait_for_workers(self, executor: Executor) -> None:
        """Give the workers the time to deliver what they run and to leave."""
        deadline = time.monotonic() + _CLOSE_S
        while self._workers and time.monotonic() < deadline:
            await self._look_after_workers(executor)
            await self._wait_for_change(_POLL_S)
