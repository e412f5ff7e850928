"""The worker agent: a process that holds slots and claims a trial for each free one until none is left.

It never runs user code itself (see ``zygote``). Each slot is a thread: claim, run, finish, claim again.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import os
import selectors
import signal
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from repro_sweep import protocol
from repro_sweep.errors import ProtocolError
from repro_sweep.states import FailureKind, TrialState
from repro_sweep.sweep import SweepSpec
from repro_sweep.worker.client import Client, CoordinatorLostError
from repro_sweep.worker.nursery import Child, Nursery
from repro_sweep.worker.output import CappedLog

LOG_NAME = "trial.log"
HEARTBEAT_S = 1.0
_FLUSH_S = 0.25
_CHUNK = 1 << 18
_DRAIN_S = 1.0
_PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


class Agent:
    """A worker's slots, its zygote and its link to the coordinator."""

    def __init__(self, worker: str, client: Client, gpus: list[tuple[str, ...]]) -> None:
        self._worker = worker
        self._client = client
        self._gpus = gpus
        registered = client.post(
            "/register",
            protocol.Register(
                worker=worker, host=socket.gethostname(), pid=os.getpid(), slots=len(gpus), gpus=tuple(gpus)
            ),
            protocol.Registered,
        )
        self._spec = SweepSpec.model_validate_json(registered.spec)
        self._nursery = Nursery(registered.spec)
        self._running: dict[str, Run] = {}
        self._outbox: list[protocol.Report] = []
        self._outbox_lock = threading.Lock()
        self._sending = (
            threading.Lock()
        )  # held while reports are on their way, so that a finish comes after them
        self._stopping = threading.Event()
        self._lost = False

    def work(self) -> bool:
        """Run trials until none is left, or until SIGTERM; returns whether the coordinator was there to the end."""
        signal.signal(signal.SIGTERM, lambda *_: self._stopping.set())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        slots = [
            threading.Thread(target=self._slot, args=(slot,), daemon=True, name=f"slot {slot}")
            for slot in range(len(self._gpus))
        ]
        threading.Thread(target=self._flush_reports, daemon=True, name="reports").start()
        for thread in slots:
            thread.start()
        beat = 0.0
        while any(thread.is_alive() for thread in slots) and not self._stopping.is_set():
            if time.monotonic() >= beat:
                beat = time.monotonic() + HEARTBEAT_S
                self._heartbeat()
            self._stopping.wait(0.05)
        for run in list(self._running.values()):
            run.kill(FailureKind.CANCELLED)
        deadline = time.monotonic() + 10.0
        while self._running and not self._lost and time.monotonic() < deadline:
            time.sleep(0.02)
        if not self._lost:
            self._heartbeat(leaving=True)
        self._nursery.close()
        return not self._lost

    def report(self, report: protocol.Report) -> None:
        """Queue a trial's report for sending."""
        with self._outbox_lock:
            self._outbox.append(report)

    def find_run(self, attempt: str) -> dict[str, Any]:
        """The MLflow run of an attempt's trial."""
        try:
            reply = self._client.post("/run", protocol.RunRequest(attempt=attempt), protocol.RunReference)
        except (CoordinatorLostError, ProtocolError) as error:
            return {"error": str(error)}
        return reply.model_dump()

    def _slot(self, slot: int) -> None:
        self._nursery.wait_ready()
        if self._nursery.failed is not None:
            log.error("%s", self._nursery.failed)
        finished: protocol.Finish | None = None
        try:
            while not self._stopping.is_set() and self._nursery.failed is None:
                claim = protocol.Claim(
                    worker=self._worker, slot=slot, attempt=uuid.uuid4().hex, finished=finished
                )
                claimed = self._client.post("/claim", claim, protocol.Claimed)
                self._delivered(finished)
                finished = None
                if claimed.assignment is not None:
                    finished = self._run(claimed.assignment, self._gpus[slot])
                elif claimed.over:
                    return
            if finished is not None:
                self._client.post("/finish", finished, protocol.Acknowledged)
                self._delivered(finished)
        except (CoordinatorLostError, ProtocolError) as error:
            log.error("%s", error)  # noqa: TRY400  (one line says it all)
            self._lose()
        except Exception:
            log.exception("slot %d", slot)
            self._lose()

    def _lose(self) -> None:
        """End this worker: a slot that died alone would keep its trial for ever."""
        self._lost = True
        self._stopping.set()

    def _run(self, assignment: protocol.Assignment, gpus: tuple[str, ...]) -> protocol.Finish:
        run = Run(self, self._nursery, self._spec, assignment, gpus)
        self._running[assignment.attempt] = run
        if self._stopping.is_set():
            run.kill(FailureKind.CANCELLED)
        try:
            result = run.run()
        except Exception as error:
            log.exception("trial %d", assignment.trial)
            run.kill(FailureKind.EXCEPTION)
            result = _failure(FailureKind.EXCEPTION, f"the worker failed: {error!r}")
        with self._sending, self._outbox_lock:
            mine = tuple(report for report in self._outbox if report.attempt == assignment.attempt)
            self._outbox = [report for report in self._outbox if report.attempt != assignment.attempt]
        return protocol.Finish(
            worker=self._worker, attempt=assignment.attempt, ended_at=time.time(), reports=mine, **result
        )

    def _delivered(self, finished: protocol.Finish | None) -> None:
        if finished is not None:
            del self._running[finished.attempt]

    def _flush_reports(self) -> None:
        while not self._lost:
            time.sleep(_FLUSH_S)
            with self._sending:
                with self._outbox_lock:
                    batch, self._outbox = tuple(self._outbox), []
                if batch:
                    try:
                        message = protocol.Reports(worker=self._worker, reports=batch)
                        self._client.post("/report", message, protocol.Acknowledged)
                    except (CoordinatorLostError, ProtocolError) as error:
                        log.error("%s", error)  # noqa: TRY400  (one line says it all)
                        self._lose()

    def _heartbeat(self, *, leaving: bool = False) -> None:
        message = protocol.Heartbeat(worker=self._worker, attempts=tuple(self._running), leaving=leaving)
        try:
            self._client.post("/heartbeat", message, protocol.Acknowledged)
        except (CoordinatorLostError, ProtocolError) as error:
            log.error("%s", error)  # noqa: TRY400  (one line says it all)
            self._lose()


