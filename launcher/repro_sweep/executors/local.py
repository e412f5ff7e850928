"""``sweep/executor=local``: one worker on this machine, a subprocess with a slot for each trial that fits."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from repro_sweep import host, machine
from repro_sweep.errors import SweepError
from repro_sweep.executors.base import ALIVE, Cause, Context, Executor, WorkerState, WorkerStatus
from repro_sweep.lease import started_at
from repro_sweep.spool import worker_directory, write_file

_RECORD = "worker.json"
_KILL_S = 5.0
_LOOK_S = 0.02


@dataclass
class Options:
    """``slots``: trials at a time; null means as many as fit (see ``sweep.resources``)."""

    slots: int | None = None


class LocalExecutor(Executor):
    """Workers as subprocesses in sessions of their own, so that a terminal's Ctrl-C does not reach them."""

    def __init__(self, context: Context, options: Options) -> None:
        self._context = context
        self._slots = machine.slots(machine.inspect(), context.spec.resources, options.slots)
        self._workers: dict[str, _Process] = {}
        self._looked = False

    def describe(self) -> str:
        """The slots and their GPUs."""
        gpus = sorted({gpu for devices in self._slots for gpu in devices})
        return f"{len(self._slots)} slots on this machine" + (f", GPUs {', '.join(gpus)}" if gpus else "")

    def wanted(self, trials: int) -> int:
        """One worker holds the whole machine."""
        return min(1, trials)

    def start(self, count: int) -> list[str]:
        """Start ``count`` worker processes; their own output goes to ``workers/<id>/worker.log``."""
        return [self._start() for _ in range(count)]

    def poll(self) -> Mapping[str, WorkerStatus]:
        """The processes' exit codes; of those that an earlier coordinator has started, whether they exist."""
        if not self._looked:
            self._looked = True
            self._find_earlier()
        return {worker: process.status() for worker, process in self._workers.items()}

    def stop(self, workers: Iterable[str]) -> None:
        """Send SIGTERM, also to one that is stopped."""
        for worker in workers:
            if self._workers[worker].status().state is WorkerState.ALIVE:
                self._workers[worker].send(signal.SIGTERM)
                self._workers[worker].send(signal.SIGCONT)

    def close(self, timeout_s: float) -> None:
        """Wait for the processes; SIGTERM first, SIGKILL after the time."""
        self.stop(self._workers)
        deadline = time.monotonic() + timeout_s
        for process in self._workers.values():
            if not process.ends_before(deadline):
                process.send(signal.SIGKILL)
                process.ends_before(deadline + _KILL_S)

    def _find_earlier(self) -> None:
        """Workers of this machine that an earlier coordinator of the sweep has started, living and dead."""
        for path in Path(self._context.spec.directory).glob(f"workers/*/{_RECORD}"):
            try:
                record = json.loads(path.read_text())
                where, process = record["host"], _Process(record["pid"], record["started"])
            except (OSError, ValueError, KeyError):
                continue
            if where == host.name() and path.parent.name not in self._workers:
                self._workers[path.parent.name] = process

    def _start(self) -> str:
        worker = f"local-{uuid.uuid4().hex[:8]}"
        directory = worker_directory(Path(self._context.spec.directory), worker)
        directory.mkdir(parents=True, mode=0o700)
        command = [sys.executable, "-P", "-m", "repro_sweep.worker.agent", "--worker", worker]
        command += ["--directory", self._context.spec.directory, "--socket", self._context.socket]
        command += [*(f"--slot={','.join(gpus)}" for gpus in self._slots)]
        try:
            with (directory / "worker.log").open("wb") as log:
                child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            self._workers[worker] = _Process(child.pid, started_at(child.pid), child)
            record = {"host": host.name(), "pid": child.pid, "started": started_at(child.pid)}
            write_file(directory / _RECORD, json.dumps(record))
        except OSError as error:
            raise SweepError(f"sweep/executor=local: the worker cannot be started: {error}") from error
        return worker


class _Process:
    """A worker's process: a child of ours, or one that an earlier coordinator has left."""

    def __init__(self, pid: int, started: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self._pid = pid
        self._started = started
        self._child = child

    def status(self) -> WorkerStatus:
        if self._child is None:
            alive = started_at(self._pid) == self._started
            return ALIVE if alive else WorkerStatus(state=WorkerState.ENDED, detail="is gone")
        code = self._child.poll()
        if code is None:
            return ALIVE
        cause = Cause.OWN if code >= 0 else Cause.KILLED
        return WorkerStatus(state=WorkerState.ENDED, detail=_ending(code), cause=cause)

    def send(self, number: signal.Signals) -> None:
        if self._child is not None:
            self._child.send_signal(number)
        elif self.status().state is WorkerState.ALIVE:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def ends_before(self, deadline: float) -> bool:
        while self.status().state is WorkerState.ALIVE:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_S)
        return True


def _ending(code: int) -> str:
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"killed by signal {-code}"


OPTIONS = Options
EXECUTOR = LocalExecutor
