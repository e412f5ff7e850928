"""The worker agent: a process that holds slots and claims a trial for each free one until none is left.

It never runs user code itself (see ``zygote``). Each slot is a thread: claim, run, finish, claim again. It outlives its
coordinator (see ``link``): its trials go on, and the next coordinator gets their results.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from repro_sweep import host, protocol, spool
from repro_sweep.errors import ProtocolError, SweepError
from repro_sweep.provenance.data import Guard, UnreadableError
from repro_sweep.provenance.snapshot import STORE_NAME
from repro_sweep.states import FailureKind
from repro_sweep.sweep import SweepSpec
from repro_sweep.worker import recorder
from repro_sweep.worker.attempt import Part, Run, failure
from repro_sweep.worker.checkpoints import CheckpointError
from repro_sweep.worker.client import CoordinatorLostError
from repro_sweep.worker.link import Link
from repro_sweep.worker.nursery import Nursery
from repro_sweep.worker.outbox import Answer, Outbox
from repro_sweep.worker.ranks import Ranks, Team
from repro_sweep.worker.site import Site
from repro_sweep.worker.wire import LEAVE_SIGNAL, STACKS_SIGNAL

HEARTBEAT_S = 1.0
_FLUSH_S = 0.25
_LOOK_S = 0.1
_IDLE_S = 0.5
_END_S = 10.0
_FIRST_JOIN_S = 60.0
_BETWEEN_S = 600.0
"""A coordinator's job that was queued again may wait for some minutes before the next one announces itself."""
_GRACE_S = 60.0
_LEAST_GRACE_S = 2.0

log = logging.getLogger(__name__)


class _ChangedError(Exception):
    """Data are not what was submitted."""


