"""A Ray cluster within a SLURM job's allocation, and a sweep on it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import MARK, MakeProject, free_port
from ray_cluster import FILES, PATH

from repro_sweep.states import TrialState
from slurm.testbed import Cluster

pytest_plugins = ["slurm_cluster"]

SCRIPT = Path(__file__).parents[1] / "slurm/ray.sbatch"


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray has its sockets: their paths must be short."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_job_that_starts_ray_on_its_nodes_runs_a_sweep_on_all_of_them(
    make_project: MakeProject, cluster: Cluster, ray_folder: Path
) -> None:
    project = make_project(FILES)
    env = {"PATH": PATH, "RAY_PORT": free_port(), "RAY_TMPDIR": ray_folder, MARK: project.mark}
    export = ",".join(["ALL", *(f"{key}={value}" for key, value in env.items())])
    options = ("--parsable", "--cpus-per-task=2", "--time=10", "--output=job.out", f"--export={export}")
    grid = ("+sweep=grid", "x=range(8)", "wait_s=0.5", "steps=20")
    job = cluster.run("sbatch", *options, SCRIPT, *grid, cwd=project.root).strip()
    going = {"", "PENDING", "RUNNING", "COMPLETING"}
    cluster.until(lambda: cluster.job_state(job) not in going, "the job has ended", 240)
    assert cluster.job_state(job) == "COMPLETED", (project.root / "job.out").read_text()
    sweep = project.sweep("grid")
    assert sweep.states() == {TrialState.COMPLETE: 8}
    assert len(sweep.attempts) == 8
    assert {attempt.host for attempt in sweep.attempts} == {"node1", "node2"}
