"""Runs the trial in this folder again, without repro-sweep: see README.md."""

import importlib
import importlib.util
import json
import math
import os
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRIAL = json.loads((HERE / "trial.json").read_text(encoding="utf-8"))


def main() -> int:
    """Run the task with its config, and compare its final metrics with the recorded ones."""
    missing = {key: value for key, value in TRIAL["variables"].items() if os.environ.get(key) != value}
    if missing:  # some of them must be there when Python starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | missing)  # noqa: S606
    sys.path[:0] = [str(HERE / path) for path in TRIAL["sys_path"]]
    if importlib.util.find_spec("repro_sweep") is None:
        sys.path.append(str(HERE / "stand_in"))
    os.chdir(HERE / TRIAL["cwd"])
    task = load()
    from omegaconf import OmegaConf

    config = OmegaConf.load(HERE / "config.yaml")
    seed()
    returned = task(config)
    found = returned if isinstance(returned, dict) else {"objective": returned}
    same = True
    for name, was in TRIAL["metrics"].items():
        now = found.get(name)
        equal = now is not None and (float(now) == was or (math.isnan(float(now)) and math.isnan(was)))
        same = same and (equal or now is None)
        print(f"{name}: {was!r} before, {now!r} now{'' if equal or now is None else '  <- differs'}")
    return 0 if same else 1


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


def seed() -> None:
    """Seed what the trial's process had seeded."""
    if TRIAL["seed"] is None:
        return
    random.seed(TRIAL["seed"])
    if importlib.util.find_spec("numpy") is not None:
        import numpy as np

        np.random.seed(TRIAL["seed"] % 2**32)
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.manual_seed(TRIAL["seed"])
        torch.set_num_threads(TRIAL["threads"])
        if TRIAL["strict"]:
            torch.use_deterministic_algorithms(True, warn_only=TRIAL["strict"] == "warn")
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True


if __name__ == "__main__":
    sys.exit(main())
