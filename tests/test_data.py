"""Data that a sweep declares: fingerprints, what they are part of, and what happens when data change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import MakeProject, environment

from repro_sweep import TrialState
from repro_sweep.errors import SweepError
from repro_sweep.provenance import data
from repro_sweep.sweep import Data

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"  # MLflow's own use of SQLAlchemy
)
TASK = """
    import time
    from pathlib import Path

    import repro_sweep


    def train(cfg):
        repro_sweep.report(0, read=len(Path("data/a.txt").read_text()))
        Path("started").touch()
        ends = time.monotonic() + 60
        while cfg.wait and not Path("go").exists() and time.monotonic() < ends:
            time.sleep(0.05)
        return float(cfg.x)
"""
FILES = {
    "conf/config.yaml": "x: 0\nwait: false\n",
    "tasks.py": TASK,
    "data/a.txt": "first\n",
    "data/b/c.txt": "second\n",
}
SWEEP = ("+sweep=default", "sweep.task=tasks.train", "+sweep.data.train=data")


def of(where: str | Path, folder: Path) -> Data:
    """A fingerprint, with the store beside."""
    return data.fingerprint("train", str(where), folder, folder / "store")


def write(folder: Path, files: dict[str, str]) -> Path:
    """Write files below a folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_fingerprint_depends_on_names_and_bytes_alone(tmp_path: Path) -> None:
    """Not on where they lie, nor on their times; a file's is its SHA-256."""
    one = write(tmp_path / "one", {"d/a": "1", "d/b/c": "2"})
    same = write(tmp_path / "same", {"d/b/c": "2", "d/a": "1"})
    os.utime(same / "d/a", (0, 0))
    first = of("d", one)
    assert first.digest == of("d", same).digest
    assert (first.files, first.size) == (2, 2)
    others = [
        {"d/a": "1", "d/b/c": "3"},
        {"d/a": "1", "d/b/d": "2"},
        {"d/a": "1"},
        {"d/a": "12", "d/b/c": ""},
    ]
    digests = {of("d", write(tmp_path / str(number), files)).digest for number, files in enumerate(others)}
    assert len(digests | {first.digest}) == 5
    assert of("d/a", one).digest == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"


def test_a_file_is_read_again_only_if_it_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As git does it: by size and times."""
    write(tmp_path, {"d/a": "1", "d/b": "2"})
    monkeypatch.setattr(data, "_RACY_NS", 0)  # else files that are so new are always read
    first = of("d", tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(data.hashlib, "new", lambda *_a, **_k: pytest.fail("read again"))
        assert of("d", tmp_path) == first
    (tmp_path / "d/a").write_text("3")
    assert of("d", tmp_path).digest != first.digest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "d/b").write_text("3"), "d/b"),
        (lambda folder: (folder / "d/new").write_text(""), "d/new"),
        (lambda folder: (folder / "d/a").unlink(), "d/a"),
    ],
)
def test_the_file_that_has_changed_is_named(tmp_path: Path, change: object, named: str) -> None:
    """Also one that is new, or gone."""
    write(tmp_path, {"d/a": "1", "d/b": "2"})
    was = of("d", tmp_path)
    assert data.changed("train", was, tmp_path / "store") is None
    assert callable(change)
    change(tmp_path)
    said = data.changed("train", was, tmp_path / "store")
    assert said == f"sweep.data.train: {tmp_path / named} has changed since the sweep was submitted"


def test_a_uri_is_fingerprinted_by_what_its_file_system_knows(tmp_path: Path) -> None:
    """Through fsspec: size and time, or the checksum that an object store has."""
    write(tmp_path, {"d/a": "1"})
    uri = f"file://{tmp_path}/d"
    first = of(uri, tmp_path)
    assert first == of(uri, tmp_path)
    (tmp_path / "d/a").write_text("22")
    assert of(uri, tmp_path).digest != first.digest


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("gone", "sweep.data.train: {folder}/gone is not there"),
        ("file:///gone/away", "sweep.data.train: file:///gone/away cannot be read: "),
        ("nowhere://x", "sweep.data.train: nowhere://x cannot be read: Protocol not known: nowhere"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path: Path, where: str, said: str) -> None:
    """In one line."""
    with pytest.raises(SweepError) as caught:
        of(where, tmp_path)
    assert str(caught.value).startswith(said.format(folder=tmp_path))


# --- in a sweep --------------------------------------------------------------------------------------------------


def test_other_data_make_other_trials(make_project: MakeProject) -> None:
    """Their fingerprint is part of the identity: nothing is taken for done that has read something else."""
    project = make_project(FILES)
    assert project.run(*SWEEP, "x=1,2").returncode == 0
    assert "2 of 2 trials are complete already" in project.run(*SWEEP, "x=1,2").stderr
    (project.root / "data/b/c.txt").write_text("third\n")
    assert project.run(*SWEEP, "x=1,2").returncode == 0
    assert project.sweep("default").states() == {TrialState.COMPLETE: 4}


def test_data_are_inputs_of_the_runs_in_mlflow(make_project: MakeProject) -> None:
    """Of the sweep's and of each trial's, by name and digest."""
    import mlflow

    project = make_project(FILES)
    assert project.run(*SWEEP, "x=1,2").returncode == 0
    found = of("data", project.root)
    client = mlflow.MlflowClient(f"sqlite:///{project.root / 'mlflow.db'}")
    [experiment] = client.search_experiments(filter_string="name = 'default'")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 3
    for run in runs:
        [each] = run.inputs.dataset_inputs
        assert (each.dataset.name, each.dataset.digest) == ("train", found.digest[:36])
        assert json.loads(each.dataset.source) == {"uri": str(project.root / "data")}


def test_a_change_while_trials_wait_fails_them_and_names_the_file(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has started goes on; nothing starts with other data."""
    project = make_project(FILES)
    with project.start(*SWEEP, "x=1,2", "wait=true", "sweep.executor.slots=1") as running:
        running.until((project.root / "started").exists, "a trial runs")
        (project.root / "data/a.txt").write_text("others\n")
        # it looks at most every ten seconds
        subprocess.run(["sleep", "10.5"], check=True)
        (project.root / "go").touch()
        assert running.wait() == 1
    first, second = sorted(project.sweep("default").attempts, key=lambda each: each.started_at)
    assert first.state is TrialState.COMPLETE
    assert second.state is TrialState.FAIL
    assert second.message == (
        f"sweep.data.train: {project.root}/data/a.txt has changed since the sweep was submitted"
    )


