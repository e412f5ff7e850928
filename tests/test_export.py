"""What is made of trials from MLflow alone: a folder that runs without repro-sweep, a comparison, a card."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from helpers import Project, environment, projects

from repro_sweep.card import _UNKNOWN

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"  # MLflow's own use of SQLAlchemy
)
TASKS = """
    import os
    import random

    import hydra

    import repro_sweep


    def train(cfg):
        for step in range(2):
            repro_sweep.report(step, loss=cfg.model.size / 7 + random.random())
        (repro_sweep.artifact_dir() / "model.txt").write_text("weights")
        return {"score": cfg.model.size * random.random(), "threads": float(os.environ["OMP_NUM_THREADS"])}


    wrapped = hydra.main(version_base="1.3", config_path="conf", config_name="config")(train)
"""
FILES = {
    "conf/config.yaml": "defaults: [model: small, _self_]\nseed: 0\n",
    "conf/model/small.yaml": "size: 3\n",
    "conf/model/large.yaml": "size: 30\n",
    "tasks.py": TASKS,
    "data.txt": "1 2 3\n",
    ".gitignore": "mlflow.db*\nmlartifacts\nlocal.txt\n",
    "local.txt": "not in git",
}
SWEEP = (
    "+sweep=default", "sweep.task=tasks.wrapped", "sweep.name=study", "sweep.metric=score", "sweep.direction=maximize",
    "+sweep.data.train=data.txt", "model=small,large", "+sweep.repeats.seed='range(2)'",
)  # fmt: skip


@dataclass
class Study:
    """A sweep that has run twice, the second time with other code, and a place to work in."""

    source: Project
    place: Project
    uri: str

    def run(self, *arguments: str, status: int = 0) -> str:
        """What a command prints, in the place."""
        done = self.place.run(*arguments, "--uri", self.uri)
        assert done.returncode == status, done.stderr + done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Study]:
    """Four trials, and four more of another sweep after a change of the code, of the data and of a default."""
    folder = tmp_path_factory.mktemp("exported")
    store = folder / "mlflow.db"
    shutil.copy(empty_store, store)
    for make in projects(folder, None):
        source = make(FILES, name="source")
        git = ["git", "-C", str(source.root), "-c", "user.name=t", "-c", "user.email=t@example.org"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
            subprocess.run([*git, *command], check=True)
        uri = f"sqlite:///{store}"
        done = source.run(*SWEEP, f"sweep.tracking.uri={uri}")
        assert done.returncode == 0, done.stderr
        text = (source.root / "tasks.py").read_text()
        (source.root / "tasks.py").write_text(text.replace("size / 7", "size / 9"))
        (source.root / "data.txt").write_text("1 2 4\n")
        (source.root / "conf/model/large.yaml").write_text("size: 31\n")
        done = source.run(*SWEEP, f"sweep.tracking.uri={uri}", "sweep.name=second")
        assert done.returncode == 0, done.stderr
        yield Study(source, make({".keep": ""}, name="place"), uri)


# --- export ------------------------------------------------------------------------------------------------------


def bare_python(folder: Path) -> dict[str, str | None]:
    """An environment in which OmegaConf and what a task imports can be imported, but not repro-sweep."""
    for name in ("omegaconf", "antlr4-python3-runtime", "pyyaml", "hydra-core", "packaging"):
        for file in metadata.files(name) or ():
            if file.parts[0] in {"..", "__pycache__"}:
                continue
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), target)
    return {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": None}


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_an_exported_trial_runs_without_repro_sweep(study: Study, tmp_path: Path, form: str) -> None:
    """Its script finds everything in its folder, and gets the same bits."""
    target = tmp_path / ("trial" if form == "folder" else "trial.zip")
    assert study.run("export", "study/3", "--output", str(target)).strip() == str(target)
    if form == "zip":
        with zipfile.ZipFile(target) as file:
            file.extractall(tmp_path / "unpacked")
        target = tmp_path / "unpacked" / "trial"
    names = {path.name for path in target.iterdir()}
    assert names >= {
        "README.md", "run.py", "config.yaml", "overrides.yaml", "requirements.txt", "record.json", "data.json",
        "source", "stand_in",
    }  # fmt: skip
    python = Path(sys.base_prefix) / "bin" / "python3"
    env = environment(bare_python(tmp_path / "site"))
    missing = subprocess.run(
        [python, "-S", "-c", "import repro_sweep"], env=env, capture_output=True, cwd=tmp_path
    )
    assert missing.returncode != 0
    done = subprocess.run(
        [python, "-S", target / "run.py"], env=env, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "score: " in done.stdout
    assert "differs" not in done.stdout
    assert (target / "artifacts" / "model.txt").read_text() == "weights"


def test_a_changed_export_says_that_it_differs(study: Study, tmp_path: Path) -> None:
    """So its script is a check, too."""
    study.run("export", "study/3", "--output", str(tmp_path / "trial"))
    path = tmp_path / "trial" / "config.yaml"
    path.write_text(path.read_text().replace("size: 30", "size: 29"))
    done = subprocess.run(
        [sys.executable, tmp_path / "trial" / "run.py"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "<- differs" in done.stdout


def test_the_readme_says_what_is_needed_and_what_is_not_there(study: Study, tmp_path: Path) -> None:
    """Python's version, the data, and what git ignores."""
    done = study.place.run("export", "study/0", "--output", str(tmp_path / "trial"), "--uri", study.uri)
    assert "not in it: local.txt (git ignores it)" in done.stderr
    text = (tmp_path / "trial" / "README.md").read_text()
    assert f"Python {sys.version.split()[0]}" in text
    assert f"- `train`: {study.source.root}/data.txt, 1 files" in text
    assert "- local.txt (git ignores it)" in text
    assert "tasks.wrapped" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("study/9",), "sweep 'study' has no trial 9"),
        (("study/1", "--output", ".keep"), ".keep exists already"),
        (("study/1", "--output", ".keep/x"), ".keep/x cannot be written"),
    ],
)
def test_wrong_input_to_export_is_one_line(study: Study, arguments: tuple[str, ...], said: str) -> None:
    done = study.place.run("export", *arguments, "--uri", study.uri)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert said in line


