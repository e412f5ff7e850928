"""Runs a sweep's coordinator in this process, with its display, and sums it up."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from repro_sweep import detached, protocol
from repro_sweep.asking import AskingProcess
from repro_sweep.cli.display import Display
from repro_sweep.cli.finding import reference
from repro_sweep.cli.main import INTERRUPTED, say
from repro_sweep.cli.reporting import Drawn, refreshing, write_report
from repro_sweep.cli.reusing import reusing
from repro_sweep.cli.summary import not_sent, summarise
from repro_sweep.cli.uploading import unsent, upload
from repro_sweep.coordinator import Coordinator
from repro_sweep.errors import LeaseLostError, ReproSweepError, SweepError
from repro_sweep.executors import base as executors
from repro_sweep.lease import Lease, holder_of
from repro_sweep.ledger import Ledger
from repro_sweep.provenance import bundle
from repro_sweep.server import Server
from repro_sweep.tracking.process import TrackerProcess

HANDED_OVER = 75
"""The exit status of a coordinator that leaves its workers to the next one."""
KEPT = "REPRO_SWEEP_KEPT"
"""Set for a coordinator that a job's keeper has started (see ``keeper``): :data:`FIRST` or :data:`AGAIN`."""
FIRST = "first"
AGAIN = "again"
_HURRY_S = 10.0
_JOB_ENDS_S = 10.0
_LOOK_S = 0.5


def run(ledger: Ledger, name: str, record: Callable[[Ledger], None], *, summary: bool = True) -> int:
    """Take a sweep's lease, ``record`` what is new in its ledger, and run it; returns the exit status.

    ``summary``: print one at the end.

    Raises:
        ReproSweepError: it cannot be started, or cannot go on.
    """
    kept = is_kept()
    try:
        lease = begin(ledger, name, record)
    except BaseException:
        ledger.close()
        raise
    os.environ.pop(KEPT, None)  # not for what this process starts
    try:
        return asyncio.run(_Session(ledger, lease, kept=kept, summary=summary).run())
    except LeaseLostError as error:
        raise _superseded(Path(ledger.path).parent, name) from error


def submit(ledger: Ledger, name: str, record: Callable[[Ledger], None]) -> int:
    """Take a sweep's lease, ``record`` what is new in its ledger, and submit its coordinator as a job.

    Raises:
        ReproSweepError: it cannot be started.
    """
    try:
        lease = begin(ledger, name, record)
        try:
            spec = ledger.spec
            job = detached.submit(spec)
        finally:
            _give_back(lease, ledger)
    finally:
        ledger.close()
    directory = Path(spec.directory)
    known = reference(directory)
    say(
        f"job {job} runs sweep {known}; 'repro-sweep status {known}' and 'repro-sweep attach {known}' show how it is,"
        f" 'repro-sweep cancel {known}' stops it; it writes to {detached.output(directory, job)}"
    )
    return 0


def begin(ledger: Ledger, name: str, record: Callable[[Ledger], None]) -> Lease:
    """Take a sweep's lease and ``record`` what is new in its ledger.

    Raises:
        ReproSweepError: somebody else runs the sweep or is about to, or the ledger cannot be written.
    """
    lease = Lease.acquire(ledger, name, patient=is_kept())
    try:
        if not is_kept():
            _check_job(ledger.path.parent, name)
        record(ledger)
        ledger.share(executors.is_spread(ledger.spec))
    except BaseException:
        ledger.rollback()
        _give_back(lease, ledger)
        raise
    return lease


def is_kept() -> bool:
    """Whether this process is a job's coordinator, started by its keeper."""
    return KEPT in os.environ


def _check_job(directory: Path, name: str) -> None:
    """See that no job is the sweep's coordinator or will be; one that has just done its work may end first."""
    deadline = time.monotonic() + _JOB_ENDS_S
    while (job := detached.find(directory)) is not None and job.state != detached.UNKNOWN:
        if job.waits or time.monotonic() > deadline:
            raise detached.refusal(job, name)
        time.sleep(_LOOK_S)


def _give_back(lease: Lease, ledger: Ledger) -> None:
    try:
        lease.release(ledger)
        ledger.commit()
    finally:
        lease.drop()


def _superseded(directory: Path, name: str) -> ReproSweepError:
    ledger = Ledger.open(directory, readonly=True)
    holder = holder_of(ledger)
    ledger.close()
    who = "another process" if holder is None else holder.describe()
    return SweepError(f"sweep '{name}' was taken over by {who}, as this one did not go on; nothing is lost")


class _Coordinator(Coordinator):
    """Tells the user of this terminal what a command in another one wants."""

    stopped = False

    async def cancel(self, message: protocol.Cancel) -> protocol.Cancelled:
        """Say it, and do it."""
        if message.trials is None:
            self.stopped = True
            say("another command stops the sweep: nothing new starts, running trials are stopped")
        cancelled = await super().cancel(message)
        for number in cancelled.trials:
            say(f"another command has cancelled trial {number}")
        return cancelled

    def warn(self, text: str) -> None:
        """Say it too."""
        say(text)
        super().warn(text)