def test_wrong_data_are_one_line_before_anything_starts(make_bare_project: MakeProject) -> None:
    """A path that is not there, and something that is no path."""
    project = make_bare_project(FILES)
    for option, said in (
        ("+sweep.data.x=gone", f"sweep.data.x: {project.root}/gone is not there"),
        ("+sweep.data.x=3", "sweep.data.x: must be a path or a URI, got 3"),
    ):
        done = project.run("+sweep=default", "sweep.task=tasks.train", option)
        assert done.returncode == 2
        assert done.stderr.splitlines() == [f"repro-sweep: {said}"]


# --- DVC ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tracked(tmp_path: Path) -> Path:
    """A folder and a file that the real DVC tracks, and the output of one of its stages."""
    root = write(tmp_path / "repository", {"d/a": "1\n", "d/b/c": "2\n", "one.txt": "3\n"})
    dvc(root, "init", "-q", "--no-scm")
    dvc(root, "add", "-q", "d", "one.txt")
    dvc(root, "stage", "add", "-q", "--name", "make", "--outs", "made.txt", "echo 4 > made.txt")
    dvc(root, "repro", "-q")
    return root


def dvc(root: Path, *arguments: str) -> None:
    """Run DVC, in a place of its own."""
    place = {
        name: str(root.parent / "dvc")
        for name in ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR", "DVC_SITE_CACHE_DIR")
    }
    env = environment({**place, "DVC_NO_ANALYTICS": "1"})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "dvc", *arguments],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["d", "one.txt", "made.txt"])
def test_dvcs_own_hash_is_the_fingerprint(tracked: Path, name: str) -> None:
    """Of a folder, of a file, and of what a stage makes (``dvc.lock``), with the data here or not."""
    import yaml

    here = of(name, tracked)
    beside = tracked / f"{name}.dvc"
    if beside.exists():
        [out] = yaml.safe_load(beside.read_text())["outs"]
    else:
        [out] = yaml.safe_load((tracked / "dvc.lock").read_text())["stages"]["make"]["outs"]
    assert here.digest == f"md5:{out['md5']}"
    (tracked / name).rename(tracked / "away")
    assert of(name, tracked).digest == here.digest


def test_data_that_are_not_what_dvc_says_are_refused(tracked: Path) -> None:
    """With the commands that help; after one of them it is well."""
    was = of("d", tracked)
    (tracked / "d").rename(tracked / "linked")
    write(tracked, {"d/a": "1\n", "d/b/c": "changed\n"})
    with pytest.raises(
        SweepError, match=r"sweep\.data\.train: .*/d is not what DVC has recorded .*'dvc commit'"
    ):
        of("d", tracked)
    dvc(tracked, "commit", "-q", "-f", "d")
    assert of("d", tracked).digest not in ("", was.digest)
