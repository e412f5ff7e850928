"""Trials that are run again from MLflow alone: the verdict is EXACT, or names what is different."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from helpers import MakeProject, Project, projects
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import repro_sweep
from repro_sweep import Verdict
from repro_sweep.results import find_sweep, read_trials, tags_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"  # MLflow's own use of SQLAlchemy
)
FILES = {
    "conf/config.yaml": "x: 0\nscale: 1.0\nnoise: 0.0\nfail: false\n",
    "tasks.py": """
        import os
        import random
        import struct

        import untracked

        import repro_sweep


        def train(cfg):
            if cfg.fail:
                raise ValueError("as it was told")
            for step in range(3):
                chance = struct.unpack("<I", os.urandom(4))[0] * cfg.noise
                repro_sweep.report(step, loss=untracked.loss(cfg.x, random.random()) * (1 + chance))
            return {"score": random.random() * cfg.scale, "loss": 0.25}
        """,
    "untracked.py": "def loss(x, chance):\n    return x / 3 + chance\n",
    "data/train.txt": "1 2 3\n",
    "data/deep/more.txt": "4\n",
    ".gitignore": "mlflow.db*\nmlartifacts\ncache\n",
    "cache/known": "",
}
SWEEP = (
    "+sweep=default", "sweep.task=tasks.train", "sweep.name=study", "sweep.metric=score", "sweep.direction=maximize",
    "+sweep.data.train=data", "x=1,2,3",
)  # fmt: skip


@dataclass
class Study:
    """A sweep that has run in one place, whose MLflow store is in another one."""

    project: Project
    store: Path

    @property
    def uri(self) -> str:
        """Of the store."""
        return f"sqlite:///{self.store / 'mlflow.db'}"

    def reproduce(
        self, *arguments: str, status: int = 0, env: dict[str, str | None] | None = None
    ) -> list[dict[str, Any]]:
        """What ``repro-sweep reproduce`` says as JSON."""
        done = self.project.run("reproduce", *arguments, "--uri", self.uri, "--format", "json", env=env)
        assert done.returncode == status, done.stderr + done.stdout
        said: list[dict[str, Any]] = json.loads(done.stdout)
        return said

    def run_of(self, number: int) -> str:
        """The id of a trial's run."""
        return read_trials(find_sweep("study", self.uri))[number].run_id

    def artifact(self, number: int, path: str) -> Path:
        """Where an artifact of a trial's run lies."""
        return self.store / "mlartifacts" / self.run_of(number) / "artifacts" / path

    @property
    def submission(self) -> Path:
        """Where what was submitted lies."""
        run = self.store / "mlartifacts" / find_sweep("study", self.uri).run_id
        [found] = run.glob("artifacts/repro_sweep/submissions/*")
        return found


def a_study(
    folder: Path, store: Path, project: Project, *overrides: str, sweep: tuple[str, ...] = SWEEP
) -> Study:
    """Run the sweep, from source that is neither clean nor all tracked."""
    (folder / "store").mkdir()
    shutil.copy(store, folder / "store" / "mlflow.db")
    study = Study(project, folder / "store")
    git = ["git", "-C", str(project.root), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "tasks.py", "conf", ".gitignore"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    text = (project.root / "tasks.py").read_text()
    (project.root / "tasks.py").write_text(text.replace('"loss": 0.25', '"loss": 0.5'))
    done = project.run(*sweep, f"sweep.tracking.uri={study.uri}", *overrides)
    assert done.returncode == 0, done.stderr
    return study


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Study]:
    """One that tests must not change."""
    folder = tmp_path_factory.mktemp("original")
    for make in projects(folder, None):
        yield a_study(folder, empty_store, make(FILES, name="place"))


@pytest.fixture
def study(original: Study, tmp_path: Path) -> Iterator[Study]:
    """A copy of its store (whose artifacts are where they were, unless a test moves them), and an empty place."""
    for make in projects(tmp_path, None):
        yield Study(make({"empty/.keep": ""}, name="elsewhere"), original.store)


@pytest.fixture
def own(make_bare_project: MakeProject, tmp_path: Path, empty_store: Path) -> Callable[..., Study]:
    """Makes a study of the test's own."""
    return lambda *overrides: a_study(tmp_path, empty_store, make_bare_project(FILES), *overrides)


# --- the same ----------------------------------------------------------------------------------------------------