class _Session:
    """One run of a coordinator with everything around it."""

    def __init__(self, ledger: Ledger, lease: Lease, *, kept: bool, summary: bool) -> None:
        self._summary = summary
        self._kept = kept
        self._left = False
        self._spec = ledger.spec
        self._ledger = ledger
        self._lease = lease
        self._interrupts = 0
        self._stopped = False
        self._tracker = TrackerProcess(
            Path(self._spec.directory), lease.holder.epoch, yields=executors.shares_machine(self._spec)
        )
        self._asker: AskingProcess | None = None
        if self._spec.search is not None or self._spec.pruner is not None:
            self._asker = AskingProcess(Path(self._spec.directory))
        self._coordinator = _Coordinator(self._spec, ledger, self._tracker, lease, self._asker)
        self._reporting: asyncio.Task[Drawn] | None = None
        self._uploading: asyncio.Task[int] | None = None
        self._reusing: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Run the sweep, upload the rest, print the summary; returns the exit status."""
        self._handle_signals()
        await self._tracker.start()
        if self._asker is not None:
            await self._asker.start()
        server = Server(self._coordinator, executors.host(self._spec))
        try:
            await server.start()
            async with Display(self._coordinator.progress):
                self._lease.announce(server.path, server.tcp, server.token)
                bundling = asyncio.create_task(self._bundle())
                if executors.ships_source(self._spec):
                    await bundling
                async with (
                    refreshing(self._ledger),
                    reusing(self._spec, self._coordinator, self._tracker) as self._reusing,
                ):
                    await self._coordinator.run(executors.create(self._spec, server.path))
                await bundling
                if not self._left:
                    await self._report()
                    left = await self._upload()
            error = self._tracker.progress.error
        finally:
            await server.stop()
            if self._left:  # the next one may begin, and this one's job may not have long
                await self._coordinator.close()
            if self._asker is not None:
                await self._asker.kill()
            await self._tracker.kill()
            if not self._left:
                await self._coordinator.close()
        if self._left:
            return HANDED_OVER
        left = unsent(Path(self._spec.directory), left)
        if left and not self._summary:
            say(not_sent(self._spec, left, error))
        failed = self._summary and summarise(self._spec, self._coordinator.progress(), left, error)
        return INTERRUPTED if self._interrupts or self._coordinator.abandoned else int(failed)

    async def _bundle(self) -> None:
        """Have what was submitted ready for MLflow, and for machines that may not see this one's files."""
        if self._spec.source is None:  # of an older version
            return
        trouble = await asyncio.to_thread(bundle.write, self._spec)
        if trouble is not None:
            without = (
                f"; machines that do not see {self._spec.directory} cannot take part"
                if executors.ships_source(self._spec)
                else ""
            )
            self._coordinator.warn(f"the source is not in MLflow: {trouble}{without}")

    async def _report(self) -> None:
        """Draw the sweep's last report, which MLflow gets too, unless the user is in a hurry."""
        if not self._spec.report or self._interrupts or self._stopped or self._coordinator.stopped:
            return
        self._reporting = asyncio.create_task(write_report(Path(self._spec.directory)))
        try:
            problem = (await self._reporting).problem
        except asyncio.CancelledError:
            problem = "interrupted"
        finally:
            self._reporting = None
        if problem is not None:
            say(f"there is no report: {problem}; 'repro-sweep report {self._spec.name}' tries again")

    async def _upload(self) -> int:
        """Bring the rest to MLflow, of a sweep that was stopped as much as is quickly done; returns what it lacks."""
        self._uploading = asyncio.create_task(upload(self._tracker))
        stopped = self._coordinator.stopped or self._stopped
        try:
            async with asyncio.timeout(_HURRY_S if stopped else None):
                return await self._uploading
        except (asyncio.CancelledError, TimeoutError):
            return self._tracker.progress.left

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        end = self._leave if self._kept and executors.is_remote(self._spec) else self._terminate
        loop.add_signal_handler(signal.SIGTERM, end)
        if self._kept:
            loop.add_signal_handler(signal.SIGUSR2, end)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal may go, the sweep goes on

    def _interrupt(self) -> None:
        self._interrupts += 1
        if self._uploading is not None:
            self._uploading.cancel()
        elif self._reporting is not None:
            self._reporting.cancel()
        elif self._interrupts == 1:
            say("interrupted: nothing new starts, running trials finish; once more to stop them")
            self._coordinator.drain()
            if self._reusing is not None:
                self._reusing.cancel()
        else:
            say("interrupted again: running trials are stopped")
            self._terminate()

    def _leave(self) -> None:
        """Leave the workers to the next coordinator; what is over but for MLflow's share ends as usual."""
        if self._uploading is None and self._reporting is None:
            say("this coordinator ends; its workers go on, and the next one takes over")
            self._left = True
            self._coordinator.leave()
        else:
            self._terminate()

    def _terminate(self) -> None:
        self._interrupts = max(1, self._interrupts)
        self._stopped = True
        self._coordinator.stop()
        if self._uploading is not None:
            self._uploading.cancel()
