"""What user code sees inside of a trial: :func:`report`, :func:`artifact_dir`, :func:`checkpoint_dir`.

Outside of a sweep these do no harm, so that a task function also runs under plain Hydra.
"""

from __future__ import annotations

import contextlib
import json
import numbers
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repro_sweep.errors import ReproSweepError, TrialInterrupted, TrialPruned
from repro_sweep.spool import ReportLog
from repro_sweep.worker import seeding
from repro_sweep.worker.checkpoints import CHECKPOINTS
from repro_sweep.worker.inbox import Inbox

if TYPE_CHECKING:
    import torch


class Context:
    """The running trial's link to its worker: JSON lines over a socket.

    Args:
        channel: the socket.
        directory: the trial's.
        attempt: the id of this attempt.
        judged: the metric by whose reports trials are pruned; None where none is.
    """

    def __init__(
        self, channel: socket.socket, directory: Path, attempt: str, *, judged: str | None = None
    ) -> None:
        self.directory = directory
        self._reports = ReportLog(directory, attempt)
        self._channel = channel
        self._judged = judged
        self._inbox = Inbox(channel)
        self._lock = threading.Lock()  # user code may report from threads of its own
        self.last: dict[str, float] = {}
        self.seed: int | None = None

    def forked(self) -> None:
        """In a process that the trial has forked, maybe while another of its threads held the lock."""
        self._lock = threading.Lock()
        self._inbox.forked()

    def send(self, **message: object) -> None:
        """Send one message to the worker."""
        with self._lock:
            self._say(message)

    def ask(self, **message: object) -> dict[str, Any]:
        """Send one message and wait for its answer.

        Raises:
            ReproSweepError: the worker is gone.
        """
        # where another process of the trial may wait for a verdict, neither may take the other's answer
        turn = contextlib.nullcontext() if self._judged is None else self._reports.turn()
        with self._lock, turn:
            self._say(message)
            answer = self._inbox.answer()
        if answer is None:
            raise ReproSweepError("the worker of this trial is gone")
        return answer

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send metrics of one step; they also are the final ones unless the task returns others.

        Where trials are pruned, it waits for the verdict. One report of the trial waits at a time, so a verdict is
        always that of the report that waits for it.

        Raises:
            TrialPruned: the trial is not worth going on with.
            TrialInterrupted: its worker must leave.
        """
        now = time.time()
        with self._lock, self._reports.turn():
            self.last.update(metrics)
            seq = self._reports.add(step, now, metrics)
            report = {"seq": seq, "step": step, "time": now, "metrics": dict(metrics)}
            self._inbox.hear()
            if self._judged is None:
                self._say({"report": report})
            else:
                asks = self._judged in metrics and not self._inbox.stop
                self._say({"report": report, "asks": asks})
                if asks:
                    self._inbox.await_verdict(seq)
                if self._inbox.stop:
                    raise TrialPruned(f"step {step}: the trial is not worth going on with")
            if self._inbox.leave:
                raise TrialInterrupted(
                    f"step {step}: its worker must leave, another one goes on with the trial"
                )

    @property
    def interrupted(self) -> bool:
        """Whether the trial was told that its worker must leave."""
        return self._inbox.leave

    def _say(self, message: Mapping[str, object]) -> None:
        self._channel.sendall(json.dumps(message).encode() + b"\n")


class Follower(Context):
    """The link of a rank that is not the first one of its trial: what it reports goes nowhere."""

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Rank 0 reports, and hears whether to go on; when it ends, so does this one."""
        del step
        self.last.update(metrics)


_MOST_STEPS = 2**63
_context: Context | None = None


def enter(context: Context) -> None:
    """Make this process a trial; done once, by the child that the zygote forked."""
    global _context
    _context = context
    os.register_at_fork(after_in_child=context.forked)


def report(step: int, /, **metrics: float) -> None:
    """Record metrics of one step of this trial, such as an epoch.

    They appear in MLflow with this step and the time of the call, and the last value of each counts as final unless
    the task returns another. Outside of a sweep only the arguments are checked.

    Args:
        step: number of the step, from 0; later reports should not have smaller ones.
        metrics: numbers by name (Python, numpy, or a tensor with one element).

    Raises:
        TypeError: ``step`` is no whole number, or a metric is no number.
        TrialPruned: the sweep has a pruner, and this trial is not worth going on with. It is raised again by each later
            call; a task that lets it through ends as PRUNED, with the last value of each metric.
        TrialInterrupted: the trial's worker must leave soon, as its time on the cluster is over. The trial goes on
            elsewhere, from its checkpoints.
    """
    if not isinstance(step, numbers.Integral) or isinstance(step, bool):
        raise TypeError(f"report: step must be a whole number, got {step!r}")
    if not -_MOST_STEPS <= step < _MOST_STEPS:
        raise TypeError(f"report: step must fit into 64 bits, got {step!r}")
    numbers_ = {
        metric_name(name): as_number(value, f"report: metric '{name}'") for name, value in metrics.items()
    }
    if _context is not None:
        _context.report(int(step), numbers_)


def seed() -> int | None:
    """What this trial's random generators were seeded with: its config's ``seed``, or one that was derived for it.

    None outside of a sweep, and where ``sweep.determinism.seed`` is null.
    """
    return None if _context is None else _context.seed


def generator(device: str = "cpu") -> torch.Generator:
    """A new ``torch.Generator`` with this trial's seed, such as for a ``DataLoader``.

    Where there is none (see :func:`seed`) it starts from the seed that torch has (``torch.initial_seed()``).
    """
    made: torch.Generator = seeding.generator(seed(), device)
    return made


def artifact_dir() -> Path:
    """The folder whose files become the artifacts of this trial's MLflow run; it exists.

    Outside of a sweep it is ``artifacts`` in Hydra's output directory, or in the working directory without Hydra.
    """
    return _folder("artifacts")


def checkpoint_dir() -> Path:
    """The folder for this trial's checkpoints; it exists, and is the same for all attempts of the trial.

    Outside of a sweep it is ``checkpoints`` in Hydra's output directory, or in the working directory without Hydra.
    """
    return _folder(CHECKPOINTS)


def metric_name(name: object) -> str:
    """A metric's name as text that JSON and MLflow can hold."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def as_number(value: object, what: str) -> float:
    """A metric as a float: Python and numpy numbers, and tensors or arrays with one element.

    Raises:
        TypeError: it is no number.
    """
    if isinstance(value, numbers.Real):
        return float(value)
    item = getattr(value, "item", None)  # numpy, torch and jax scalars
    if callable(item):
        try:
            inner = item()
        except (ValueError, RuntimeError) as error:
            raise TypeError(f"{what} must be a number, got {type(value).__name__}: {error}") from error
        if isinstance(inner, numbers.Real):
            return float(inner)
    raise TypeError(f"{what} must be a number, got {type(value).__name__}")


def _folder(name: str) -> Path:
    if _context is not None:
        base = _context.directory
    else:
        from hydra.core.hydra_config import HydraConfig

        base = Path(HydraConfig.get().runtime.output_dir if HydraConfig.initialized() else ".")
    folder = base.absolute() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
