"""The process that a sweep's tracker runs in, and the coordinator's end of it.

MLflow is imported here and nowhere near a trial or the coordinator. The two sides speak JSON lines::

    coordinator -> tracker   {"do": "run", "trial": 3}    {"do": "done_elsewhere"}    {"do": "finish"}
                             (end of file: stop soon)
    tracker -> coordinator   {"run": 3, "run_id": …, "uri": …, "experiment_id": …}    {"run": 3, "error": "one line"}
                             {"elsewhere": {identity: {…}, …}, "more": true}    {"elsewhere": {}, "error": "one line"}
                             {"left": 12, "error": null, "moved": 34567, "trouble": null}, about once a second

Started by hand, ``python -m repro_sweep.tracking.process DIRECTORY [--epoch N]`` brings MLflow up to date until it is
told to stop, or until the sweep has a coordinator with a larger epoch, whose own tracker goes on. What MLflow and its
parts write goes to ``tracking.log`` in the sweep's directory.

Without arguments it imports MLflow and reads them then, from a first line that is a JSON list (see :mod:`.child`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import IO, Any, cast

from repro_sweep import collecting
from repro_sweep.childio import private_stdout
from repro_sweep.errors import ReproSweepError, TrackingError
from repro_sweep.records import Reused
from repro_sweep.tracking.base import Answer, Progress, RunRef, Tracker, Trouble
from repro_sweep.tracking.child import Child

LOG_NAME = "tracking.log"
_IMPLEMENTATION = ("repro_sweep.tracking.mlflow", "MlflowTracker")
_BATCH_S = 0.1
"""Results are gathered for so long, so that they share one write to disk."""
_TELL_S = 1.0
_LOCK_S = 0.2
_RESTART_S = 0.5
_LONGEST_RESTART_S = 30.0
_KILL_S = 5.0
_NICE = 10
_RESULTS_A_LINE = 50

_logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Run the tracker of the sweep in the given directory until it is done or told to stop."""
    argv = sys.argv[1:] if argv is None else argv
    collecting.rarely()
    if not argv:
        argv = _prepared()
        if argv is None:
            return 0
    parser = argparse.ArgumentParser(prog="repro-sweep-tracker")
    parser.add_argument("directory", type=Path, help="the sweep's")
    parser.add_argument("--epoch", type=int, help="of the coordinator that it works for")
    parser.add_argument("--yield", dest="yields", action="store_true", help="trials run on this machine")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the coordinator, which tells us what to do
    if args.yields:
        _yield_to_trials()
    with private_stdout(args.directory / LOG_NAME) as out:
        try:
            _Loop(args.directory, args.epoch, out).run()
        except ReproSweepError as error:
            _logger.error("%s", error)  # noqa: TRY400  (one line is what the user needs)
            return 1
        except BrokenPipeError:  # the coordinator is gone
            return 0
        except Exception:
            _logger.exception("a bug")
            return 1
    return 0


def _prepared() -> list[str] | None:
    """Import MLflow, then read the arguments."""
    with private_stdout(Path(os.devnull)) as out:
        _import()
        os.dup2(out.fileno(), 1)
    line = sys.stdin.readline()
    return cast("list[str]", json.loads(line)) if line else None


def _import() -> None:
    """Import MLflow and what stands on it; what fails is said where it is used."""
    with contextlib.suppress(Exception):
        from repro_sweep.tracking.store import import_mlflow

        import_mlflow()
        importlib.import_module(_IMPLEMENTATION[0])


def _yield_to_trials() -> None:
    """Take a tenth of a trial's share of a busy CPU: enough to follow a sweep, too little to slow it down."""
    os.nice(_NICE)
    # Linux may weigh sessions instead of processes: ours is a session of its own
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(_NICE))


def _yield_no_more() -> None:
    """No trial runs any more, and somebody waits for us. Of both ways to yield, only this one can be taken back."""
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("0")


