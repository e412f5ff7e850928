"""Runs a prepared sweep in this process, with its display, and sums it up."""

from __future__ import annotations

import asyncio
import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.types import TaskFunction
from omegaconf import DictConfig

from repro_sweep import task
from repro_sweep.cli import plan as planning
from repro_sweep.cli.display import Display
from repro_sweep.cli.main import fail
from repro_sweep.cli.summary import summarise
from repro_sweep.cli.sweep import command_line, named_by_sweep
from repro_sweep.coordinator import Coordinator
from repro_sweep.errors import ReproSweepError, SweepError
from repro_sweep.executors import base as executors
from repro_sweep.lease import Lease
from repro_sweep.ledger import Ledger
from repro_sweep.server import Server
from repro_sweep.submission import Submission, prepare
from repro_sweep.tracking.process import TrackerProcess

INTERRUPTED = 130
_UPLOAD_PATIENCE_S = 60.0
_LOOK_S = 0.5


def main(
    config: DictConfig, loader: ConfigLoader, arguments: Sequence[str], function: TaskFunction, *, plan: bool
) -> int:
    """Prepare and run the sweep that Hydra composed; returns the exit status."""
    try:
        launcher = config.hydra.runtime.choices.get("hydra/launcher")
        if launcher not in (None, "basic"):
            say(f"hydra/launcher={launcher} is not used: sweep/executor says where trials run")
        found = None if function is named_by_sweep else task.from_function(function)
        submission = prepare(config, loader, arguments, found, command_line())
        return planning.show(submission) if plan else run(submission)
    except ReproSweepError as error:
        return fail(str(error))
    except KeyboardInterrupt:  # outside of the sweep itself: while it is prepared, or summed up
        return INTERRUPTED


def run(submission: Submission) -> int:
    """Run a prepared sweep; returns the exit status.

    Raises:
        ReproSweepError: it cannot be started, or cannot go on.
    """
    directory = Path(submission.spec.directory)
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        lease = Lease.acquire(directory, submission.spec.name)
    except OSError as error:
        raise SweepError(f"hydra.sweep.dir: {directory} cannot be used: {error}") from error
    _say_what_is_done(submission)
    try:
        return asyncio.run(_Session(submission, submission.record(), lease).run())
    finally:
        lease.release()


def _say_what_is_done(submission: Submission) -> None:
    done, total = submission.done, submission.done + submission.to_run
    if submission.to_run == 0:
        say(f"{done} of {total} trials are complete already; nothing to run")
    elif done:
        say(f"{done} of {total} trials are complete already, {submission.to_run} to run")


class _Session:
    """One run of a coordinator with everything around it."""

    def __init__(self, submission: Submission, ledger: Ledger, lease: Lease) -> None:
        self._spec = submission.spec
        self._ledger = ledger
        self._lease = lease
        self._interrupts = 0
        self._tracker = TrackerProcess(Path(self._spec.directory))
        self._coordinator = Coordinator(self._spec, ledger, self._tracker)
        self._uploading: asyncio.Task[int] | None = None

    async def run(self) -> int:
        """Run the sweep, upload the rest, print the summary; returns the exit status."""
        self._handle_signals()
        await self._tracker.start()
        try:
            async with Display(self._coordinator.progress):
                await self._work()
                left = await self._upload()
        finally:
            await self._tracker.kill()
            await self._coordinator.close()
        failed = summarise(self._spec, self._coordinator.progress(), left)
        return INTERRUPTED if self._interrupts else int(failed)

    async def _work(self) -> None:
        server = Server(self._coordinator)
        await server.start()
        try:
            self._lease.announce(self._ledger, server.path)
            await self._coordinator.run(executors.create(self._spec, server.path))
        finally:
            await server.stop()

    async def _upload(self) -> int:
        """Wait until MLflow has everything, or gives no sign of life; returns how many trials it lacks."""
        self._uploading = asyncio.create_task(self._tracker.finish(math.inf))
        left, since = self._tracker.progress.left, time.monotonic()
        try:
            while not (await asyncio.wait([self._uploading], timeout=_LOOK_S))[0]:
                if self._tracker.progress.left != left:
                    left, since = self._tracker.progress.left, time.monotonic()
                elif time.monotonic() - since > _UPLOAD_PATIENCE_S:
                    self._uploading.cancel()
            return self._uploading.result()
        except asyncio.CancelledError:
            return self._tracker.progress.left

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal may go, the sweep goes on

    def _interrupt(self) -> None:
        self._interrupts += 1
        if self._uploading is not None:
            self._uploading.cancel()
        elif self._interrupts == 1:
            say("interrupted: nothing new starts, running trials finish; once more to stop them")
            self._coordinator.drain()
        else:
            say("interrupted again: running trials are stopped")
            self._terminate()

    def _terminate(self) -> None:
        self._interrupts = max(1, self._interrupts)
        self._coordinator.stop()
        if self._uploading is not None:
            self._uploading.cancel()


def say(message: str) -> None:
    """One line to the user while the sweep runs."""
    print(f"repro-sweep: {message}", file=sys.stderr, flush=True)