class Run:
    """One attempt: its process, its output, its messages."""

    def __init__(
        self,
        agent: Agent,
        nursery: Nursery,
        spec: SweepSpec,
        assignment: protocol.Assignment,
        gpus: tuple[str, ...],
    ) -> None:
        self._agent = agent
        self._nursery = nursery
        self._assignment = assignment
        self._directory = Path(assignment.directory)
        self._limit = int(spec.log_limit_mb * 1_000_000)
        self._gpus = gpus
        self._child: Child | None = None
        self._killed: FailureKind | None = None
        self._buffer = b""
        self._seq = 0
        self._result: dict[str, Any] | None = None

    def kill(self, kind: FailureKind) -> None:
        """Kill the trial with everything it started; the attempt fails as ``kind``."""
        self._killed = kind
        if self._child is not None:
            self._nursery.kill(self._child)

    def run(self) -> dict[str, Any]:
        """Run the attempt to its end; returns the result's fields of :class:`protocol.Finish`."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with contextlib.ExitStack() as stack:
                output = stack.enter_context(
                    contextlib.closing(CappedLog(self._directory / LOG_NAME, self._limit))
                )
                if self._assignment.ordinal > 0:
                    output.write(f"[repro-sweep: attempt {self._assignment.ordinal + 1}]\n".encode())
                self._run(stack, output)
        except OSError as error:  # a full disk, for one: the trial ends, the worker lives
            self.kill(FailureKind.EXCEPTION)
            return _failure(FailureKind.EXCEPTION, f"its directory, log or process cannot be used: {error}")
        return self._outcome()

    def _run(self, stack: contextlib.ExitStack, output: CappedLog) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        stack.enter_context(ours)
        read, write = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, read)
        try:
            with theirs:
                self._child = self._nursery.start(self._request(), theirs.fileno(), write)
        finally:
            os.close(write)
        stack.callback(self._child.close)
        if self._killed is not None:
            self._nursery.kill(self._child)
        self._attend(self._child, ours, read, output)

    def _request(self) -> dict[str, Any]:
        assignment = self._assignment
        return {
            "run": assignment.attempt,
            "trial": assignment.trial,
            "overrides": list(assignment.overrides),
            "config": assignment.config,
            "directory": str(self._directory),
            "gpus": list(self._gpus),
        }

    def _attend(self, child: Child, channel: socket.socket, output_fd: int, output: CappedLog) -> None:
        """Take the trial's messages and output until it is over and all of it is read."""
        os.set_blocking(output_fd, False)
        with selectors.DefaultSelector() as selector:
            for source in (channel, output_fd, child.ended):
                selector.register(source, selectors.EVENT_READ)
            deadline: float | None = None
            while selector.get_map():
                ready = selector.select(None if deadline is None else max(0.0, deadline - time.monotonic()))
                if not ready or (deadline is not None and time.monotonic() >= deadline):
                    return  # a process that outlived its trial holds the other end
                for key, _ in ready:
                    if key.fileobj is channel:
                        more = self._read_channel(channel)
                    elif key.fileobj == output_fd:
                        more = _read_output(output_fd, output)
                    else:
                        more = False
                        deadline = time.monotonic() + _DRAIN_S
                    if not more:
                        selector.unregister(key.fileobj)

    def _read_channel(self, channel: socket.socket) -> bool:
        try:
            data = channel.recv(_CHUNK)
        except ConnectionResetError:
            data = b""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "report" in message:
                self._agent.report(
                    protocol.Report(attempt=self._assignment.attempt, seq=self._seq, **message["report"])
                )
                self._seq += 1
            elif "run" in message:
                answer = json.dumps(self._agent.find_run(self._assignment.attempt))
                with contextlib.suppress(OSError):  # it was killed while it waited
                    channel.sendall(answer.encode() + b"\n")
            elif "imported" in message:
                self._nursery.preload(message["imported"])
            else:
                self._result = message["result"]
        return bool(data)

    def _outcome(self) -> dict[str, Any]:
        child = self._child
        if self._result is not None:
            missing = self._result.pop("missing", False)
            return {**self._result, "metric_missing": missing}
        if self._killed is not None:
            return _failure(self._killed, "stopped")
        if child is None or child.lost:
            return _failure(FailureKind.NODE_LOST, "the process that forks trials was killed")
        if child.refused is not None:
            return _failure(FailureKind.EXCEPTION, child.refused)
        return _failure(FailureKind.CRASH, _ending(child.status))