def test_a_trial_comes_out_the_same_from_mlflow_alone_in_an_empty_place(study: Study) -> None:
    """From dirty and untracked source; four values of two metrics at three steps, compared as bits."""
    [said] = study.reproduce("study/1")
    assert said["verdict"] == Verdict.EXACT
    assert said["values"] == 4
    assert said["first_difference"] is None
    assert not said["reasons"]


def test_the_verdict_is_a_tag_and_the_runs_are_linked(study: Study) -> None:
    """And the ranking shows it."""
    [said] = study.reproduce("best", "of", "study")
    original = said["original_run_id"]
    assert original == repro_sweep.best_trial("study", uri=study.uri).run_id
    tags = tags_of(original, study.uri)
    assert (tags["reproduced"], tags["reproduced_by"]) == ("EXACT", said["run_id"])
    assert tags_of(said["run_id"], study.uri)["reproduces"] == original
    ranking = study.project.run("rank", "study", "--uri", study.uri).stdout
    assert "reproduced" in ranking
    assert "1 EXACT" in ranking


def test_all_trials_of_a_sweep_and_the_python_interface(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three are run in one sweep; one of them also by its method."""
    said = study.reproduce("study", "--all", "sweep.executor.slots=2")
    assert [each["verdict"] for each in said] == [Verdict.EXACT] * 3
    monkeypatch.chdir(tmp_path)
    trial = repro_sweep.trials("study", uri=study.uri)[0]
    assert trial.reproduced is Verdict.EXACT
    found = trial.reproduce()
    assert (found.verdict, found.values, found.first_difference) == (Verdict.EXACT, 4, None)


def test_several_trials_may_be_named(study: Study) -> None:
    """Each once, in one sweep of their own."""
    run = study.run_of(0)
    said = study.reproduce("study/2", run, "study/0", "--directory", "again")
    assert [(each["trial"], each["verdict"]) for each in said] == [("study/2", "EXACT"), ("study/0", "EXACT")]
    assert len(read_trials(find_sweep("again", study.uri))) == 2


def needed(name: str) -> set[str]:
    """The normalized names of a package and of all that it needs here, without its extras."""
    found: set[str] = set()
    left = [name]
    while left:
        key = canonicalize_name(left.pop())
        if key not in found:
            found.add(key)
            needs = map(Requirement, metadata.requires(key) or ())
            left += [
                each.name for each in needs if each.marker is None or each.marker.evaluate({"extra": ""})
            ]
    return found


def test_the_recorded_environment_is_built_and_the_trial_runs_in_it(mutable: Study) -> None:
    """One with what a sweep needs and nothing else: no pip, no test tools, no torch."""
    wanted = needed("repro-sweep")
    edit_record(
        mutable,
        lambda record: record["environment"].update(
            packages={
                name: about for name, about in record["environment"]["packages"].items() if name in wanted
            }
        ),
    )
    [said] = mutable.reproduce("study/1", status=5)
    assert any(each.startswith("torch: not installed before, ") for each in said["reasons"])
    [said] = mutable.reproduce("study/1", "--env", "--directory", "built")
    assert (said["verdict"], said["values"], said["differences"]) == (Verdict.EXACT, 4, [])
    folder = mutable.project.root / "built"
    record = json.loads((folder / "built/trials/1/record.json").read_text())
    assert set(record["environment"]["packages"]) == wanted
    assert record["facts"]["variables"].get("VIRTUAL_ENV") is None
    shutil.rmtree(folder)


def test_the_text_says_what_was_found(study: Study) -> None:
    """One line, and the two runs."""
    done = study.project.run("reproduce", "study/0", "--uri", study.uri)
    assert done.returncode == 0
    first, *rest = done.stdout.splitlines()
    assert first == "study/0: EXACT (4 values)"
    assert rest[-1].split()[-1] == study.run_of(0)


# --- not the same ------------------------------------------------------------------------------------------------


def test_chance_that_is_not_seeded_differs_and_the_first_value_is_named(own: Callable[..., Study]) -> None:
    """With a tolerance it may be near enough."""
    study = own("noise=1e-16")
    [said] = study.reproduce("study/1", status=4)
    assert said["verdict"] == Verdict.DIFFERS
    first = said["first_difference"]
    assert (first["metric"], first["step"]) == ("loss", 0)
    assert first["was"] != first["now"]
    [said] = study.reproduce("study/1", "--rtol", "1e-3", status=3)
    assert said["verdict"] == Verdict.WITHIN_TOLERANCE
    assert tags_of(said["original_run_id"], study.uri)["reproduced"] == "WITHIN TOLERANCE"


def edit(path: Path, old: str, new: str) -> None:
    """Change one place of a file."""
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


def edit_record(study: Study, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the record of trial 1."""
    path = study.artifact(1, "repro_sweep/record.json")
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def edit_source(study: Study, name: str, change: Callable[[bytes], bytes | None]) -> None:
    """Change, or drop, a file in the archive of the source."""
    path = study.submission / "source.tar.gz"
    out = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=out, mode="w:gz") as new:
        for member in old.getmembers():
            file = old.extractfile(member)
            assert file is not None
            data: bytes | None = file.read()
            if member.name.endswith(name) and data is not None:
                data = change(data)
            if data is not None:
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))
    path.unlink()
    path.write_bytes(out.getvalue())