# --- diff --------------------------------------------------------------------------------------------------------


def test_a_trial_does_not_differ_from_itself(study: Study) -> None:
    said = study.run("diff", "study/1", "study/1")
    assert said.splitlines() == [
        f"{each}: the same" for each in ("config", "code", "environment", "data", "metrics")
    ]


def test_what_two_trials_do_not_have_in_common_stands_side_by_side(study: Study) -> None:
    """Config, the lines of code, data, final metrics, and where they began to differ."""
    found = json.loads(study.run("diff", "study/3", "second/3", "--format", "json", status=1))
    by = {name: {line["what"]: line for line in lines} for name, lines in found.items()}
    assert (by["config"]["model.size"]["one"], by["config"]["model.size"]["other"]) == ("30", "31")
    code = by["code"]["tasks.py"]["text"]
    assert "-        repro_sweep.report(step, loss=cfg.model.size / 7 + random.random())" in code
    assert "+        repro_sweep.report(step, loss=cfg.model.size / 9 + random.random())" in code
    assert set(by["code"]) == {"tasks.py", "conf/model/large.yaml", "data.txt"}
    assert by["data"]["train"]["one"] != by["data"]["train"]["other"]
    assert "first: loss at step 0" in by["metrics"]
    assert by["environment"] == {}
    text = study.run("diff", "study/3", "second/3", status=1)
    assert "model.size" in text
    assert "environment: the same" in text


# --- card --------------------------------------------------------------------------------------------------------


def test_the_card_has_what_the_checklist_asks_for(study: Study, tmp_path: Path) -> None:
    """Space, runs, choice, seeds, results with variation, compute, code, data, environment; and what is unknown."""
    study.run("card", "study", "--output", str(tmp_path / "CARD.md"))
    text = (tmp_path / "CARD.md").read_text()
    commit = subprocess.run(
        ["git", "-C", str(study.source.root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    for said in (
        "# Reproducibility card: study",
        "| `model` | `small`, `large` | 2 |",
        "| `seed` | `0`, `1` | 2 |",
        "- trials: 4 (4 COMPLETE)",
        "- ranked by: score (maximize), the mean over the repeats of each point",
        "- repeats of a point: 2 points with 2",
        "- seeds of the trials: 0, 1",
        "| 1 | ",
        " ± ",
        "- GPU hours: 0 (0 GPUs a trial)",
        f"git commit {commit}, clean",
        f"- `train`: {study.source.root}/data.txt, `",
        "No trial was run again",
    ):
        assert said in text, (said, text)
    assert "- GPU: none\n" in text


def test_a_card_invents_nothing(study: Study) -> None:
    """Of trials without a record it says that it is unknown what they ran on."""
    import mlflow

    client = mlflow.MlflowClient(study.uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    for run in client.search_runs(
        experiments, "tags.`repro_sweep.sweep` = 'second' and tags.`repro_sweep.kind` = 'trial'"
    ):
        for key in ("snapshot", "cpu", "seed", "python"):
            client.delete_tag(run.info.run_id, f"repro_sweep.{key}")
    text = study.run("card", "second")
    assert f"- seeds of the trials: {_UNKNOWN}" in text
    assert f"- CPU: {_UNKNOWN}" in text
    assert f"- GPU: {_UNKNOWN}" in text
    assert "- GPU hours: unknown" in text
    assert f"## Code\n\n{_UNKNOWN}" in text
