"""One attempt of a trial, as its worker sees it: its process, its output, its messages, its limits."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from repro_sweep import protocol
from repro_sweep.states import FailureKind, TrialState
from repro_sweep.sweep import SweepSpec
from repro_sweep.worker import oom, ranks
from repro_sweep.worker.nursery import Child, Nursery
from repro_sweep.worker.outbox import Answer
from repro_sweep.worker.output import CappedLog
from repro_sweep.worker.ranks import Ranks

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
_CHUNK = 1 << 18
_DRAIN_S = 1.0
_STACKS_S = 2.0
_LONGEST_WAIT_S = 3600.0  # a limit may be infinite, a wait may not


class Desk(Protocol):
    """Where an attempt hands in what its trial says."""

    def report(self, report: protocol.Report, answer: Answer | None) -> None:
        """Queue a trial's report for sending; ``answer`` is set where the trial waits to hear whether to go on."""

    def find_run(self, attempt: str) -> dict[str, Any]:
        """The MLflow run of an attempt's trial."""


@dataclass(frozen=True, slots=True)
class Part:
    """Which of the ranks of a trial that spans several nodes runs here, and what that adds to its environment.

    ``others``: on rank 0's node, those that end with it.
    """

    rank: int
    environment: Mapping[str, str]
    others: Ranks | None = None


