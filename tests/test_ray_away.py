"""Sweeps on Ray nodes that do not see the sweep's directory, nor the project: what is needed and made travels."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray_cluster
from helpers import MakeProject, Project
from ray_cluster import Place, RayCluster

from repro_sweep.states import FailureKind, TrialState

COMPLETE = TrialState.COMPLETE
FILES = ray_cluster.FILES | {
    "conf/config.yaml": "{x: 0, wait_s: 0.0, steps: 1, mlflow: false, package: null}",
    "words.txt": "as submitted",
    "tasks.py": """
        import os
        import time
        from pathlib import Path

        import repro_sweep

        def train(cfg):
            project = Path(os.environ["PROJECT"])
            print("node", os.environ["NODE"], "sees", (project / "tasks.py").exists())
            print("words:", Path("words.txt").read_text())
            while (project / "held").exists():
                time.sleep(0.05)
            if cfg.package:
                import importlib
                print("package", importlib.import_module(cfg.package).__file__)
            if cfg.mlflow:
                import mlflow
                mlflow.log_metric("own", 1.0)
            kept = repro_sweep.checkpoint_dir() / "step"
            first = int(kept.read_text()) if kept.exists() else 0
            for step in range(first, cfg.steps):
                time.sleep(cfg.wait_s)
                new = kept.with_name("new")
                new.write_text(str(step + 1))
                new.replace(kept)
                print("step", step)
                repro_sweep.report(step, score=cfg.x)
            folder = repro_sweep.artifact_dir() / "sub"
            folder.mkdir()
            (folder / "empty").touch()
            (folder / "large").write_bytes(bytes([cfg.x]) * 2_500_000)
            return {"score": cfg.x, "first": first}
    """,
}


class Away(Place):
    """A project, and a cluster on whose nodes, but for those that are told, an empty folder is in its place."""

    def __init__(self, project: Project, cluster: RayCluster) -> None:
        super().__init__(project, cluster)
        self.env = {**cluster.env, "PROJECT": str(project.root)}

    def add_node(self, name: str, *, sees: bool = False) -> None:
        """A node with two CPUs."""
        env = {"NODE": name, "PROJECT": str(self.project.root)}
        self.cluster.add_node(name, env=env, hidden=None if sees else self.project.root)

    def log(self, trial: int) -> str:
        """A trial's log, as far as it is there."""
        path = self.project.root / f"multirun/grid/trials/{trial}/trial.log"
        return path.read_text() if path.exists() else ""

    def first_steps(self) -> dict[int, float]:
        """At which step the last attempt of each trial began."""
        sweep = self.project.sweep("grid")
        assert sweep.states() == {COMPLETE: len(sweep.trials)}
        return {trial.number: sweep.last_attempt(trial).metrics["first"] for trial in sweep.trials}


@pytest.fixture
def place(make_project: MakeProject) -> Iterator[Away]:
    """A cluster without a node yet."""
    cluster = RayCluster()
    try:
        cluster.start_head()
        yield Away(make_project(FILES), cluster)
    finally:
        cluster.stop()


def in_its_middle(place: Away, trial: int) -> Callable[[], bool]:
    """Whether the log of a trial, as it has come back so far, says that it has made some steps."""
    return lambda: "step 12" in place.log(trial)


def test_source_goes_there_and_logs_and_files_come_back(place: Away) -> None:
    place.add_node("a")
    place.run("+sweep=grid", "x=range(5)", "wait_s=0.1", "steps=3")
    sweep = place.project.sweep("grid")
    assert sweep.states() == {COMPLETE: 5}
    for trial in sweep.trials:
        folder = sweep.folder(trial)
        x = trial.params["x"]
        assert isinstance(x, int)
        lines = place.log(trial.number).splitlines()
        assert lines[:2] == ["node a sees False", "words: as submitted"]
        assert lines[2:] == ["step 0", "step 1", "step 2"]
        assert (folder / "artifacts/sub/large").read_bytes() == bytes([x]) * 2_500_000
        assert (folder / "artifacts/sub/empty").read_bytes() == b""
        assert f"x={x}" in (folder / ".hydra/overrides.yaml").read_text()
        assert not (folder / "checkpoints").exists()
    best = place.project.run(
        "-c",
        "import repro_sweep; b = repro_sweep.best_trial('grid'); print(len(b.artifact('sub/large').read_bytes()))",
        python=True,
        env={"MLFLOW_TRACKING_URI": f"sqlite:///{place.project.root}/mlflow.db"},
    )
    assert best.stdout == "2500000\n", best.stderr


