"""``sweep/executor=local``: one worker on this machine, a subprocess with a slot for each trial that fits."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from repro_sweep import machine
from repro_sweep.errors import SweepError
from repro_sweep.executors.base import Context, Executor, WorkerState, WorkerStatus


@dataclass
class Options:
    """``slots``: trials at a time; null means as many as fit (see ``sweep.resources``)."""

    slots: int | None = None


class LocalExecutor(Executor):
    """Workers as subprocesses in sessions of their own, so that a terminal's Ctrl-C does not reach them."""

    def __init__(self, context: Context, options: Options) -> None:
        self._context = context
        self._slots = machine.slots(machine.inspect(), context.spec.resources, options.slots)
        self._workers: dict[str, subprocess.Popen[bytes]] = {}

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
        """The processes' exit codes."""
        return {worker: _status(process.poll()) for worker, process in self._workers.items()}

    def stop(self, workers: Iterable[str]) -> None:
        """Send SIGTERM."""
        for worker in workers:
            if self._workers[worker].poll() is None:
                self._workers[worker].send_signal(signal.SIGTERM)

    def close(self, timeout_s: float) -> None:
        """Wait for the processes; SIGTERM first, SIGKILL after the time."""
        self.stop(self._workers)
        deadline = time.monotonic() + timeout_s
        for process in self._workers.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self) -> str:
        worker = f"local-{uuid.uuid4().hex[:8]}"
        directory = Path(self._context.spec.directory) / "workers" / worker
        directory.mkdir(parents=True, mode=0o700)
        command = [sys.executable, "-P", "-m", "repro_sweep.worker.agent", "--socket", self._context.socket]
        command += ["--worker", worker, *(f"--slot={','.join(gpus)}" for gpus in self._slots)]
        try:
            with (directory / "worker.log").open("wb") as log:
                self._workers[worker] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            raise SweepError(f"sweep/executor=local: the worker cannot be started: {error}") from error
        return worker


def _status(code: int | None) -> WorkerStatus:
    if code is None:
        return WorkerStatus(state=WorkerState.ALIVE)
    detail = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
    return WorkerStatus(state=WorkerState.ENDED, detail=detail)


OPTIONS = Options
EXECUTOR = LocalExecutor
