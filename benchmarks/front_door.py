"""``compose`` and ``startup``: what happens before the first trial starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Project
from benchmarks.report import OURS, Row, Table, Target


def compose(folder: Path, *, quick: bool) -> Table:
    """Milliseconds to compose one trial's config; a grid of 10,000 points, expanded, checked and started."""
    project = Project(folder / "few", body="pass")
    count = 20 if quick else 100
    command = [sys.executable, "-m", "benchmarks.front_door", str(project.folder / "conf"), str(count)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=project.folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise harness.BenchmarkError(done.stderr)
    figures = json.loads(done.stdout)
    side = 30 if quick else 100
    grid = Project(folder / "many", params=f"{{x: range({side}), y: range({side})}}").sweep(
        side * side, "sweep.executor.slots=2", only_start=True
    )
    return Table(
        title="compose: before the first trial",
        text=f"A config of 25 values in 4 groups, one changed (`optimizer.lr=…`), mean of {count} different ones."
        f" A grid of {side * side:,} points took {grid.first_start_s:.1f} s from the command to its first trial's"
        f" start, with a peak of {grid.peak_rss_mb:.0f} MB in the front door's process.",
        unit="ms a config",
        rows=[
            Row(system=OURS, value=figures["ours_ms"], note="`Composer.compose`"),
            Row(system="Hydra", value=figures["hydra_ms"], note="`ConfigLoader.load_sweep_config`"),
        ],
        targets=[
            Target(what="a value-only change", value=figures["ours_ms"], limit=1.0, unit="ms"),
            Target(
                what=f"{side * side:,} points, the first trial started after",
                value=grid.first_start_s,
                limit=20.0,
                unit="s",
            ),
            Target(what="peak memory of that", value=grid.peak_rss_mb, limit=500.0, unit="MB"),
        ],
    )


def startup(folder: Path, *, quick: bool) -> Table:
    """Wall time of the shortest commands."""
    del folder
    count = 3 if quick else 10
    bare = harness.best_of(count, [sys.executable, "-c", "pass"])
    shown = harness.best_of(count, [*harness.front_door(), "--help"])
    imported = harness.best_of(count, [sys.executable, "-c", "import repro_sweep"])
    return Table(
        title="startup",
        text=f"Wall time, best of {count}.",
        unit="s",
        rows=[
            Row(system=OURS, value=shown, note="`--help`"),
            Row(system="`import repro_sweep`", value=imported),
        ],
        ideal=bare,
        ideal_is="`python -c pass`",
        targets=[
            Target(what="`repro-sweep --help`", value=shown, limit=0.3, unit="s"),
            Target(what="`import repro_sweep`", value=imported, limit=0.3, unit="s"),
        ],
    )


def _measure(conf: str, count: int) -> dict[str, float]:
    """Compose the same changes our way and Hydra's; they must be equal."""
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from repro_sweep.config.compose import Composer, composition_of

    hydra = Hydra.create_main_hydra2(task_name="task", config_search_path=create_config_search_path(conf))
    master = hydra.compose_config("config", [], run_mode=RunMode.MULTIRUN, with_log_configuration=False)
    loader = hydra.config_loader
    composer = Composer(composition_of(master, loader, strip=()), loader=loader)
    changes = [[f"optimizer.lr={number / 1000}"] for number in range(1, count + 1)]
    composer.compose(["optimizer.lr=1"])  # the base is composed once a sweep
    began = time.perf_counter()
    ours = [composer.compose(change) for change in changes]
    between = time.perf_counter()
    theirs = [loader.load_sweep_config(master, change) for change in changes]
    ended = time.perf_counter()
    for mine, other in zip(ours, theirs, strict=True):
        if OmegaConf.to_yaml(mine) != OmegaConf.to_yaml(OmegaConf.masked_copy(other, list(mine))):
            raise AssertionError("the two compositions differ")
    return {"ours_ms": (between - began) / count * 1000, "hydra_ms": (ended - between) / count * 1000}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]))))