def set_variable(name: str, value: str) -> Callable[[dict[str, Any]], object]:
    """A change of a recorded variable of the environment."""
    return lambda record: record["facts"]["variables"].update({name: value})


def set_package(name: str, **about: object) -> Callable[[dict[str, Any]], object]:
    """A change of a recorded package."""
    return lambda record: record["environment"]["packages"][name].update(about)


ODD = {
    "conf/config.yaml": "x: 0\nonce: false\n",
    "tasks.py": """
        from pathlib import Path

        import mlflow

        import repro_sweep

        ONCE = Path(__file__).parent / "cache/once"


        def train(cfg):
            if cfg.once and ONCE.exists():
                raise ValueError("a second time")
            ONCE.parent.mkdir(exist_ok=True)
            ONCE.write_text("done")
            mlflow.log_metric("own", 0.5, step=3)
            for fast in (3.0, 1.0, 2.0):
                repro_sweep.report(0, fast=fast)
            repro_sweep.report(1, zero=-0.0, huge=float("inf"))
            if cfg.x == 2:
                raise repro_sweep.TrialPruned
            return cfg.x
        """,
    ".gitignore": "mlflow.db*\nmlartifacts\ncache\n",
    "cache/known": "",
}
ODD_SWEEP = ("+sweep=default", "sweep.task=tasks.train", "sweep.name=study", "sweep.executor.slots=1")


def test_what_a_task_logs_itself_and_what_has_no_order_is_compared(
    make_bare_project: MakeProject, tmp_path: Path, empty_store: Path
) -> None:
    """Metrics of ``mlflow.log_metric``, three values at one step, a negative zero, an infinity, an end by pruning."""
    study = a_study(tmp_path, empty_store, make_bare_project(ODD), "x=1,2", sweep=ODD_SWEEP)
    said = study.reproduce("study", "--all")
    assert [(each["verdict"], each["reasons"]) for each in said] == [("EXACT", []), ("EXACT", [])]
    assert [each["values"] for each in said] == [5, 4]


def test_what_git_ignores_is_not_there_and_not_written_to(
    make_bare_project: MakeProject, tmp_path: Path, empty_store: Path
) -> None:
    """A task that finds its old results would prove nothing; that they are missing is said."""
    project = make_bare_project(ODD)
    study = a_study(tmp_path, empty_store, project, "x=1", "once=true", sweep=ODD_SWEEP)
    once = project.root / "cache/once"
    once.write_text("kept")
    done = project.run("reproduce", "study/0", "--uri", study.uri)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not frozen, so not there: cache; --anyway takes what still lies where it lay" in done.stderr
    assert once.read_text() == "kept"
    [said] = study.reproduce("study/0", "--anyway", status=4)
    assert said["reasons"] == ["it ends as FAIL now: ValueError: a second time"]


def test_data_that_git_ignores_are_there_if_the_sweep_names_them(
    make_bare_project: MakeProject, tmp_path: Path, empty_store: Path
) -> None:
    """Within an ignored folder; what else lies in that is not."""
    files = ODD | {"cache/table.txt": "1", "tasks.py": """
        from pathlib import Path


        def train(cfg):
            folder = Path(__file__).parent / "cache"
            return float((folder / "table.txt").read_text()) + len(list(folder.iterdir()))
        """}  # fmt: skip
    data = "+sweep.data.table=cache/table.txt"
    study = a_study(tmp_path, empty_store, make_bare_project(files), "x=1", data, sweep=ODD_SWEEP)
    [said] = study.reproduce("study/0", status=4)
    assert (said["first_difference"]["was"], said["first_difference"]["now"]) == (3.0, 2.0)