class _Loop:
    """Owns the tracker; everything but reading stdin happens in the main thread."""

    def __init__(self, directory: Path, epoch: int | None, out: IO[str]) -> None:
        self._directory = directory
        self._epoch = epoch
        self._out = out
        self._wake = threading.Event()
        self._commands: queue.SimpleQueue[dict[str, object] | None] = queue.SimpleQueue()
        self._told_at = 0.0
        self._stop = False
        self._eof = False
        signal.signal(signal.SIGTERM, self._on_sigterm)
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    def run(self) -> None:
        tracker = self._tracker()
        if tracker is None:
            return
        try:
            while not self._stop:
                self._obey(tracker)
                delay = tracker.sync()
                progress = tracker.progress
                self._tell(progress, at_once=progress.done)
                if progress.done:
                    break
                if self._wake.wait(delay) and self._commands.empty():
                    time.sleep(_BATCH_S)
                self._wake.clear()
        finally:
            tracker.close()
            self._tell(tracker.progress, at_once=True)

    def _tracker(self) -> Tracker | None:
        module, name = _IMPLEMENTATION
        _import()
        make = cast("Callable[..., Tracker]", getattr(importlib.import_module(module), name))
        while True:
            try:
                return make(self._directory, epoch=self._epoch, wake=self._wake.set)
            except BlockingIOError:
                self._tell(Progress(left=0, error="another tracker is still at work on this sweep"))
            time.sleep(_LOCK_S)
            if self._stop or self._eof:
                return None

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        self._stop = True
        self._wake.set()

    def _read(self) -> None:
        for line in sys.stdin:
            self._commands.put(json.loads(line))
            self._wake.set()
        self._eof = True
        self._commands.put(None)
        self._wake.set()

    def _obey(self, tracker: Tracker) -> None:
        while not self._commands.empty():
            command = self._commands.get()
            if command is None:
                self._stop = True
            elif command["do"] == "finish":
                _yield_no_more()
                tracker.finish()
            elif command["do"] == "done_elsewhere":
                tracker.request_elsewhere(self._answer_elsewhere)
            elif command["do"] == "run":
                trial = int(str(command["trial"]))
                tracker.request_run(trial, self._answer_to(trial))

    def _answer_to(self, trial: int) -> Answer:
        def answer(found: RunRef | str) -> None:
            if isinstance(found, str):
                self._say({"run": trial, "error": found})
            else:
                ref = {"run_id": found.run_id, "uri": found.uri, "experiment_id": found.experiment_id}
                self._say({"run": trial, **ref})

        return answer

    def _answer_elsewhere(self, found: Mapping[str, Reused] | str) -> None:
        if isinstance(found, str):
            self._say({"elsewhere": {}, "error": found})
            return
        rest = [(identity, asdict(result)) for identity, result in found.items()]
        while len(rest) > _RESULTS_A_LINE:
            self._say({"elsewhere": dict(rest[:_RESULTS_A_LINE]), "more": True})
            del rest[:_RESULTS_A_LINE]
        self._say({"elsewhere": dict(rest)})

    def _tell(self, progress: Progress, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._told_at >= _TELL_S:
            self._told_at = now
            about = asdict(progress)
            del about["done"]
            self._say(about)

    def _say(self, message: dict[str, object]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


class TrackerProcess:
    """The coordinator's end: starts the process, starts it again if it dies, and asks it things. One event loop's.

    Nothing here waits for MLflow unless it is asked to.

    Args:
        directory: the sweep's.
        epoch: the coordinator's; None: it works for none.
        yields: whether it makes way for trials that run on this machine.
    """

    def __init__(self, directory: Path, epoch: int | None = None, *, yields: bool = True) -> None:
        self._directory = directory
        self._epoch = epoch
        self._yields = yields
        self._child: Child | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._asked: dict[int, list[asyncio.Future[RunRef]]] = {}
        self._asked_elsewhere: asyncio.Future[dict[str, Reused]] | None = None
        self._elsewhere: dict[str, Reused] = {}
        self._progress = Progress(left=0)
        self._finishing = False
        self._stopping = False
        self._spoke = False
        self._ended = asyncio.Event()
        self._hurry = asyncio.Event()

    @property
    def progress(self) -> Progress:
        """What the process said last; ``done`` is true when it has ended after :meth:`finish`."""
        return self._progress

    async def start(self) -> None:
        """Start the process."""
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep())

    async def run_ref(self, trial: int) -> RunRef:
        """The MLflow run of a trial, created now if it does not exist.

        Raises:
            TrackingError: MLflow cannot be reached, or refuses, or the process has ended for good.
        """
        self._check_running()
        future: asyncio.Future[RunRef] = asyncio.get_running_loop().create_future()
        self._asked.setdefault(trial, []).append(future)
        self._send({"do": "run", "trial": trial})
        return await future

    async def done_elsewhere(self, timeout_s: float) -> dict[str, Reused]:
        """The results that other sweeps have of the trials that wait, by identity. One question at a time.

        Raises:
            TrackingError: MLflow cannot be asked, or has not answered in time.
        """
        self._check_running()
        self._elsewhere = {}
        self._asked_elsewhere = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                self._send({"do": "done_elsewhere"})
                return await self._asked_elsewhere
        except TimeoutError:
            raise TrackingError(f"no answer within {timeout_s:g} s") from None
        finally:
            self._asked_elsewhere = None

    async def finish(self, timeout_s: float) -> int:
        """Let the process upload everything and end; returns how many trials were left when the time was over."""
        self._finishing = True
        self._hurry.set()
        self._send({"do": "finish"})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), timeout_s)
        await self.kill()
        return self._progress.left

    async def kill(self) -> None:
        """End the process: politely, by closing its input, then by force. What it has not sent is sent another time."""
        self._finishing = self._stopping = True
        self._hurry.set()
        if self._child is None or self._keeper is None:
            return
        self._child.close()
        try:
            await asyncio.wait_for(asyncio.shield(self._keeper), _KILL_S)
        except TimeoutError:
            self._child.kill()
            await self._keeper

    async def _spawn(self) -> None:
        arguments = [str(self._directory)]
        arguments += [] if self._epoch is None else ["--epoch", str(self._epoch)]
        arguments += ["--yield"] if self._yields else []
        self._spoke = False
        self._child = await Child.start(arguments)

    def _check_running(self) -> None:
        if self._ended.is_set():
            raise TrackingError("the tracker has stopped")

    def _send(self, message: dict[str, object]) -> None:
        if self._child is None:
            raise TrackingError("the tracker is not running")
        self._child.send(message)  # if it is being started again, it is then told again

    async def _keep(self) -> None:
        """Read what the process says; when it dies before its work is done, start it again and ask it again."""
        pause_s = _RESTART_S
        while True:
            assert self._child is not None
            started = time.monotonic()
            async for line in self._child.lines:
                self._heard(json.loads(line))
            code = await self._child.wait()
            self._child.close()
            if code == 0 or self._stopping or (self._finishing and not self._spoke):
                break
            self._progress = replace(
                self._progress, error=f"the tracker died ({code}), see {self._directory / LOG_NAME}"
            )
            pause_s = (
                1.0
                if time.monotonic() - started > _LONGEST_RESTART_S
                else min(2 * pause_s, _LONGEST_RESTART_S)
            )
            await self._pause(pause_s)
            if self._stopping:
                break
            await self._spawn()
            await self._ask_again()
        self._ended.set()
        self._progress = replace(self._progress, done=True)
        self._fail_asked("the tracker has stopped")

    async def _pause(self, pause_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), pause_s)

    async def _ask_again(self) -> None:
        for trial in list(self._asked):
            self._send({"do": "run", "trial": trial})
        if self._asked_elsewhere is not None:
            self._elsewhere = {}
            self._send({"do": "done_elsewhere"})
        if self._finishing:
            self._send({"do": "finish"})

    def _heard(self, message: dict[str, object]) -> None:
        self._spoke = True
        if "left" in message:
            trouble = message["trouble"]
            known = {**message, "trouble": None if trouble is None else Trouble(str(trouble))}
            self._progress = Progress(**cast("dict[str, Any]", known))
            return
        if "elsewhere" in message:
            self._heard_elsewhere(message)
            return
        for future in self._asked.pop(int(str(message["run"])), []):
            if future.done():
                continue
            if "error" in message:
                future.set_exception(TrackingError(str(message["error"])))
            else:
                uri, run_id, experiment = (str(message[key]) for key in ("uri", "run_id", "experiment_id"))
                future.set_result(RunRef(uri=uri, run_id=run_id, experiment_id=experiment))

    def _heard_elsewhere(self, message: dict[str, Any]) -> None:
        asked = self._asked_elsewhere
        self._elsewhere |= {identity: Reused(**each) for identity, each in message["elsewhere"].items()}
        if asked is None or asked.done() or message.get("more"):
            return
        if "error" in message:
            asked.set_exception(TrackingError(message["error"]))
        else:
            asked.set_result(self._elsewhere)

    def _fail_asked(self, why: str) -> None:
        if self._asked_elsewhere is not None and not self._asked_elsewhere.done():
            self._asked_elsewhere.set_exception(TrackingError(why))
        for trial in list(self._asked):
            for future in self._asked.pop(trial):
                if not future.done():
                    future.set_exception(TrackingError(why))


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)  # all is on disk, and Python would take a second to take MLflow apart
