"""Stands in for repro-sweep in an exported trial: what a task calls does what it does outside of a sweep."""

import json
import numbers
import random
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parents[1]
_TRIAL = json.loads((_HERE / "trial.json").read_text(encoding="utf-8"))
_SEED = _TRIAL["seed"]
_UNTIL = _TRIAL["until"]  # of a trial that was pruned: the last step of each metric
_last = {}


class ReproSweepError(Exception):
    """Never raised here."""


class TrialPruned(Exception):  # noqa: N818  (as it is called there)
    """Never raised here."""


class TrialInterrupted(Exception):  # noqa: N818
    """Never raised here."""


def report(step, /, **metrics):
    """Print metrics of one step; the last value of each is compared at the end."""
    if not isinstance(step, numbers.Integral) or isinstance(step, bool):
        raise TypeError(f"report: step must be a whole number, got {step!r}")
    values = {_name(name): _number(value, f"report: metric '{name}'") for name, value in metrics.items()}
    print(f"step {step}: {', '.join(f'{name}={value!r}' for name, value in values.items())}", flush=True)
    _last.update(
        {
            name: value
            for name, value in values.items()
            if _UNTIL is None or (name in _UNTIL and step <= _UNTIL[name])
        }
    )


def artifact_dir():
    """The folder ``artifacts`` beside the source."""
    return _folder("artifacts")


def checkpoint_dir():
    """The folder ``checkpoints`` beside the source; remove it to begin anew."""
    return _folder("checkpoints")


def seed():
    """The trial's seed."""
    return _SEED


def generator(device="cpu"):
    """A new ``torch.Generator`` with the trial's seed."""
    import torch

    made = torch.Generator(device=device)
    made.manual_seed(torch.initial_seed() if _SEED is None else _SEED)
    return made


def worker_init_fn(worker_id):
    """Seed Python and numpy in a worker process of a ``DataLoader``."""
    del worker_id
    import torch

    value = torch.initial_seed() % 2**32
    random.seed(value)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(value)


def __getattr__(name):
    raise AttributeError(
        f"repro_sweep.{name} is not in an exported trial: `repro-sweep reproduce` can run it again"
    )


def _name(name):
    return str(name).encode("utf-8", "backslashreplace").decode()


def _number(value, what):
    """A metric as a float: Python and numpy numbers, and tensors or arrays with one element."""
    if isinstance(value, numbers.Real):
        return float(value)
    item = getattr(value, "item", None)
    if callable(item):
        try:
            value = item()
        except (ValueError, RuntimeError) as error:
            raise TypeError(f"{what} must be a number: {error}") from error
        if isinstance(value, numbers.Real):
            return float(value)
    raise TypeError(f"{what} must be a number, got {type(value).__name__}")


def _folder(name):
    folder = _HERE / name
    folder.mkdir(exist_ok=True)
    return folder