def test_what_was_packed_at_the_start_runs_and_nodes_may_come_later_or_see_the_directory(
    place: Away,
) -> None:
    place.add_node("a", sees=True)
    held = place.project.root / "held"
    held.touch()
    with place.project.start("+sweep=grid", "x=range(8)", env=place.env) as running:
        running.until(lambda: place.log(0), "a trial runs")
        (place.project.root / "words.txt").write_text("edited")
        place.add_node("b")
        running.until(lambda: place.log(7), "the other node's actors run all that is left")
        held.unlink()
        assert running.wait() == 0, running.stderr
    logs = [place.log(number) for number in range(8)]
    away = [log for log in logs if log.startswith("node b sees False")]
    assert len(away) == 6
    assert all("words: as submitted" in log for log in away)
    assert all(log.startswith("node a sees True") for log in logs if log not in away)
    assert set(place.first_steps().values()) == {0}


@pytest.mark.parametrize("kept", [True, False], ids=["with checkpoint_uri", "without"])
def test_a_lost_nodes_trials_go_on_from_their_checkpoints_if_these_are_kept_elsewhere(
    place: Away, tmp_path: Path, kept: bool
) -> None:
    place.add_node("a")
    options = [f"sweep.checkpoint_uri=file://{tmp_path}/kept"] if kept else []
    with place.project.start(
        "+sweep=grid", "x=1,2", "wait_s=0.25", "steps=40", *options, env=place.env
    ) as running:
        running.until(in_its_middle(place, 0), "trial 0 is in its middle, and its log comes while it runs")
        running.until(in_its_middle(place, 1), "trial 1 is in its middle")
        place.cluster.kill_node("a")
        place.add_node("b")
        assert running.wait() == 0, running.stderr
    for trial, first in place.first_steps().items():
        assert (first > 0) is kept
        attempts = place.log(trial).split("[repro-sweep: attempt 2]\n")
        assert len(attempts) == 2
        assert attempts[0].startswith("node a")
        assert attempts[1].startswith("node b")
        assert f"step {int(first)}\n" in attempts[1]
        assert attempts[1].endswith("step 39\n")


def test_trials_have_the_packages_of_the_users_runtime_env(place: Away) -> None:
    place.add_node("a")
    place.run("+sweep=grid", "x=1", "package=cowsay", "+sweep.executor.runtime_env={uv: ['cowsay==6.1']}")
    (line,) = [line for line in place.log(0).splitlines() if line.startswith("package")]
    assert f"{place.cluster.folder}/session" in line


def test_workers_outlive_their_coordinator_and_hear_of_the_next_one(place: Away) -> None:
    place.add_node("a")
    with place.project.start("+sweep=grid", "x=range(4)", "wait_s=0.3", "steps=25", env=place.env) as running:
        running.until(in_its_middle(place, 1), "a trial is in its middle")
        os.killpg(running.process.pid, signal.SIGKILL)
        running.wait()
    place.run("resume", "grid")
    assert set(place.first_steps().values()) == {0}
    assert len(place.project.sweep("grid").attempts) == 4
    assert place.log(1).splitlines()[-25:] == [f"step {step}" for step in range(25)]


def test_mlflow_inside_of_a_trial_needs_a_store_that_can_be_reached(place: Away) -> None:
    place.add_node("a")
    done = place.project.run("+sweep=grid", "x=1", "mlflow=true", env=place.env)
    assert done.returncode == 1
    (attempt,) = place.project.sweep("grid").attempts
    assert attempt.kind is FailureKind.EXCEPTION
    assert "is on the machine where the sweep was started" in (attempt.message or "")
    assert "sweep.tracking.uri" in (attempt.message or "")
