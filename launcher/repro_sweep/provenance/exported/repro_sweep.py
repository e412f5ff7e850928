"""Stands in for repro-sweep where it is not installed: what a task calls does what it does outside of a sweep."""

import json
import random
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parents[1]
_SEED = json.loads((_HERE / "trial.json").read_text(encoding="utf-8"))["seed"]


class TrialPruned(Exception):  # noqa: N818  (as it is called there)
    """Never raised here."""


class TrialInterrupted(Exception):  # noqa: N818
    """Never raised here."""


def report(step, /, **metrics):
    """Print metrics of one step."""
    values = ", ".join(f"{name}={float(value)!r}" for name, value in metrics.items())
    print(f"step {step}: {values}", flush=True)


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


def _folder(name):
    folder = _HERE / name
    folder.mkdir(exist_ok=True)
    return folder
