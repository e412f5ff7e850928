"""The coordinator: the one process that owns a sweep.

It hands waiting trials to workers that claim them, takes their reports and results, and keeps as many workers alive as
there is work for. It runs from the ledger alone and must never import the user's code. It answers nobody before what
it says is committed. What an earlier coordinator of the sweep left running goes on: its workers come and register.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from repro_sweep import endings, exchange, protocol, spool
from repro_sweep.asking import AskingProcess
from repro_sweep.crew import Crew, WorkersCancelledError
from repro_sweep.errors import LeaseLostError, LedgerError, SweepError
from repro_sweep.executors.base import Cause, Executor, WorkerState, WorkerStatus
from repro_sweep.failpoints import failpoint
from repro_sweep.handout import Group, Handout
from repro_sweep.journal import Journal
from repro_sweep.lease import Lease
from repro_sweep.ledger import Ledger
from repro_sweep.progress import Progress
from repro_sweep.records import Attempt, NewReport, NextAttempt, Outcome, Reused, Trial, now
from repro_sweep.redaction import redacted
from repro_sweep.searching import Searching
from repro_sweep.states import FailureKind, TrialState
from repro_sweep.sweep import SweepSpec
from repro_sweep.tally import Tally
from repro_sweep.tracking.base import Trouble
from repro_sweep.tracking.process import TrackerProcess
from repro_sweep.verdicts import Verdicts
from repro_sweep.waiters import Waiters
from repro_sweep.watch import Watch

_T = TypeVar("_T")
_POLL_S = 0.25
_WORKER_SILENT_S = 60.0
_MISSING_SILENT_S = 10.0
_CLOSE_S = 15.0
_SOON_S = 0.2
"""A slot that has just ended a trial of a search waits so long for the next one, which is being asked for."""
_MANY = 1_000_000
_GIVES_WAY = frozenset({Cause.EVICTED, Cause.CANCELLED})

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Worker:
    """A worker; without slots it is expected back: an earlier coordinator has given it trials."""

    host: str
    seen: float
    slots: int = 0
    gpus: tuple[tuple[str, ...], ...] = ()
    outdated: bool = False
    has_run: bool = False
    attempts: set[str] = field(default_factory=set)

    def group(self, name: str, slot: int) -> Group:
        return name, self.gpus[slot] if slot < len(self.gpus) else ()


@dataclass(slots=True)
class _Running:
    trial: int
    worker: str
    slot: int
    group: Group
    assignment: protocol.Assignment
    started: float


class Coordinator:
    """Owns one sweep's ledger, workers and tracker. All methods belong to one event loop."""

    def __init__(
        self,
        spec: SweepSpec,
        ledger: Ledger,
        tracker: TrackerProcess | None,
        lease: Lease | None = None,
        asker: AskingProcess | None = None,
    ) -> None:
        self.spec = spec
        self._directory = Path(spec.directory)
        self._journal = Journal(ledger)
        self._tracker = tracker
        self._lease = lease
        self._asker = asker
        self._changed = asyncio.Event()
        self._waiters = Waiters()
        self._starting: dict[str, tuple[int, asyncio.Future[protocol.Claimed | None]]] = {}
        self._losing: dict[str, asyncio.Task[None]] = {}
        self._searching = False
        self._draining = False
        self._stopping = False
        self._cancelling: set[int] = set()
        self._fatal: SweepError | None = None
        self._ended_by: LedgerError | None = None
        self._watch = Watch(
            self._directory,
            spec.limits.min_free_mb,
            lease,
            write=self._write,
            on_change=self._notify,
            on_pause=self._excuse_workers,
        )
        self._crew: Crew | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._running: dict[str, _Running] = {}
        self._workers: dict[str, _Worker] = {}
        self._slots = 0
        self._offered = 0
        self._handout = Handout()
        self._fresh: set[int] = set()
        self._tally = self._take_over(ledger)
        self._leaving = False
        self.abandoned = False
        """Whether it stops because the user has cancelled all workers."""
        self._verdicts = Verdicts(spec, asker, self.warn)
        self._search: Searching | None = None
        if asker is not None and spec.search is not None:
            self._search = Searching(spec, ledger, asker, self, self._write)
        self._asking: asyncio.Task[None] | None = None

    def _take_over(self, ledger: Ledger) -> Tally:
        """Take the sweep as it is, and expect the workers that an earlier coordinator has left, with what they run."""
        running = ledger.open_attempts()
        mine = {attempt.trial for attempt in running}
        withdrawn = ledger.withdrawn - mine
        states = {number: state for number, state in ledger.states() if number not in withdrawn}
        self._cancelling = set(mine & ledger.cancelled)
        for attempt in running:
            worker = self._workers.setdefault(attempt.worker, _Worker(attempt.host, time.monotonic()))
            worker.attempts.add(attempt.id)
            group = worker.group(attempt.worker, attempt.slot)
            self._handout.occupy(group)
            assignment = self._assignment(attempt, ledger.trial(attempt.trial))
            self._running[attempt.id] = _Running(
                attempt.trial, attempt.worker, attempt.slot, group, assignment, time.monotonic()
            )
        tried = {number for number, _, _, started in ledger.changes() if started}
        for number, state in states.items():
            if state is TrialState.WAITING:
                self._handout.add(number, alone=number in tried and endings.must_be_alone(ledger, number))
                if number not in tried:
                    self._fresh.add(number)
        tally = Tally(self.spec, states, ledger.cancelled)
        for attempt in ledger.attempts():  # what earlier runs of the sweep have found
            tally.note_result(attempt.trial, attempt.state, attempt.metrics)
            if attempt.state is TrialState.COMPLETE and attempt.ended_at is not None:
                tally.note_duration(attempt.ended_at - attempt.started_at)
        return tally

    # --- the user's side -------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Hand out nothing more; running trials finish."""
        self._draining = True
        self._notify()

    def stop(self) -> None:
        """Stop the running trials too; they can be run again later."""
        self.drain()
        self._stopping = True

    def leave(self) -> None:
        """End without ending anything: its workers go on, and the next coordinator of the sweep takes over."""
        self._leaving = True
        self._notify()

    def progress(self) -> Progress:
        """A picture of the sweep now."""
        return self._tally.progress(
            slots=self._slots,
            running=len(self._running),
            waiting=len(self._handout),
            draining=self._draining,
            not_tracked=self._tracker.progress.left if self._tracker is not None else 0,
            denied=self._denied,
            paused=self._paused,
            searching=self._is_searching,
            to_ask=self._to_ask(None),
        )

    @property
    def _denied(self) -> str | None:
        tracking = None if self._tracker is None else self._tracker.progress
        if tracking is None or tracking.trouble is not Trouble.DENIED:
            return None
        return f"MLflow at {redacted(self.spec.tracking.uri)}: {tracking.error}"

    async def status(self, _message: protocol.StatusRequest) -> Progress:
        """The same for another process."""
        return self.progress()

    async def cancel(self, message: protocol.Cancel) -> protocol.Cancelled:
        """The user cancels trials, or stops the sweep."""
        if message.trials is None:
            self.stop()
            return protocol.Cancelled()
        waiting = self._handout.discard(message.trials)
        self._fresh -= waiting
        running = {each.trial for each in self._running.values()} | {
            each for each, _ in self._starting.values()
        }
        running.intersection_update(message.trials)
        ended = await self._write(lambda ledger: self._cancel(ledger, waiting | running))
        for number, step in ended.items():
            self._tell(step, number, TrialState.FAIL, {})
        again = self._handout.discard(running)  # they have ended meanwhile, and would have been tried again
        for number in waiting | again:
            self._tally.cancel(number)
        self._cancelling |= running - again
        self._notify()
        return protocol.Cancelled(trials=tuple(sorted(waiting | running)))

    async def reuse(self, search: Awaitable[Mapping[str, Reused]]) -> int:
        """Hand out nothing before other sweeps' results are known, and take them over; returns how many there were.

        ``search`` gives them by the identity of the trial.
        """
        self._searching = True
        try:
            found = await search
            taken = await self._write(lambda ledger: self._reuse(ledger, found)) if found else []
            self._handout.discard(number for number, _ in taken)
            for number, value in taken:
                self._tally.set_state(number, TrialState.COMPLETE)
                self._tally.note_result(number, TrialState.COMPLETE, value.metrics)
            return len(taken)
        finally:
            self._searching = False
            self._notify()

    async def run(self, executor: Executor) -> None:
        """Run until no trial is waiting or running, or until drained, stopped, or told to leave.

        Raises:
            SweepError: the sweep cannot go on (no worker stays alive, the task does not return the metric).
            LeaseLostError: another coordinator has taken the sweep over, with its workers.
            LedgerError: the ledger cannot be written.
        """
        self._keeper = asyncio.create_task(self._watch.run())
        crew = self._crew = Crew(self.spec, executor)
        if self._search is not None:
            self._asking = asyncio.create_task(self._search.run())
            await asyncio.sleep(
                0
            )  # what it would have asked for before this coordinator comes first in the record
        try:
            await self.recover()
            while not self._over():
                self._check()
                if self._leaving:
                    return
                try:
                    await self._keep_workers(crew)
                except WorkersCancelledError as error:
                    self.warn(str(error))
                    self.abandoned = True
                    self.stop()
                await self._look_after_workers(crew)
                if self._stopping:
                    crew.stop_all()
                    break
                await self._wait_for_change(_POLL_S)
            await self._wait_for_workers(crew)
        finally:
            if self._asking is not None:
                self._asking.cancel()
            if self._search is not None and not self._superseded and self._ended_by is None:
                await self._search.save_hours()
            if self._losing:
                await asyncio.wait(self._losing.values())
            if not (self._superseded or self._leaving):
                self._stopping = True  # what its workers stop now is to be run again
                self._journal.give_up()
                await asyncio.to_thread(executor.close, _CLOSE_S)
                for attempt in list(self._running):
                    await self._end_lost(attempt, "its worker ended")
        self._check()
        failpoint("sweep.over")
        if self._fatal is not None:
            raise self._fatal

    async def close(self) -> None:
        """Commit, give the lease back, and close the ledger."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        lease = self._lease
        await self._journal.close(last=None if lease is None or self._superseded else lease.release)
        if lease is not None:
            lease.drop()

    # --- the workers' side (see protocol) --------------------------------------------------------------------

    async def register(self, message: protocol.Register) -> protocol.Registered:
        """A worker offers its slots; or comes back, with what it runs."""
        if self._crew is not None and not message.attempts and not self._crew.knows(message.worker):
            log.warning("worker %s is not one of this sweep's executor: it is sent away", message.worker)
            return protocol.Registered(spec=self.spec.model_dump_json(), leave=True)
        worker = self._workers.setdefault(message.worker, _Worker(message.host, time.monotonic()))
        worker.seen = time.monotonic()
        worker.slots, worker.gpus = message.slots, message.gpus
        for running in (self._running[attempt] for attempt in worker.attempts):
            self._handout.release(running.group, running.trial)
            running.group = worker.group(message.worker, running.slot)
            self._handout.occupy(running.group)
        worker.outdated = bool(message.spec) and self._differs(message.spec)
        self._count_slots()
        for attempt in worker.attempts - set(message.attempts) - set(self._starting):
            await self._end_lost(attempt, "its worker does not have it any more")
        self._measure()
        return protocol.Registered(spec=self.spec.model_dump_json(), stop=await self._ended(message.attempts))

    async def claim(self, message: protocol.Claim) -> protocol.Claimed:
        """A free slot asks for a trial."""
        finished = message.finished
        if finished is None:
            return await self._next(message, message.wait_s)
        if len(self._handout) and finished.state is not TrialState.FAIL:  # both in one commit
            ended = await self._enter_finish(finished)
            claimed = await self._next(message, 0.0)
            await asyncio.shield(ended)
            return claimed
        await self.finish(finished)
        return await self._next(message, _SOON_S if self._is_searching else 0.0)

    async def report(self, message: protocol.Reports) -> protocol.Acknowledged:
        """Metrics that running trials reported."""
        reports: dict[str, list[NewReport]] = {}
        for report in message.reports:
            reports.setdefault(report.attempt, []).append(_new_report(report))

        def change(ledger: Ledger) -> list[str]:
            late = [attempt for attempt, rows in reports.items() if not ledger.add_reports(attempt, rows)]
            for attempt in late:
                ledger.note(attempt, "a report came too late and was refused")
            return late

        late = await self._write(change)
        for attempt in late:
            log.warning("attempt %s had ended before: a report of it was refused", attempt)
        return protocol.Acknowledged(
            refused=bool(late), prune=await self._verdicts.on(message.reports, self._trial_of)
        )

    async def finish(self, message: protocol.Finish) -> protocol.Acknowledged:
        """An attempt ended; a repeated message changes nothing."""
        ending = await asyncio.shield(await self._enter_finish(message))
        return protocol.Acknowledged(refused=not ending.accepted)

    async def _enter_finish(self, message: protocol.Finish) -> asyncio.Future[endings.Ending]:
        """Have the end of an attempt recorded; the future tells when it is."""
        if message.kind is not FailureKind.NODE_LOST and self._crew is not None:
            self._crew.was_fruitful()
        if message.metric_missing and message.attempt in self._running and self._fatal is None:
            self._fatal = SweepError(message.message or "the task does not return the metric")
            self.stop()
        outcome = Outcome(
            state=message.state,
            kind=message.kind,
            message=message.message,
            metrics=message.metrics,
            ended_at=message.ended_at,
        )
        return await self._enter_end(
            message.attempt, outcome, [_new_report(each) for each in message.reports]
        )

    async def heartbeat(self, message: protocol.Heartbeat) -> protocol.Beat:
        """The worker lives, or leaves."""
        worker = self._workers.get(message.worker)
        if worker is None or not worker.slots:
            return protocol.Beat(known=message.leaving)
        worker.seen = time.monotonic()
        if message.leaving:
            await self._lose(message.worker, "its worker left")
            return protocol.Beat()
        mine = (self._running.get(attempt) for attempt in message.attempts)
        cancelled = {each.assignment.attempt for each in mine if each and each.trial in self._cancelling}
        gone = [attempt for attempt in message.attempts if attempt not in self._running]
        return protocol.Beat(stop=(*cancelled, *(await self._ended(gone) if gone else ())))

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

    async def piece(self, message: protocol.Piece) -> protocol.Acknowledged:
        """A piece of a file of a running trial."""
        running = self._running.get(message.attempt)
        if running is None:
            return protocol.Acknowledged(refused=True)
        await asyncio.to_thread(exchange.put, Path(running.assignment.directory), message)
        return protocol.Acknowledged()

    async def source(self, message: protocol.SourceRequest) -> protocol.SourcePiece:
        """A piece of the source."""
        return await asyncio.to_thread(exchange.source_at, self._directory, message.offset)

    # --- handing out -----------------------------------------------------------------------------------------

    async def _next(self, message: protocol.Claim, wait_s: float) -> protocol.Claimed:
        deadline = time.monotonic() + wait_s
        while True:
            if message.attempt in self._starting:  # the same claim again, while the first is being committed
                return await asyncio.shield(self._starting[message.attempt][1]) or protocol.Claimed()
            known = self._running.get(message.attempt)
            if known is not None:
                return protocol.Claimed(assignment=known.assignment)
            worker = self._workers.get(message.worker)
            if self._over() or self._draining or (worker is not None and worker.outdated):
                return protocol.Claimed(over=True)
            if worker is not None and not self._has_time(worker, message.left_s):
                return protocol.Claimed(over=True)
            if worker is not None and worker.slots and not self._searching and self._paused is None:
                number = self._handout.take(worker.group(message.worker, message.slot))
                if number is not None:
                    claimed = await asyncio.shield(self._start(number, worker, message))
                    if message.attempt in self._losing:
                        await asyncio.wait([self._losing[message.attempt]])
                    if claimed is None:
                        continue
                    return claimed
            left = deadline - time.monotonic()
            if left <= 0:
                return protocol.Claimed()
            await self._waiters.wait(message, min(left, 1.0))

    def _wake_claims(self) -> None:
        """Trials wait: let as many claims look as there are."""
        if self._handout.some_alone:  # who may have one depends on what runs beside it
            self._waiters.wake_all()
        elif len(self._waiters):
            self._waiters.wake(len(self._handout), self._is_heard)

    def _is_heard(self, claim: protocol.Claim) -> bool:
        worker = self._workers.get(claim.worker)
        return worker is not None and worker.slots > 0

    def _has_time(self, worker: _Worker, left_s: float | None) -> bool:
        """Whether a worker has the time for another trial; one that has run none gets it anyhow: no other has more."""
        return left_s is None or not worker.has_run or left_s >= self._tally.longest_s

    def _start(
        self, number: int, worker: _Worker, claim: protocol.Claim
    ) -> asyncio.Future[protocol.Claimed | None]:
        """Commit that a trial is handed out; the result is the reply, None where the trial is cancelled.

        It is handed out whether or not the claim is still there to hear of it: its worker will repeat it.
        """
        group = worker.group(claim.worker, claim.slot)
        alone = self._handout.is_alone(number)
        started_at = now()

        def change(ledger: Ledger) -> protocol.Claimed | None:
            trial = ledger.next_attempt(number)
            if trial.cancelled:  # just now
                return None
            attempt = Attempt(
                id=claim.attempt, trial=number, ordinal=trial.ordinal, worker=claim.worker, slot=claim.slot,
                host=worker.host, state=TrialState.RUNNING, kind=None, message=None, metrics={},
                started_at=started_at, ended_at=None, code=self.spec.code,
            )  # fmt: skip
            if not ledger.start_attempt(attempt):  # given up before its worker heard of it
                return protocol.Claimed()
            return protocol.Claimed(assignment=self._assignment(attempt, trial))

        def started(claimed: protocol.Claimed | None) -> None:
            del self._starting[claim.attempt]
            if claimed is None:
                self._fresh.discard(number)
                self._handout.release(group, number)
                self._tally.cancel(number)
                self._cancelling.discard(number)
                if self._over():
                    self._notify()
            elif claimed.assignment is None:
                put_back()
            else:
                self._fresh.discard(number)
                self._note_started(claim, worker, group, claimed.assignment)

        def failed() -> None:
            del self._starting[claim.attempt]
            put_back()

        def put_back() -> None:
            self._handout.release(group, number)
            self._handout.add(number, first=True, alone=alone)
            self._wake_claims()

        future = self._enter(change, started, failed)
        self._starting[claim.attempt] = number, future
        return future

    def _note_started(
        self, claim: protocol.Claim, worker: _Worker, group: Group, assignment: protocol.Assignment
    ) -> None:
        number = assignment.trial
        self._running[claim.attempt] = _Running(
            number, claim.worker, claim.slot, group, assignment, time.monotonic()
        )
        worker.attempts.add(claim.attempt)
        worker.has_run = True
        self._tally.set_state(number, TrialState.RUNNING)
        self._measure()
        if self._workers.get(claim.worker) is not worker:
            losing = asyncio.create_task(self._end_lost(claim.attempt, "its worker ended"))
            self._losing[claim.attempt] = losing
            losing.add_done_callback(lambda _: self._losing.pop(claim.attempt))

    def _assignment(self, attempt: Attempt, trial: NextAttempt | Trial) -> protocol.Assignment:
        directory = self.spec.trial_directory(trial.directory)
        return protocol.Assignment(
            attempt=attempt.id, trial=attempt.trial, ordinal=attempt.ordinal, overrides=trial.overrides,
            config=trial.config, identity=trial.identity, directory=str(directory),
            log_size=exchange.log_size(directory) if attempt.ordinal else 0,
        )  # fmt: skip

    def _reuse(self, ledger: Ledger, found: Mapping[str, Reused]) -> list[tuple[int, Reused]]:
        waiting = [trial for trial in ledger.trials(states=[TrialState.WAITING]) if trial.identity in found]
        taken = [(trial.number, found[trial.identity]) for trial in waiting if trial.number in self._tally]
        for number, value in taken:
            ledger.reuse(number, value, self.spec.code)
        return taken

    # --- ends ------------------------------------------------------------------------------------------------

    async def _end(self, attempt: str, outcome: Outcome, reports: list[NewReport]) -> None:
        """Record an attempt's last reports and its end."""
        await asyncio.shield(await self._enter_end(attempt, outcome, reports))

    async def _enter_end(
        self, attempt: str, outcome: Outcome, reports: list[NewReport]
    ) -> asyncio.Future[endings.Ending]:
        """Have it recorded; the future tells when it is."""
        if self._search is not None:
            await self._search.settle()
        running = self._running.get(attempt)
        stopping = self._stopping
        return self._enter(
            lambda ledger: endings.record(ledger, self.spec, attempt, outcome, reports, stopping=stopping),
            lambda ending: self._note_ended(attempt, running, ending, reports),
        )

    def _note_ended(
        self, attempt: str, running: _Running | None, ending: endings.Ending, reports: list[NewReport]
    ) -> None:
        if running is None or not ending.accepted:
            return
        outcome, number = ending.outcome, running.trial
        whole = outcome.state is TrialState.COMPLETE and running.assignment.ordinal == 0
        self._verdicts.ended(attempt, number, reports, whole=whole)
        self._tell(ending.step, number, outcome.state, outcome.metrics)
        if self._running.pop(attempt, None) is None:
            return  # the same message twice
        worker = self._workers.get(running.worker)
        if worker is not None:
            worker.attempts.discard(attempt)
        self._handout.release(running.group, number)
        self._cancelling.discard(number)
        directory = running.assignment.directory
        self._tally.ended(number, outcome, again=ending.again, since=running.started, directory=directory)
        self._measure()
        if ending.again:
            first = outcome.kind is not FailureKind.EXCEPTION
            self._handout.add(number, first=first, alone=ending.alone)
        if self._tally.too_many_failures and not self._draining:
            log.warning("too many trials have failed (sweep.max_failures): nothing new starts")
            self.drain()
        if self._over():
            self._notify()
        elif ending.again or self._handout.some_alone:
            self._wake_claims()

    async def _end_lost(self, attempt: str, why: str, kind: FailureKind = FailureKind.NODE_LOST) -> None:
        """A worker does not run an attempt any more; what it left on disk counts."""
        running = self._running.get(attempt)
        if running is None:
            return
        kept = spool.result_of(self._directory, running.worker, attempt)
        if kept is not None:
            await self._deliver(kept)
            return
        outcome = Outcome(state=TrialState.FAIL, kind=kind, message=why, metrics={}, ended_at=now())
        directory = Path(running.assignment.directory)
        await self._end(attempt, outcome, spool.reports_of(directory, attempt))
        spool.drop_reports(directory, attempt)

    async def _deliver(self, kept: protocol.Finish) -> None:
        await self.finish(kept)
        failpoint("spool.recorded")
        spool.drop_result(self._directory, kept.worker, kept.attempt)

    async def recover(self) -> None:
        """Take the results that found no coordinator."""
        for kept in spool.results(self._directory):
            failpoint("spool.read")
            await self._deliver(kept)

    async def _ended(self, attempts: tuple[str, ...] | list[str]) -> tuple[str, ...]:
        """Those of the attempts that must not run any more."""

        def find(ledger: Ledger) -> tuple[str, ...]:
            found = (ledger.attempt(attempt) for attempt in attempts)
            return tuple(each.id for each in found if each and each.state is not TrialState.RUNNING)

        return await self._write(find) if attempts else ()

    # --- workers ---------------------------------------------------------------------------------------------

    async def _keep_workers(self, crew: Crew) -> None:
        if self._draining or self._paused is not None:
            return
        missing = crew.missing(len(self._handout) + len(self._running) + (self._to_ask(_MANY) or 0))
        if missing:
            await self._write(lambda _: None)  # only who holds the lease may start any
            crew.start(missing)

    async def _look_after_workers(self, crew: Crew) -> None:
        absent = crew.absent()
        for name, worker in list(self._workers.items()):
            silent_s = time.monotonic() - worker.seen
            status = absent.get(name)
            if status is not None:
                if self._is_lost(status, silent_s, absent):
                    kind = FailureKind.PREEMPTED if status.cause in _GIVES_WAY else FailureKind.NODE_LOST
                    await self._lose(name, f"its worker {status.detail or 'ended'}", kind)
                elif status.state is WorkerState.SUSPENDED:  # it will need a moment to speak when it goes on
                    worker.seen = max(worker.seen, time.monotonic() - _MISSING_SILENT_S)
            elif silent_s > _WORKER_SILENT_S:
                await self._lose(name, f"its worker has been silent for {_WORKER_SILENT_S:.0f} s")
                crew.stop(name)

    def _is_lost(self, status: WorkerStatus, silent_s: float, absent: Mapping[str, WorkerStatus]) -> bool:
        """Whether what an absent worker runs is to run elsewhere: if it is suspended, only where there is room now."""
        if status.state is WorkerState.ENDED:
            return True
        if status.state is WorkerState.SUSPENDED and not self._has_room_without(absent):
            return False
        return silent_s >= _MISSING_SILENT_S

    def _has_room_without(self, absent: Mapping[str, WorkerStatus]) -> bool:
        present = {name: each for name, each in self._workers.items() if name not in absent}
        slots = sum(each.slots for each in present.values() if not each.outdated)
        running = sum(len(each.attempts) for each in present.values())
        return slots > running + len(self._starting) + len(self._handout)

    async def _lose(self, worker: str, why: str, kind: FailureKind = FailureKind.NODE_LOST) -> None:
        lost = self._workers.pop(worker, None)
        if lost is None:
            return
        for attempt in list(lost.attempts):
            await self._end_lost(attempt, why, kind)
        self._handout.forget(worker)
        self._count_slots()
        self._measure()
        if not self._workers:
            self._notify()
        self._wake_claims()

    def _excuse_workers(self) -> None:
        """This process itself was stopped: nobody's silence counts."""
        for worker in self._workers.values():
            worker.seen = time.monotonic()

    async def _wait_for_workers(self, crew: Crew) -> None:
        """Give the workers the time to deliver what they run and to leave."""
        deadline = time.monotonic() + _CLOSE_S
        while self._workers and time.monotonic() < deadline and self._ended_by is None:
            await self._look_after_workers(crew)
            await self._wait_for_change(_POLL_S)

    def _differs(self, spec: str) -> bool:
        """Whether a worker works by another record of the sweep than today's: it would run other code."""
        theirs = SweepSpec.model_validate_json(spec)
        composition = theirs.composition.model_copy(update={"now": self.spec.composition.now})
        return theirs.model_copy(update={"origin": self.spec.origin, "composition": composition}) != self.spec

    # --- the search (see searching.Desk) and pruning -------------------------------------------------------------

    def free_slots(self) -> int:
        """How many slots have nothing to run, less the trials that wait; before there are any, as if there were one."""
        return max(1, self.slot_count()) - len(self._running) - len(self._starting) - len(self._handout)

    def slot_count(self) -> int:
        """How many slots there are that get trials."""
        return self._offered

    def is_idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not (self._running or self._starting or len(self._handout))

    def has_begun_all(self) -> bool:
        """Whether no trial waits that has never begun."""
        return not self._fresh

    def may_ask(self) -> bool:
        """Whether anything may be handed out at all."""
        return not self._draining and self._paused is None

    def add_trials(self, numbers: Sequence[int]) -> None:
        """Trials wait that are new to the sweep."""
        for number in numbers:
            self._tally.add(number)
            self._handout.add(number)
        self._fresh.update(numbers)
        self._wake_claims()
        if self._search is not None:
            self._search.wake()

    def withdraw(self) -> list[int]:
        """Take back the trials that wait and have never begun; returns their numbers."""
        withdrawn = sorted(self._handout.discard(self._fresh))
        for number in withdrawn:
            self._tally.withdraw(number)
        self._fresh.clear()
        return withdrawn

    @property
    def _is_searching(self) -> bool:
        return self._search is not None and self._search.over is None and not self._draining

    def _to_ask(self, unlimited: int | None) -> int | None:
        """How many trials a search may still ask for."""
        if self._search is None or not self._is_searching:
            return 0
        return unlimited if self._search.left is None else self._search.left

    def _trial_of(self, attempt: str) -> int | None:
        running = self._running.get(attempt)
        return None if running is None else running.trial

    def warn(self, text: str) -> None:
        """Something that the user should know has happened."""
        log.warning("%s", text)

    def _tell(self, step: int, number: int, state: TrialState, metrics: Mapping[str, float]) -> None:
        if self._search is not None and step:
            self._search.told(step, number, state, metrics)
        elif self._asker is not None and step:
            self._asker.tell(step, number, state, metrics)

    def _cancel(self, ledger: Ledger, numbers: set[int]) -> dict[int, int]:
        """Cancel trials; returns where the ends of those that did not run are recorded, if a search wants to know."""
        ledger.cancel(numbers)
        ended = [number for number in sorted(numbers) if ledger.trial(number).state is TrialState.FAIL]
        return {number: endings.tell(ledger, self.spec, number, TrialState.FAIL, {}) for number in ended}

    # --- itself ----------------------------------------------------------------------------------------------

    async def _write(self, change: Callable[[Ledger], _T]) -> _T:
        try:
            return await self._journal.write(change)
        except LedgerError as error:
            self._note_error(error)
            raise

    def _enter(
        self,
        change: Callable[[Ledger], _T],
        then: Callable[[_T], None],
        otherwise: Callable[[], None] = lambda: None,
    ) -> asyncio.Future[_T]:
        """Have a change made; when it is durable, and before anybody hears of it, ``then`` is called with its result.

        It is made whatever becomes of who waits for the future, which must be shielded. ``otherwise`` is called where
        it cannot be made.
        """

        def done(future: asyncio.Future[_T]) -> None:
            error = future.exception()
            if error is None:
                then(future.result())
                return
            if isinstance(error, LedgerError):
                self._note_error(error)
            otherwise()

        entered = self._journal.enter(change)
        entered.add_done_callback(done)
        return entered

    def _note_error(self, error: LedgerError) -> None:
        self._ended_by = self._ended_by or error
        self._notify()

    @property
    def _paused(self) -> str | None:
        """Why nothing is handed out now."""
        return self._journal.trouble or self._watch.no_space

    @property
    def _superseded(self) -> bool:
        """Whether another coordinator has taken the sweep over, with its workers."""
        return isinstance(self._ended_by, LeaseLostError)

    def _check(self) -> None:
        if self._ended_by is not None:
            raise self._ended_by
        if self._keeper is not None and self._keeper.done():
            self._keeper.result()
        if self._asking is not None and self._asking.done() and not self._asking.cancelled():
            error = self._asking.exception()
            if isinstance(error, SweepError) and self._fatal is None:
                self._fatal = error
                self.drain()
            elif error is not None and error is not self._fatal:
                raise error

    def _over(self) -> bool:
        if self._searching or self._running or self._starting:
            return False
        return self._draining or not (len(self._handout) or self._is_searching)

    def _notify(self) -> None:
        """All who wait are to look again."""
        self._waiters.wake_all()
        self._changed.set()
        self._changed = asyncio.Event()
        if self._search is not None:
            self._search.wake()

    async def _wait_for_change(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    def _count_slots(self) -> None:
        self._slots = sum(worker.slots for worker in self._workers.values())
        self._offered = sum(worker.slots for worker in self._workers.values() if not worker.outdated)

    def _measure(self) -> None:
        self._tally.measure(slots=self._slots, running=len(self._running))
        if self._search is not None:
            self._search.wake()


def _new_report(report: protocol.Report) -> NewReport:
    return NewReport(seq=report.seq, step=report.step, time=report.time, metrics=report.metrics)
