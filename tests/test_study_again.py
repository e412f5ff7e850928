"""The digits study is bitwise deterministic on the CPU: it comes out the same in another place, order and slots."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import Project, projects

from repro_sweep import TrialState

ROOT = Path(__file__).parents[1]
GRID = (
    "+sweep=default", "sweep.name=study", "sweep.task=sweeps.digits.train", "sweep.metric=val_accuracy",
    "sweep.determinism.strict=true", "model=lstm,bi_lstm", "epochs=2", "+sweep.repeats.seed='range(25)'",
)  # fmt: skip


def copy_study(project: Project) -> None:
    """The repository's study."""
    for name in ("conf", "sweeps"):
        shutil.copytree(ROOT / name, project.root / name, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[SimpleNamespace]:
    """Fifty trials from a repository with a dirty and an untracked file, which is gone afterwards."""
    folder = tmp_path_factory.mktemp("study")
    store = folder / "store"
    store.mkdir()
    shutil.copy(empty_store, store / "mlflow.db")
    uri = f"sqlite:///{store / 'mlflow.db'}"
    for make in projects(folder, None):
        first = make({}, name="first")
        copy_study(first)
        git = ["git", "-C", str(first.root), "-c", "user.name=t", "-c", "user.email=t@example.org"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
            subprocess.run([*git, *command], check=True)
        digits = first.root / "sweeps" / "digits.py"
        text = digits.read_text()
        assert text.count("BRIGHTEST = 16.0") == 1
        digits.write_text(text.replace("BRIGHTEST = 16.0", "from sweeps.scale import BRIGHTEST"))
        (first.root / "sweeps" / "scale.py").write_text("BRIGHTEST = 15.0\n")
        done = first.run(*GRID, f"sweep.tracking.uri={uri}", "sweep.executor.slots=2")
        assert done.returncode == 0, done.stderr
        assert first.sweep("study").states() == {TrialState.COMPLETE: 50}
        shutil.rmtree(first.root)
        yield SimpleNamespace(second=make({"a/b/.keep": ""}, name="second"), uri=uri)


def test_fifty_of_fifty_trials_are_exact(study: SimpleNamespace) -> None:
    """On another path, with three slots instead of two: from what MLflow has, as nothing else is left."""
    done = study.second.run(
        "reproduce",
        "study",
        "--all",
        "--format",
        "json",
        "--uri",
        study.uri,
        "sweep.executor.slots=3",
    )
    assert done.returncode == 0, done.stderr + done.stdout[-3000:]
    said = json.loads(done.stdout)
    assert [each["verdict"] for each in said] == ["EXACT"] * 50
    assert min(each["values"] for each in said) >= 8
