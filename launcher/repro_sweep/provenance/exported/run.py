"""Runs the trial in this folder again; ``stand_in`` takes the place of repro-sweep. See README.md."""

import importlib
import importlib.util
import json
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRIAL = json.loads((HERE / "trial.json").read_text(encoding="utf-8"))


def main() -> int:
    """Run the task with its config, and compare its final metrics with the recorded ones."""
    missing = {key: value for key, value in TRIAL["variables"].items() if os.environ.get(key) != value}
    if missing:  # some of them must be there when Python starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | missing)  # noqa: S606
    # the stand-in goes before a repro-sweep that is installed, which would know nothing of the trial
    sys.path[:0] = [str(HERE / path) for path in ("stand_in", *TRIAL["sys_path"])]
    os.chdir(HERE / TRIAL["cwd"])
    seed(TRIAL["seed_at_import"])
    task = load()
    from omegaconf import OmegaConf

    config = OmegaConf.load(HERE / "config.yaml")
    seed(TRIAL["seed"])
    return compare({name: float(was) for name, was in TRIAL["metrics"].items()}, final_metrics(task, config))


def compare(before, now) -> int:
    """Print the metrics side by side; the exit status is 0 if all are the same bits."""
    if not before:
        print("no metrics were recorded that can be compared")
    same = bool(before)
    for name in [*before, *(name for name in now if name not in before)]:
        was, here = (repr(each[name]) if name in each else "nothing" for each in (before, now))
        same = same and was == here
        mark = "" if was == here else "  <- missing" if name not in now else "  <- differs"
        print(f"{name}: {was} before, {here} now{mark}")
    for name, was in TRIAL["logged"].items():
        print(f"{name}: {was} before; the task has logged it with MLflow: not compared")
    return 0 if same else 1


def final_metrics(task, config):
    """Call the task: what it returns goes before what it has reported last, as in a sweep."""
    from omegaconf import ListConfig

    import repro_sweep

    pruned = TRIAL["until"] is not None
    try:
        returned = task(config)
    except Exception as error:
        if not (pruned and is_pruning(error)):
            raise
    if pruned:  # it did not come to return anything
        return dict(repro_sweep._last)
    wanted = TRIAL["objectives"]
    if returned is None:
        returned = {}
    elif isinstance(returned, (list, tuple, ListConfig)) and len(returned) == len(wanted):
        returned = dict(zip(wanted, returned, strict=True))
    elif not isinstance(returned, Mapping):
        returned = {wanted[0]: returned}
    found = dict(repro_sweep._last)
    for name, value in returned.items():
        try:
            found[repro_sweep._name(name)] = repro_sweep._number(value, f"returned metric '{name}'")
        except TypeError as error:
            print(f"{error}: it is not recorded")
    return found


def is_pruning(error) -> bool:
    """Whether the task gave its trial up, by our exception or Optuna's; Hydra may have wrapped it."""
    while error is not None and type(error).__name__ != "TrialPruned":
        error = error.__cause__
    return error is not None


def load():
    """The task function; what hydra.main has wrapped is unwrapped."""
    if TRIAL["module"] is not None:
        found = importlib.import_module(TRIAL["module"])
    else:
        spec = importlib.util.spec_from_file_location("task_of_the_trial", HERE / TRIAL["file"])
        found = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = found
        spec.loader.exec_module(found)
    for name in TRIAL["qualname"].split("."):
        found = getattr(found, name)
    return getattr(found, "__wrapped__", found)


def seed(value) -> None:
    """Seed what the trial's process had seeded."""
    if value is None:
        return
    random.seed(value)
    if importlib.util.find_spec("numpy") is not None:
        import numpy as np

        np.random.seed(value % 2**32)
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.manual_seed(value)
        torch.set_num_threads(TRIAL["threads"])
        if TRIAL["strict"]:
            torch.use_deterministic_algorithms(True, warn_only=TRIAL["strict"] == "warn")
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True


if __name__ == "__main__":
    sys.exit(main())