class Run:
    """One attempt: its process, its output, its messages, its limits."""

    def __init__(
        self,
        desk: Desk,
        nursery: Nursery,
        spec: SweepSpec,
        assignment: protocol.Assignment,
        gpus: tuple[str, ...],
        *,
        part: Part | None = None,
    ) -> None:
        self._part = part
        self._others = None if part is None else part.others
        self._joint: dict[str, Any] | None = None
        self._desk = desk
        self._nursery = nursery
        self._assignment = assignment
        self.directory = Path(assignment.directory)
        self._log_limit = int(spec.log_limit_mb * 1_000_000)
        self._limits = spec.limits
        self.gpus = gpus
        self._child: Child | None = None
        self._channel: socket.socket | None = None
        self._saying = threading.Lock()
        self._killed: FailureKind | None = None
        self._interrupted = False
        self._buffer = b""
        self._started = self._reported = time.monotonic()
        self._stacks_until: float | None = None
        self._oom_kills = oom.kills()
        self._result: dict[str, Any] | None = None
        self.reported = False
        self.facts: dict[str, Any] | None = None
        """What its process said of itself at its end."""
        self.over_at: float | None = None
        """When its end was known, in seconds UTC."""

    def kill(self, kind: FailureKind) -> None:
        """Kill the trial with everything it started; the attempt fails as ``kind``."""
        if self._killed is None:
            self._killed = kind
        if self._child is not None:
            self._nursery.kill(self._child)
        if self._others is not None:
            self._others.kill()

    @property
    def broken(self) -> bool:
        """Whether a node that the trial needs is lost."""
        return self._others is not None and self._others.broken

    def interrupt(self) -> None:
        """Tell the trial that its worker must leave: its next report raises ``TrialInterrupted``."""
        if not self._interrupted:
            self._interrupted = True
            self._say({"leave": True}, socket.MSG_DONTWAIT)

    def run(self) -> dict[str, Any]:
        """Run the attempt to its end; returns the result's fields of :class:`protocol.Finish`."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with contextlib.ExitStack() as stack:
                output = stack.enter_context(
                    contextlib.closing(CappedLog(self.directory / self._log_name, self._log_limit))
                )
                if self._assignment.ordinal > 0:
                    output.write(f"[repro-sweep: attempt {self._assignment.ordinal + 1}]\n".encode())
                self._run(stack, output)
        except OSError as error:  # the trial ends, the worker lives; a full disk is not the trial's fault
            kind = FailureKind.NODE_LOST if error.errno in FULL_DISK else FailureKind.EXCEPTION
            self.kill(kind)
            return failure(kind, f"its directory, log or process cannot be used: {error}")
        return self._joint or self._outcome()

    @property
    def _log_name(self) -> str:
        return ranks.log_name(0 if self._part is None else self._part.rank)

    def _run(self, stack: contextlib.ExitStack, output: CappedLog) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        stack.enter_context(ours)
        self._channel = ours
        stack.callback(self._hang_up)
        if self._others is not None:
            output.write(self._others.start(self._give_up).encode())
            stack.callback(self._others.kill)
        read, write = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, read)
        try:
            with theirs:
                self._child = self._nursery.start(self._request(), theirs.fileno(), write)
        finally:
            os.close(write)
        stack.callback(self._child.close)
        if self._killed is not None or (self._others is not None and self._others.failed):
            self._nursery.kill(self._child)
        if self._interrupted:
            self._say({"leave": True}, socket.MSG_DONTWAIT)
        self._attend(self._child, ours, read, output)
        if self._others is not None:
            whole = self._killed is None and (self._result is not None or not self._others.failed)
            self._joint = self._others.settle(self._outcome(), self.over_at or time.time(), whole=whole)

    def _give_up(self) -> None:
        """Another rank has failed."""
        if self._child is not None:
            self._nursery.kill(self._child)

    def _request(self) -> dict[str, Any]:
        assignment = self._assignment
        return {
            "run": assignment.attempt,
            "trial": assignment.trial,
            "overrides": list(assignment.overrides),
            "config": assignment.config,
            "identity": assignment.identity,
            "directory": str(self.directory),
            "gpus": list(self.gpus),
            "rank": 0 if self._part is None else self._part.rank,
            "environment": {} if self._part is None else dict(self._part.environment),
        }

    def _attend(self, child: Child, channel: socket.socket, output_fd: int, output: CappedLog) -> None:
        """Take the trial's messages and output until it is over and all of it is read."""
        os.set_blocking(output_fd, False)
        with selectors.DefaultSelector() as selector:
            for source in (channel, output_fd, child.ended):
                selector.register(source, selectors.EVENT_READ)
            deadline: float | None = None
            while selector.get_map():
                due = self._look_at_limits(child) if deadline is None else deadline
                wait = None if due is None else min(_LONGEST_WAIT_S, max(0.0, due - time.monotonic()))
                ready = selector.select(wait)
                if deadline is not None and (not ready or time.monotonic() >= deadline):
                    return  # a process that outlived its trial holds the other end
                for key, _ in ready:
                    if key.fileobj is channel:
                        more = self._read_channel(channel)
                    elif key.fileobj == output_fd:
                        more = _read_output(output_fd, output)
                    else:
                        more = False
                        self.over_at = self.over_at or time.time()
                        deadline = time.monotonic() + _DRAIN_S
                    if not more:
                        selector.unregister(key.fileobj)

    def _look_at_limits(self, child: Child) -> float | None:
        """End the attempt where it has run, or reported nothing, for too long; returns when to look again."""
        now = time.monotonic()
        due = []
        if self._limits.trial_timeout_min is not None:
            due.append(self._started + 60 * self._limits.trial_timeout_min)
            if now >= due[-1]:
                self.kill(FailureKind.TIMEOUT)
                return None
        if self._limits.stall_timeout_min is not None:
            due.append(self._stacks_until or self._reported + 60 * self._limits.stall_timeout_min)
            if now >= due[-1] and self._stacks_until is None:
                self._nursery.show_stacks(child)
                self._stacks_until = due[-1] = now + _STACKS_S
            elif now >= due[-1]:
                self.kill(FailureKind.STALLED)
                return None
        return min(due, default=None)

    def _read_channel(self, channel: socket.socket) -> bool:
        try:
            data = channel.recv(_CHUNK)
        except ConnectionResetError:
            data = b""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "report" in message:
                self._reported, self._stacks_until = time.monotonic(), None
                report = protocol.Report(attempt=self._assignment.attempt, **message["report"])
                self.reported = True
                self._desk.report(report, self._answer if message.get("asks") else None)
            elif "run" in message:
                self._say(self._desk.find_run(self._assignment.attempt))
            elif "imported" in message:
                self.facts = message["facts"]
                self._nursery.preload(message["imported"])
            else:
                self._result = message["result"]
                self.over_at = time.time()
        return bool(data)

    def _answer(self, seq: int, prune: bool) -> None:
        """See :data:`repro_sweep.worker.outbox.Answer`."""
        self._say({"verdict": [seq, prune]}, socket.MSG_DONTWAIT)

    def _say(self, message: dict[str, Any], flags: int = 0) -> None:
        """Send one line to the trial, from any thread, while there is one."""
        with self._saying, contextlib.suppress(OSError):  # it was killed while it waited
            if self._channel is not None:
                self._channel.sendall(json.dumps(message).encode() + b"\n", flags)

    def _hang_up(self) -> None:
        with self._saying:
            self._channel = None

    def _outcome(self) -> dict[str, Any]:
        child = self._child
        if self._result is not None:
            missing = self._result.pop("missing", False)
            return {**self._result, "metric_missing": missing}
        if self._killed is not None:
            return failure(self._killed, self._why_killed(self._killed))
        if child is None or child.lost:
            return failure(FailureKind.NODE_LOST, "the process that forks trials was killed")
        if child.refused is not None:
            return failure(FailureKind.EXCEPTION, child.refused)
        if child.status == -signal.SIGKILL and self._out_of_memory():
            return failure(FailureKind.OUT_OF_MEMORY, "killed by the kernel: out of memory")
        return failure(FailureKind.CRASH, _ending(child.status))

    def _why_killed(self, kind: FailureKind) -> str:
        if kind is FailureKind.TIMEOUT:
            return f"longer than {self._limits.trial_timeout_min:g} min (sweep.trial_timeout_min)"
        if kind is FailureKind.STALLED:
            return (
                f"no report for {self._limits.stall_timeout_min:g} min (sweep.stall_timeout_min); see its log"
            )
        if kind is FailureKind.PREEMPTED:
            return "its worker had to leave"
        return "stopped"

    def _out_of_memory(self) -> bool:
        now = oom.kills()
        return now is not None and self._oom_kills is not None and now > self._oom_kills


def _read_output(fd: int, output: CappedLog) -> bool:
    data = os.read(fd, _CHUNK)
    if data:
        output.write(data)
    return bool(data)


def failure(kind: FailureKind, message: str) -> dict[str, Any]:
    """The fields of a result that say how an attempt has failed."""
    return {"state": TrialState.FAIL, "kind": kind, "message": message}


def _ending(status: int | None) -> str:
    if status is None:
        return "its process ended for an unknown reason"
    if status >= 0:
        return f"its process exited with status {status} before the task returned"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal
        return f"killed by signal {-status}"