def test_a_trial_that_fails_for_want_of_what_was_not_frozen_is_not_said_to_differ(
    make_bare_project: MakeProject, tmp_path: Path, empty_store: Path
) -> None:
    """The verdict names it."""
    files = ODD | {"cache/table.txt": "1", "tasks.py": """
        from pathlib import Path


        def train(cfg):
            return float((Path(__file__).parent / "cache/table.txt").read_text())
        """}  # fmt: skip
    study = a_study(tmp_path, empty_store, make_bare_project(files), "x=1", sweep=ODD_SWEEP)
    [said] = study.reproduce("study/0", status=5)
    assert said["reasons"][1:] == ["cache was not frozen"]
    assert "table.txt" in said["reasons"][0]


MUTATIONS: dict[str, tuple[Callable[[Study], object], Verdict, str]] = {
    "a line of code": (
        lambda study: edit_source(study, "tasks.py", lambda data: data.replace(b"range(3)", b"range(4)")),
        Verdict.UNVERIFIABLE, "study/1: the source is not the recorded one",
    ),
    "untracked code": (
        lambda study: edit_source(study, "untracked.py", lambda data: data.replace(b"/ 3", b"/ 7")),
        Verdict.UNVERIFIABLE, "study/1: the source is not the recorded one",
    ),
    "a file that is gone": (
        lambda study: edit_source(study, "untracked.py", lambda data: None),
        Verdict.UNVERIFIABLE, "study/1: the source is not the recorded one",
    ),
    "a YAML file": (
        lambda study: edit_source(study, "config.yaml", lambda data: data.replace(b"1.0", b"1.5")),
        Verdict.UNVERIFIABLE, "study/1: the source is not the recorded one",
    ),
    "another commit's snapshot": (
        lambda study: edit_record(study, lambda record: record.update(snapshot="0" * 64)),
        Verdict.UNVERIFIABLE, "the source is not the recorded one",
    ),
    "another submission": (
        lambda study: edit_record(study, lambda record: record.update(submission="0" * 16)),
        Verdict.UNVERIFIABLE, "MLflow does not have what was submitted",
    ),
    "a config value": (
        lambda study: edit(study.artifact(1, "repro_sweep/config.yaml"), "scale: 1.0", "scale: 1.5"),
        Verdict.UNVERIFIABLE, "drifted",
    ),
    "one byte of the data": (
        lambda study: edit(study.project.root / "data/deep/more.txt", "4", "5"),
        Verdict.UNVERIFIABLE, "data/deep/more.txt has changed since the sweep was submitted",
    ),
    "more data": (
        lambda study: (study.project.root / "data/new.txt").write_text(""),
        Verdict.UNVERIFIABLE, "data/new.txt has changed since the sweep was submitted",
    ),
    "a package's version": (
        lambda study: edit_record(study, set_package("numpy", version="1.0.0")),
        Verdict.UNVERIFIABLE, "numpy: 1.0.0 before, ",
    ),
    "a package's files": (
        lambda study: edit_record(study, set_package("numpy", digest="0" * 64)),
        Verdict.UNVERIFIABLE, "numpy: other files of version ",
    ),
    "a package that is not here": (
        lambda study: edit_record(
            study, lambda record: record["environment"]["packages"].update(gone={"version": "1"})
        ),
        Verdict.UNVERIFIABLE, "gone: 1 before, not installed now",
    ),
    "Python's version": (
        lambda study: edit_record(study, lambda record: record["environment"].update(python="3.9.1")),
        Verdict.UNVERIFIABLE, "python: cpython 3.9.1 before, ",
    ),
    "the thread count of a library": (
        lambda study: edit_record(
            study, lambda record: record["facts"].update(torch={
                "version": "2", "cuda": None, "cudnn": None, "threads": 3, "deterministic": False,
            })
        ),
        Verdict.UNVERIFIABLE, "torch's threads: 3 before, ",
    ),
    "the seed": (
        lambda study: edit_record(study, lambda record: record["facts"].update(seed=1)),
        Verdict.UNVERIFIABLE, "seed: 1 before, ",
    ),
    "the sweep's seed": (
        lambda study: edit_record(study, lambda record: record["determinism"].update(seed=1)),
        Verdict.UNVERIFIABLE, "seed: ",
    ),
    "strictness": (
        lambda study: edit_record(study, lambda record: record["determinism"].update(strict=True)),
        Verdict.UNVERIFIABLE, "CUBLAS_WORKSPACE_CONFIG: not set before, :4096:8 now",
    ),
    "recorded overrides": (
        lambda study: edit_record(study, lambda record: record.update(overrides=["x=9"])),
        Verdict.UNVERIFIABLE, "overrides: ('x=9',) before, ",
    ),
    "no record": (
        lambda study: study.artifact(1, "repro_sweep/record.json").unlink(),
        Verdict.UNVERIFIABLE, "MLflow does not have its record",
    ),
    "no source": (
        lambda study: (study.submission / "source.tar.gz").unlink(),
        Verdict.UNVERIFIABLE, "MLflow does not have its source",
    ),
    "a broken archive": (
        lambda study: (study.submission / "source.tar.gz").write_bytes(b"nothing"),
        Verdict.UNVERIFIABLE, "study/1: the source cannot be unpacked",
    ),
}  # fmt: skip


