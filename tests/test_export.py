"""What is made of trials from MLflow alone: a folder that runs without repro-sweep, a comparison, a card."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from helpers import Project, environment, projects

from repro_sweep import originals
from repro_sweep.card import _UNKNOWN
from repro_sweep.provenance.archive import unpack

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
        """What a command prints, in the place, far west of Greenwich: zip files know no time before 1980."""
        done = self.place.run(*arguments, "--uri", self.uri, env={"TZ": "Etc/GMT+12"})
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
        (source.root / "weights.bin").write_bytes(b"\xff\x01")
        git = ["git", "-C", str(source.root), "-c", "user.name=t", "-c", "user.email=t@example.org"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
            subprocess.run([*git, *command], check=True)
        uri = f"sqlite:///{store}"
        done = source.run(*SWEEP, f"sweep.tracking.uri={uri}")
        assert done.returncode == 0, done.stderr
        text = (source.root / "tasks.py").read_text()
        (source.root / "tasks.py").write_text(text.replace("size / 7", "size / 9"))
        (source.root / "data.txt").write_text("1 2 4\n")
        (source.root / "weights.bin").write_bytes(b"\xff\x02")
        (source.root / "conf/model/large.yaml").write_text("size: 31\n")
        done = source.run(*SWEEP, f"sweep.tracking.uri={uri}", "sweep.name=second")
        assert done.returncode == 0, done.stderr
        yield Study(source, make({".keep": ""}, name="place"), uri)


ENDINGS = """
    import os

    import hydra

    import repro_sweep


    def train(cfg):
        value = cfg.value + repro_sweep.seed()
        if cfg.kind == "number":
            repro_sweep.report(0, loss=value / 3)
            return value
        if cfg.kind == "reported":
            for step in range(3):
                repro_sweep.report(step, score=value / (step + 3), loss=float(cfg.get("loss", "nan")))
        if cfg.kind == "logged":
            import mlflow

            if "MLFLOW_TRACKING_URI" in os.environ:
                mlflow.log_metric("own", value)
            return {"score": value}
        if cfg.kind == "pruned":
            for step in range(4):
                repro_sweep.report(step, score=value + step)
                if step == 1 and "PRUNE_IT" in os.environ:
                    raise repro_sweep.TrialPruned


    wrapped = hydra.main(version_base="1.3", config_path="conf", config_name="config")(train)
"""


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Study]:
    """Tasks whose results come about in each way; 0 to 3, and 0 again as 4 with other data and resources."""
    folder = tmp_path_factory.mktemp("endings")
    shutil.copy(empty_store, folder / "mlflow.db")
    (folder / "outside.txt").write_text("1")
    files = {"conf/config.yaml": "seed: 7\nvalue: 1.0\nkind: number\n", "tasks.py": ENDINGS}
    for make in projects(folder, None):
        source = make(files, name="source")
        uri = f"sqlite:///{folder}/mlflow.db"
        command = (
            "+sweep=default", "sweep.task=tasks.wrapped", "sweep.name=endings", "sweep.metric=score",
            f"sweep.tracking.uri={uri}", f"+sweep.data.train={folder}/outside.txt",
        )  # fmt: skip
        done = source.run(*command, "kind=number,reported,logged,pruned", env={"PRUNE_IT": "1"})
        assert done.returncode == 0, done.stderr
        (folder / "outside.txt").write_text("2")
        done = source.run(*command, "kind=number", "sweep.resources.cpus_per_trial=2")
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


def run_export(target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, target / "run.py"], env=environment(), capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("number", "change", "said"),
    [
        (0, ("value: 1.0", "value: 99.0"), "score: 8.0 before, 106.0 now  <- differs"),
        (0, ("kind: number", "kind: none"), "score: 8.0 before, nothing now  <- missing"),
        (1, ("value: 1.0", "value: 99.0"), f"score: {8 / 5} before, {106 / 5} now  <- differs"),
        (1, ("value: 1.0", "value: 1.0\nloss: 2.0"), "loss: nan before, 2.0 now  <- differs"),
        (2, ("value: 1.0", "value: 99.0"), "score: 8.0 before, 106.0 now  <- differs"),
        (3, ("value: 1.0", "value: 99.0"), "score: 9.0 before, 107.0 now  <- differs"),
    ],
)
def test_an_export_checks_what_is_returned_and_what_is_reported(
    endings: Study, tmp_path: Path, number: int, change: tuple[str, str], said: str
) -> None:
    """Also where repro-sweep is installed; a pruned trial is compared up to its end."""
    target = tmp_path / "trial"
    endings.run("export", f"endings/{number}", "--output", str(target))
    json.loads((target / "trial.json").read_text(), parse_constant=pytest.fail)
    done = run_export(target)
    assert done.returncode == 0, done.stderr + done.stdout
    if number == 2:
        assert "own: 8.0 before; the task has logged it with MLflow: not compared" in done.stdout
    path = target / "config.yaml"
    path.write_text(path.read_text().replace(*change))
    done = run_export(target)
    assert done.returncode == 1
    assert said in done.stdout.splitlines()


@pytest.mark.parametrize("damage", ["other file", "truncated"])
def test_a_source_that_is_not_the_recorded_one_is_refused(study: Study, tmp_path: Path, damage: str) -> None:
    """In one line, and nothing is left behind."""
    [original] = originals.load([originals.find("study/3", study.uri)])
    assert original.archive is not None
    kept = original.archive.read_bytes()
    if damage == "truncated":
        damaged = kept[: len(kept) // 2]
    else:
        unpack(original.archive, tmp_path / "unpacked")
        task = tmp_path / "unpacked" / "0" / "tasks.py"
        task.chmod(0o644)
        task.write_text(task.read_text().replace("size / 7", "size / 8"))
        with tarfile.open(tmp_path / "damaged.tar.gz", "w:gz") as tar:
            tar.add(tmp_path / "unpacked", ".")
        damaged = (tmp_path / "damaged.tar.gz").read_bytes()
    before = sorted(study.place.root.iterdir())
    store = Path(study.uri.removeprefix("sqlite:///")).parent
    [stored] = [path for path in store.rglob("submissions/*/source.tar.gz") if path.read_bytes() == kept]
    stored.write_bytes(damaged)
    try:
        for command in (
            ("export", "study/3", "--output", "new/trial"),
            ("export", "study/3", "--output", "trial.zip"),
            ("diff", "study/3", "second/3"),
        ):
            done = study.place.run(*command, "--uri", study.uri)
            assert done.returncode == 2, done.stderr + done.stdout
            [line] = done.stderr.splitlines()
            assert line.startswith("repro-sweep: study/3: the source ")
    finally:
        stored.write_bytes(kept)
    assert sorted(study.place.root.iterdir()) == before


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
    assert set(by["code"]) == {"tasks.py", "conf/model/large.yaml", "data.txt", "weights.bin"}
    assert "-(2 bytes, sha256 " in by["code"]["weights.bin"]["text"]
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


def test_the_card_has_all_data_and_resources_of_a_sweep(endings: Study) -> None:
    """Although source and machine stayed the same in between."""
    text = endings.run("card", "endings")
    digests = {
        each.record.data["train"].digest
        for each in originals.load([originals.find(f"endings/{number}", endings.uri) for number in (0, 4)])
        if each.record is not None
    }
    assert len(digests) == 2
    assert all(digest in text for digest in digests)
    assert "- CPUs a trial: 1, 2" in text


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
