"""The main job, from a wheel in a fresh environment, with the source tree out of reach."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
HANGS_S = 900  # a guard: how long the main job may take is measured elsewhere

LOOK = """
import json, sys
import repro_sweep
from omegaconf import OmegaConf
from repro_sweep.ranking import rank

name = "optimizer_grid"
trials = repro_sweep.trials(name)
best = repro_sweep.best_trial(name)
frame = repro_sweep.leaderboard(name)
print(json.dumps({
    "home": repro_sweep.__file__,
    "states": [trial.state for trial in trials],
    "best": {
        "number": best.number, "overrides": best.overrides, "metrics": best.metrics, "state": best.state,
        "config": OmegaConf.to_container(best.config), "typed": type(best.config).__name__,
        "picture": best.artifact("confusion_matrix.png").read_bytes()[:4].hex(),
        "model": best.artifact("model.pt").stat().st_size,
    },
    "points": len(frame), "columns": list(frame.columns), "top_mean": float(frame["val_accuracy"].iloc[0]),
    "top_n": int(frame["n"].iloc[0]),
    "betas": sorted({trial.params["optimizer"] for trial in trials if "optimizer.beta1" in trial.params}),
}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel and its torch extra."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    requirement = f"repro-sweep[torch] @ {wheel.as_uri()}"
    install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*install, requirement], check=True)
    return python


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's project: the study's config and code, and nothing else of the repository."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("conf", "sweeps"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def finished(python: Path, project: Path) -> subprocess.CompletedProcess[str]:
    """The main job, run as a user runs it."""
    command = [str(python.with_name("repro-sweep")), "+sweep=optimizer_grid"]
    return subprocess.run(
        command, cwd=project, env=environment(), capture_output=True, text=True, timeout=HANGS_S
    )


@pytest.fixture(scope="module")
def seen(python: Path, project: Path, finished: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What the Python API says of it, in a folder from which only the tracking store can be reached."""
    assert finished.returncode == 0, finished.stderr
    shutil.rmtree(project / "multirun")
    env = environment() | {"MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}"}
    look = [str(python), "-P", "-c", LOOK]
    done = subprocess.run(look, cwd=project.parent, env=env, capture_output=True, text=True, timeout=HANGS_S)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def environment() -> dict[str, str]:
    """This process's environment without what could lead to the source tree or to another MLflow."""
    hidden = ("PYTHONPATH", "MLFLOW_TRACKING_URI", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if key not in hidden}


@pytest.mark.timeout(1500)
def test_the_main_job_ends_in_a_ranked_table(finished: subprocess.CompletedProcess[str]) -> None:
    assert finished.returncode == 0, finished.stderr
    title, *table = finished.stdout.strip().splitlines()
    assert title == "by val_accuracy, maximize:"
    assert table[0].split()[0] == "#"
    assert "val_accuracy" in table[0]
    assert table[1].split()[0] == "1"
    assert "optimizer_grid: 48 complete; slots" in finished.stdout
    assert "see it in a browser: repro-sweep ui optimizer_grid" in finished.stdout
    assert "48 waiting" in finished.stderr


@pytest.mark.timeout(1500)
def test_the_best_trial_is_one_line_of_python_away_without_the_sweeps_directory(seen: dict[str, Any]) -> None:
    assert "site-packages" in seen["home"]
    best = seen["best"]
    assert best["state"] == "COMPLETE"
    assert best["typed"] == "DictConfig"
    chosen = dict(override.split("=") for override in best["overrides"])
    assert best["config"]["optimizer"]["name"] == chosen["optimizer"]
    assert best["config"]["optimizer"]["lr"] == float(chosen["optimizer.lr"])
    assert best["config"]["seed"] == int(chosen["seed"])
    assert "sweep" not in best["config"]
    assert best["picture"] == b"\x89PNG".hex()
    assert best["model"] > 10_000


@pytest.mark.timeout(1500)
def test_the_study_learns_to_read_digits(seen: dict[str, Any]) -> None:
    assert seen["states"] == ["COMPLETE"] * 48
    assert seen["points"] == 16
    assert seen["top_n"] == 3
    assert seen["top_mean"] > 0.95
    assert seen["best"]["metrics"]["test_accuracy"] > 0.95


@pytest.mark.timeout(1500)
def test_parameters_exist_only_with_their_choice(seen: dict[str, Any]) -> None:
    assert seen["betas"] == ["Adam"]