@pytest.fixture
def mutable(original: Study, tmp_path: Path) -> Iterator[Study]:
    """The study in its own place, with store and artifacts that a test may change: they are put back afterwards."""
    kept = tmp_path / "kept"
    shutil.copytree(original.store, kept / "store", symlinks=True)
    shutil.copytree(original.project.root / "data", kept / "data")
    yield original
    for there, saved in ((original.store, kept / "store"), (original.project.root / "data", kept / "data")):
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(saved, there, symlinks=True)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_never_exact_and_is_named(mutable: Study, name: str) -> None:
    """What was recorded and what is found are not the same: the verdict says what."""
    mutate, verdict, reason = MUTATIONS[name]
    mutate(mutable)
    [said] = mutable.reproduce("study/1", status={"DIFFERS": 4, "UNVERIFIABLE": 5}[verdict])
    assert said["verdict"] == verdict
    assert any(reason in each for each in said["reasons"]), said["reasons"]


def test_the_frozen_copy_of_the_data_will_do_if_the_user_says_so(mutable: Study) -> None:
    """They are read from the source; that the data have changed where they lay is told."""
    edit(mutable.project.root / "data/train.txt", "1 2 3", "1 2 4")
    [said] = mutable.reproduce("study/1", "--anyway")
    assert said["verdict"] == Verdict.EXACT
    assert any("data/train.txt has changed" in each for each in said["differences"])


def test_another_environment_may_be_allowed_and_is_told(mutable: Study) -> None:
    """The bits are the same all the same, and what is different stands beside the verdict."""
    edit_record(mutable, set_package("rich", version="1.0.0"))
    [said] = mutable.reproduce("study/1", "--anyway")
    assert said["verdict"] == Verdict.EXACT
    assert any(each.startswith("rich: 1.0.0 before, ") for each in said["differences"])


def test_the_users_own_variables_are_those_of_the_original(own: Callable[..., Study]) -> None:
    """A thread count that was set then is set now, whatever the shell says."""
    study = own()
    [said] = study.reproduce("study/0", env={"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "2"})
    assert said["verdict"] == Verdict.EXACT


def test_that_nothing_can_be_verified_here_takes_no_verdict_back(mutable: Study) -> None:
    """The tag is about the trial, not about this machine."""
    mutable.reproduce("study/1")
    edit_record(mutable, set_package("numpy", version="1.0.0"))
    mutable.reproduce("study/1", status=5)
    assert tags_of(mutable.run_of(1), mutable.uri)["reproduced"] == "EXACT"


# --- wrong input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("study/7",), "sweep 'study' has no trial 7: its trials are 0 to 2"),
        (("stury/1",), "no sweep named 'stury'"),
        (("nonsense",), "'nonsense' is no trial: write SWEEP/NUMBER, 'best of SWEEP', or the id of an MLflow run"),
        (("0" * 32,), "0" * 32),
        (("study/1", "x=3"), "x=3: only sweep/executor and sweep.executor.OPTION can be set here"),
        (("study/1", "sweep/executor=cloud"), "sweep/executor: 'cloud' is not an executor"),
        (("study/1", "sweep.executor.slots=many"), "sweep.executor.slots=many: "),
        (("study/1", "--rtol", "2"), "argument --rtol: must be a number from 0 to less than 1, got 2"),
        (("study/1", "--rtol", "x"), "argument --rtol: must be a number from 0 to less than 1, got x"),
        (("study/1", "--directory", "empty"), "--directory: empty is not empty"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(study: Study, arguments: tuple[str, ...], said: str) -> None:
    """Before anything has started."""
    done = study.project.run("reproduce", *arguments, "--uri", study.uri)
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("repro-sweep: ")
    assert said in line
    assert not (study.project.root / "reproduced").exists()