def _read_output(fd: int, output: CappedLog) -> bool:
    data = os.read(fd, _CHUNK)
    if data:
        output.write(data)
    return bool(data)


def _failure(kind: FailureKind, message: str) -> dict[str, Any]:
    return {"state": TrialState.FAIL, "kind": kind, "message": message}


def _ending(status: int | None) -> str:
    if status is None:
        return "its process ended for an unknown reason"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"its process exited with status {status} before the task returned"


def main() -> None:
    """Entry point of a worker process."""
    parser = argparse.ArgumentParser(prog="repro-sweep-worker")
    parser.add_argument("--socket", required=True, help="the coordinator's Unix socket")
    parser.add_argument("--worker", required=True, help="this worker's id")
    parser.add_argument(
        "--slot", action="append", required=True, help="a slot's GPUs, such as 0,1; once for each slot"
    )
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(
        _PR_SET_PDEATHSIG, signal.SIGTERM
    )  # no trial runs on while the next coordinator has it too
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO)
    gpus = [tuple(gpu for gpu in slot.split(",") if gpu) for slot in args.slot]
    try:
        ok = Agent(args.worker, Client(args.socket), gpus).work()
    except (CoordinatorLostError, ProtocolError) as error:
        log.error("%s", error)  # noqa: TRY400  (one line says it all)
        ok = False
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
