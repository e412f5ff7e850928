"""What user code sees inside of a trial: :func:`report`, :func:`artifact_dir`, :func:`checkpoint_dir`.

Outside of a sweep these do no harm, so that a task function also runs under plain Hydra.
"""

from __future__ import annotations

import json
import numbers
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repro_sweep.errors import ReproSweepError
from repro_sweep.spool import ReportLog


class Context:
    """The running trial's link to its worker: JSON lines over a socket."""

    def __init__(self, channel: socket.socket, directory: Path, attempt: str) -> None:
        self.directory = directory
        self._reports = ReportLog(directory, attempt)
        self._channel = channel
        self._lines = channel.makefile("rb")
        self._lock = threading.Lock()  # user code may report from threads of its own
        self.last: dict[str, float] = {}

    def send(self, **message: object) -> None:
        """Send one message to the worker."""
        with self._lock:
            self._channel.sendall(json.dumps(message).encode() + b"\n")

    def ask(self, **message: object) -> dict[str, Any]:
        """Send one message and wait for its answer.

        Raises:
            ReproSweepError: the worker is gone.
        """
        with self._lock:
            self._channel.sendall(json.dumps(message).encode() + b"\n")
            line = self._lines.readline()
        if not line:
            raise ReproSweepError("the worker of this trial is gone")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send metrics of one step; they also are the final ones unless the task returns others."""
        now = time.time()
        with self._lock, self._reports.turn():
            self.last.update(metrics)
            seq = self._reports.add(step, now, metrics)
            report = {"seq": seq, "step": step, "time": now, "metrics": dict(metrics)}
            self._channel.sendall(json.dumps({"report": report}).encode() + b"\n")


_MOST_STEPS = 2**63
_context: Context | None = None


def enter(context: Context) -> None:
    """Make this process a trial; done once, by the child that the zygote forked."""
    global _context
    _context = context


def report(step: int, /, **metrics: float) -> None:
    """Record metrics of one step of this trial, such as an epoch.

    They appear in MLflow with this step and the time of the call, and the last value of each counts as final unless
    the task returns another. Outside of a sweep only the arguments are checked.

    Args:
        step: number of the step, from 0; later reports should not have smaller ones.
        metrics: numbers by name (Python, numpy, or a tensor with one element).

    Raises:
        TypeError: ``step`` is no whole number, or a metric is no number.
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


def artifact_dir() -> Path:
    """The folder whose files become the artifacts of this trial's MLflow run; it exists.

    Outside of a sweep it is ``artifacts`` in Hydra's output directory, or in the working directory without Hydra.
    """
    return _folder("artifacts")


def checkpoint_dir() -> Path:
    """The folder for this trial's checkpoints; it exists, and is the same for all attempts of the trial.

    Outside of a sweep it is ``checkpoints`` in Hydra's output directory, or in the working directory without Hydra.
    """
    return _folder("checkpoints")


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