class Agent:
    """A worker's slots, its zygote and its link to the coordinator.

    Args:
        worker: its id.
        directory: the sweep's.
        socket_path: where its coordinator listens; None: on another machine, over TCP (see ``link``).
        gpus: of each slot, the devices that its trials see.
        ends_at: when it must have left, in seconds of the monotonic clock; None: whenever it likes.
        team: the nodes that its trials span, all of them; None: this one.
        nursery: makes what starts its trials, from the sweep's record.
        site: the machine; None: it sees the sweep's directory.
    """

    def __init__(
        self,
        worker: str,
        directory: Path,
        socket_path: str | None,
        gpus: Sequence[tuple[str, ...]],
        *,
        ends_at: float | None = None,
        team: Team | None = None,
        nursery: Callable[[str], Nursery] = Nursery,
        site: Site | None = None,
    ) -> None:
        self._team = team
        self._site = site or Site()
        self._make_nursery = nursery
        self._ends_at = ends_at
        self._leave_at: float | None = None
        self._worker = worker
        self._gpus = gpus
        self._link = Link(directory, socket_path, self._introduction)
        self._spec_text = ""
        self._running: dict[str, Run] = {}
        self._claimed: set[str] = set()
        self._undelivered: set[str] = set()
        self._idle: set[int] = set()
        self._outbox = Outbox()
        self._stopping = threading.Event()
        self._done = threading.Event()
        self._over = threading.Event()
        self._failed = False
        self._abandoned = False
        self.trouble = "see its log"
        """What went wrong, where :meth:`work` says that something did; one line."""

    def work(self) -> bool:
        """Run trials until none is left, or it is stopped; returns whether all went well.

        Its signals, SIGTERM to stop, are those of a process of its own: a thread of another process has none.
        """
        if threading.current_thread() is threading.main_thread():
            self._handle_signals()
        registered = self._join()
        if registered is None:
            return False
        if registered.leave:
            return True
        self._spec_text = registered.spec
        try:
            here = self._site.settle(self._link, registered.spec)
        except (SweepError, CoordinatorLostError, ProtocolError) as error:
            self.trouble = str(error)
            log.error("%s", self.trouble)  # noqa: TRY400  (one line says it all)
            self._link.close()
            return False
        self._spec = SweepSpec.model_validate_json(here)
        self._data = Guard(self._spec.data, Path(self._spec.directory).parent / STORE_NAME)
        self._nursery = self._make_nursery(here)
        slots = [
            threading.Thread(target=self._slot, args=(slot,), daemon=True, name=f"slot {slot}")
            for slot in range(len(self._gpus))
        ]
        for target in (self._send_reports, self._send_heartbeats, recorder.look):
            threading.Thread(target=target, daemon=True, name=target.__name__).start()
        for thread in slots:
            thread.start()
        while any(thread.is_alive() for thread in slots) and not self._stopping.is_set():
            self._look()
            self._look_at_time()
            self._stopping.wait(_LOOK_S)
        self._end()
        return not self._failed

    def stop(self) -> None:
        """Stop what runs, and leave soon."""
        self._stopping.set()

    def abandon(self) -> None:
        """Whatever this worker ran for is gone: kill what runs and leave without a word: others say why."""
        self._abandoned = True
        self._stopping.set()

    def _handle_signals(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: self.stop())
        signal.signal(LEAVE_SIGNAL, lambda *_: self._prepare_to_leave())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(STACKS_SIGNAL, signal.SIG_IGN)  # inherited by trials until they are ready for it

    def report(self, report: protocol.Report, answer: Answer | None) -> None:
        """Queue a trial's report for sending; see :class:`repro_sweep.worker.attempt.Desk`."""
        self._outbox.add(report, answer)
        if self._link.lost_for_s:
            self._outbox.excuse()

    def find_run(self, attempt: str) -> dict[str, Any]:
        """The MLflow run of an attempt's trial."""
        problem = self._site.why_no_mlflow(self._spec)
        if problem is not None:
            return {"error": problem}
        try:
            reply = self._link.post("/run", protocol.RunRequest(attempt=attempt), protocol.RunReference)
        except (CoordinatorLostError, ProtocolError) as error:
            return {"error": str(error)}
        return reply.model_dump()

    # --- the coordinator -------------------------------------------------------------------------------------

    def _introduction(self) -> protocol.Register:
        return protocol.Register(
            worker=self._worker, host=host.name(), pid=os.getpid(), slots=len(self._gpus),
            gpus=tuple(self._gpus), attempts=(*self._running, *self._claimed), spec=self._spec_text,
        )  # fmt: skip

    def _join(self) -> protocol.Registered | None:
        """Register for the first time."""
        while not self._stopping.is_set():
            registered = self._link.look()
            if registered is not None:
                return registered
            if self._link.lost_for_s > (_FIRST_JOIN_S if self._link.is_announced else _BETWEEN_S):
                self.trouble = f"no coordinator in {self._link.lost_for_s:.0f} s: {self._link.trouble}"
                log.error("%s", self.trouble)
                break
            self._stopping.wait(_LOOK_S)
        return None

    def _look(self) -> None:
        """See whether there is another coordinator; leave when there has been none for long and nothing runs."""
        registered = self._link.look()
        if registered is not None:
            self._kill(registered.stop)
            if registered.leave:
                self._stopping.set()
        if self._link.lost_for_s:
            self._outbox.excuse()
        at_work = len(self._running) - len(self._undelivered)
        if not at_work and self._link.lost_for_s > 60 * self._spec.limits.orphan_timeout_min:
            log.warning("no coordinator for %g min: leaving", self._spec.limits.orphan_timeout_min)
            self._stopping.set()

    def _prepare_to_leave(self) -> None:
        """This worker's time is nearly over: take nothing new, and let trials save what they have."""
        if self._leave_at is None:
            left = _GRACE_S if self._ends_at is None else self._ends_at - time.monotonic()
            self._leave_at = time.monotonic() + max(_LEAST_GRACE_S, left / 2)
            log.warning("this worker's time is nearly over: its trials are interrupted")

    def _look_at_time(self) -> None:
        if self._leave_at is None:
            return
        for run in list(self._running.values()):
            run.interrupt()
        if time.monotonic() > self._leave_at:
            for run in list(self._running.values()):
                run.kill(FailureKind.PREEMPTED)

    def _kill(self, attempts: tuple[str, ...]) -> None:
        for run in [run for attempt, run in list(self._running.items()) if attempt in attempts]:
            run.kill(FailureKind.CANCELLED)

    def _end(self) -> None:
        """Stop what runs, deliver or keep what has ended, and go."""
        for run in list(self._running.values()):
            run.kill(FailureKind.CANCELLED)
        deadline = time.monotonic() + _END_S
        while self._running and time.monotonic() < deadline:
            if self._link.lost_for_s:
                self._link.give_up()
            time.sleep(0.02)
        if not self._link.lost_for_s and not self._abandoned:
            leave = threading.Thread(target=self._heartbeat, kwargs={"leaving": True}, daemon=True)
            leave.start()
            leave.join(_END_S)
        self._link.close()
        self._nursery.close()
        self._over.set()

    def _send_heartbeats(self) -> None:
        while not self._stopping.is_set():
            self._heartbeat()
            self._stopping.wait(HEARTBEAT_S)

    def _heartbeat(self, *, leaving: bool = False) -> None:
        message = protocol.Heartbeat(worker=self._worker, attempts=tuple(self._running), leaving=leaving)
        with contextlib.suppress(CoordinatorLostError), self._failing_on_refusal():
            beat = self._link.post("/heartbeat", message, protocol.Beat)
            self._kill(beat.stop)
            if not beat.known:
                self._link.rejoin()

    def _send_reports(self) -> None:
        while not self._over.is_set():
            batch = self._outbox.gather(_FLUSH_S)
            if not batch:
                continue
            reports = tuple(entry.report for entry in batch)
            message = protocol.Reports(worker=self._worker, reports=reports)
            with contextlib.suppress(CoordinatorLostError), self._failing_on_refusal():
                reply = self._link.post("/report", message, protocol.Acknowledged)
                self._outbox.sent(batch, reply.prune)  # until now, a finish would have taken them along

    @contextlib.contextmanager
    def _failing_on_refusal(self) -> Any:
        try:
            yield
        except ProtocolError as error:
            log.error("%s", error)  # noqa: TRY400  (one line says it all)
            self._fail(str(error))

    def _fail(self, trouble: str) -> None:
        """End this worker: a slot that died alone would keep its trial for ever."""
        self._failed, self.trouble = True, trouble
        self._stopping.set()

    # --- a slot ----------------------------------------------------------------------------------------------

    def _slot(self, slot: int) -> None:
        self._nursery.wait_ready()
        if self._nursery.failed is not None:
            log.error("%s", self._nursery.failed)
            self._fail(self._nursery.failed)
        finished: protocol.Finish | None = None
        try:
            with self._failing_on_refusal():
                while not self._stopping.is_set() and not self._leave_at and self._nursery.failed is None:
                    claimed, finished = self._claim(slot, finished), None
                    if claimed.assignment is not None:
                        finished = self._run(claimed.assignment)
                        if self._abandoned:
                            self._forget(finished.attempt)
                            return
                    elif claimed.over and self._all_idle(slot):
                        return
                if finished is not None:
                    self._link.post("/finish", finished, protocol.Acknowledged)
                    self._delivered(finished)
        except CoordinatorLostError:
            if finished is not None:
                self._forget(finished.attempt)  # its result is on disk
        except Exception as error:
            log.exception("slot %d", slot)
            self._fail(f"slot {slot}: {error!r}")

    def _claim(self, slot: int, finished: protocol.Finish | None) -> protocol.Claimed:
        attempt = uuid.uuid4().hex
        left_s = None if self._ends_at is None else self._ends_at - time.monotonic()
        claim = protocol.Claim(
            worker=self._worker, slot=slot, attempt=attempt, finished=finished, left_s=left_s
        )
        self._claimed.add(attempt)
        try:
            claimed = self._link.post("/claim", claim, protocol.Claimed)
            if claimed.assignment is not None:
                assignment = self._site.placed(claimed.assignment)
                part = self._part(assignment)
                self._running[attempt] = Run(
                    self, self._nursery, self._spec, assignment, self._gpus[slot], part=part
                )
                claimed = protocol.Claimed(assignment=assignment)
        finally:
            self._claimed.discard(attempt)
        self._delivered(finished)
        return claimed

    def _part(self, assignment: protocol.Assignment) -> Part | None:
        if self._team is None:
            return None
        others = Ranks(self._team, self._spec_text, assignment)
        return Part(0, others.environment, others)

    def _all_idle(self, slot: int) -> bool:
        """No trial will come; but if another slot still runs one, a new coordinator may have more."""
        self._idle.add(slot)
        if len(self._idle) == len(self._gpus):
            self._done.set()
        if self._done.wait(_IDLE_S):
            return True
        self._idle.discard(slot)
        return False

    def _run(self, assignment: protocol.Assignment) -> protocol.Finish:
        run, ended_at = self._running[assignment.attempt], 0.0
        if self._stopping.is_set():
            run.kill(FailureKind.CANCELLED)
        try:
            changed = self._data.look()
            if changed is not None:
                raise _ChangedError(changed)
            with self._site.visit(assignment, self._link, self._spec):
                started_at = time.time()
                result = run.run()
                ended_at = time.time()
                span = started_at, ended_at
                recorder.write(run.directory, self._spec, assignment, run.facts, run.gpus, span)
        except (CheckpointError, UnreadableError) as error:
            result = failure(FailureKind.NODE_LOST, str(error))
        except _ChangedError as error:
            result = failure(FailureKind.DRIFT, str(error))
        except SweepError as error:
            result = failure(FailureKind.EXCEPTION, str(error))
        except Exception as error:
            log.exception("trial %d", assignment.trial)
            run.kill(FailureKind.EXCEPTION)
            result = failure(FailureKind.EXCEPTION, f"the worker failed: {error!r}")
        if run.broken:
            trouble = f"trial {assignment.trial}: {result.get('message')}: this worker leaves"
            log.error("%s", trouble)
            self._fail(trouble)
        self._undelivered.add(assignment.attempt)
        return protocol.Finish(
            worker=self._worker,
            attempt=assignment.attempt,
            ended_at=ended_at or time.time(),
            reports=self._outbox.take(assignment.attempt),
            **result,
        )

    def _delivered(self, finished: protocol.Finish | None) -> None:
        if finished is not None:
            run = self._forget(finished.attempt)
            if run.reported:
                spool.drop_reports(run.directory, finished.attempt)

    def _forget(self, attempt: str) -> Run:
        self._undelivered.discard(attempt)
        return self._running.pop(attempt)


def main() -> None:
    """Entry point of a worker process."""
    parser = argparse.ArgumentParser(prog="repro-sweep-worker")
    parser.add_argument("--directory", required=True, type=Path, help="the sweep's directory")
    parser.add_argument("--socket", required=True, help="the coordinator's Unix socket")
    parser.add_argument("--worker", required=True, help="this worker's id")
    parser.add_argument(
        "--slot", action="append", required=True, help="a slot's GPUs, such as 0,1; once for each slot"
    )
    args = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO)
    gpus = [tuple(gpu for gpu in slot.split(",") if gpu) for slot in args.slot]
    sys.exit(0 if Agent(args.worker, args.directory, args.socket, gpus).work() else 1)


if __name__ == "__main__":
    main()
