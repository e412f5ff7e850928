"""Trials with several GPUs, and trials on several nodes: their ranks find each other, and end together."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import MakeProject, Project, Sweep, eventually

from repro_sweep.states import FailureKind, TrialState
from slurm.testbed import Cluster

pytest_plugins = ["slurm_cluster"]

FILES = {
    "conf/config.yaml": "x: 0\nmode: whole\nrank: 1\nsteps: 600\n",
    "tasks.py": """
        import os
        import signal
        import time
        from pathlib import Path

        import repro_sweep


        def gpus(cfg):
            print("sees", os.environ["CUDA_VISIBLE_DEVICES"])
            return {"score": len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))}


        def train(cfg):
            import torch
            from torch import distributed

            distributed.init_process_group("gloo")
            rank, size = distributed.get_rank(), distributed.get_world_size()
            node = os.environ["SLURMD_NODENAME"]
            print(f"rank {rank} of {size} on {node} with GPUs {os.environ['CUDA_VISIBLE_DEVICES']}")
            total = torch.tensor([float(rank + 1) * cfg.x])
            distributed.all_reduce(total)
            repro_sweep.report(0, score=total.item() + 100 * rank)
            (repro_sweep.artifact_dir() / f"rank{rank}.txt").write_text(node)
            distributed.destroy_process_group()
            return {"score": total.item()} if rank == 0 else None


        def together(cfg):
            import torch
            from torch import distributed

            distributed.init_process_group("gloo")
            rank = distributed.get_rank()
            Path(f"rank{rank}.pid").write_text(str(os.getpid()))
            mine = rank == cfg.rank
            if cfg.mode == "crash" and mine:
                os.kill(os.getpid(), signal.SIGKILL)
            if cfg.mode == "raise" and mine:
                raise ValueError("a bug")
            if cfg.mode == "memory" and mine:
                raise MemoryError
            if cfg.mode == "exit" and mine:
                os._exit(3)
            for step in range(cfg.steps):
                distributed.all_reduce(torch.tensor([1.0]))
                repro_sweep.report(step, score=step)
                time.sleep(0.1)
            return {"score": 1.0}
    """,
}


@pytest.fixture
def project(make_project: MakeProject) -> Project:
    return make_project(FILES)


def sweep(task: str, *overrides: str, workers: int = 1, gpus: int = 2) -> tuple[str, ...]:
    return (
        "+sweep=default", "sweep/executor=slurm", f"sweep.task=tasks.{task}", "sweep.metric=score",
        f"sweep.executor.workers={workers}", f"sweep.resources.gpus_per_trial={gpus}", "sweep.executor.poll_s=1",
        "sweep.executor.host=127.0.0.1", "sweep.direction=maximize", *overrides,
    )  # fmt: skip


def env(cluster: Cluster) -> dict[str, str]:
    return {**cluster.exports(), "PATH": cluster.environment()["PATH"]}


def on_two_nodes(task: str, *overrides: str) -> tuple[str, ...]:
    return sweep(task, "sweep.resources.nodes_per_trial=2", *overrides, gpus=1)


def pids(project: Project) -> list[int]:
    files = [project.root / f"rank{rank}.pid" for rank in (0, 1)]
    return [int(file.read_text()) for file in files if file.exists() and file.read_text()]


def alive(pid: int) -> bool:
    return (
        Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]
    )


def test_a_trial_with_two_gpus_sees_two(project: Project, cluster: Cluster) -> None:
    result = project.run(*sweep("gpus", "x=range(3)", workers=2), env=env(cluster))
    assert result.returncode == 0, result.stderr
    done = project.sweep("default")
    assert done.states() == {TrialState.COMPLETE: 3}
    for trial in done.trials:
        assert "sees 0,1" in (done.folder(trial) / "trial.log").read_text()
        assert done.last_attempt(trial).metrics == {"score": 2.0}


def test_two_nodes_reduce_what_both_have(project: Project, cluster: Cluster) -> None:
    """A trial on two nodes is two ranks that find each other as under torchrun; rank 0 alone reports."""
    result = project.run(*on_two_nodes("train", "x=1,2"), env=env(cluster))
    assert result.returncode == 0, result.stderr + log_of(project)
    done = project.sweep("default")
    assert done.states() == {TrialState.COMPLETE: 2}
    for x, trial in done.by("x").items():
        folder = done.folder(trial)
        assert done.last_attempt(trial).metrics == {"score": 3.0 * float(str(x))}
        assert "rank 0 of 2 on node1 with GPUs 0" in (folder / "trial.log").read_text()
        assert "those on node2 write to trial.rank*.log" in (folder / "trial.log").read_text()
        assert "rank 1 of 2 on node2 with GPUs 0" in (folder / "trial.rank1.log").read_text()
        nodes = [(folder / f"artifacts/rank{rank}.txt").read_text() for rank in (0, 1)]
        assert nodes == ["node1", "node2"]
    jobs = cluster.run(
        "sacct", "--noheader", "--parsable2", "--allocations", "--format=AllocNodes,JobName"
    ).split()
    assert [job for job in jobs if job.startswith("2|default.")] == [jobs[-1]]  # both trials in one job


@pytest.mark.parametrize(
    ("mode", "rank", "kind", "text"),
    [
        ("crash", 0, FailureKind.CRASH, "killed by SIGKILL"),
        ("raise", 1, FailureKind.EXCEPTION, "ValueError: a bug"),
        ("memory", 1, FailureKind.OUT_OF_MEMORY, "MemoryError"),
    ],
)
def test_a_rank_that_fails_ends_all_and_says_why(
    mode: str, rank: int, kind: FailureKind, text: str, project: Project, cluster: Cluster
) -> None:
    no_more = ("sweep.retries.CRASH=0", "sweep.retries.OUT_OF_MEMORY=0")
    result = project.run(
        *on_two_nodes("together", f"mode={mode}", f"rank={rank}", *no_more), env=env(cluster)
    )
    assert result.returncode == 1, result.stderr
    (attempt,) = project.sweep("default").attempts
    assert (attempt.state, attempt.kind) == (TrialState.FAIL, kind)
    assert attempt.message is not None
    assert attempt.message.startswith("rank 1 on node2: ") == (rank == 1)
    assert text in attempt.message
    eventually(lambda: not any(alive(pid) for pid in pids(project)), "all ranks have ended")
    assert len(pids(project)) == 2


def test_the_next_trial_runs_in_the_same_job_after_a_rank_has_failed(
    project: Project, cluster: Cluster
) -> None:
    overrides = ("mode=raise,whole", "rank=1", "steps=3")
    result = project.run(*on_two_nodes("together", *overrides), env=env(cluster))
    assert result.returncode == 1
    done = project.sweep("default")
    assert [attempt.kind for attempt in done.attempts] == [FailureKind.EXCEPTION, None]
    assert len({attempt.worker for attempt in done.attempts}) == 1


def test_all_ranks_of_a_cancelled_trial_end(project: Project, cluster: Cluster) -> None:
    with project.start(*on_two_nodes("together"), env=env(cluster)) as running:
        running.until(lambda: len(pids(project)) == 2, "both ranks run")
        cancelled = project.run("cancel", "default", "0", env=env(cluster))
        assert cancelled.returncode == 0, cancelled.stderr
        running.wait()
    (attempt,) = project.sweep("default").attempts
    assert attempt.kind is FailureKind.CANCELLED
    eventually(lambda: not any(alive(pid) for pid in pids(project)), "all ranks have ended")


def test_a_lost_node_is_the_clusters_fault_and_the_trial_runs_again(
    project: Project, cluster: Cluster
) -> None:
    with project.start(*on_two_nodes("together"), env=env(cluster)) as running:
        running.until(lambda: len(pids(project)) == 2, "both ranks run")
        cluster.node("node2").lose()
        running.until(lambda: ended(project), "the attempt ends")
        attempt = project.sweep("default").attempts[0]
        assert attempt.kind is FailureKind.NODE_LOST, attempt
        cluster.node("node2").start()
        running.until(lambda: len(project.sweep("default").attempts) == 2, "it runs again")
        assert len({each.worker for each in project.sweep("default").attempts}) == 2


def ended(project: Project) -> bool:
    found = Sweep.read(project.root / "multirun/default").attempts
    return bool(found) and found[0].ended_at is not None


def log_of(project: Project) -> str:
    logs = [*project.root.glob("multirun/*/slurm/*.out"), *project.root.glob("multirun/*/trials/*/*.log")]
    return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ("sweep/executor=local",),
            "sweep.resources.nodes_per_trial: 2 nodes need sweep/executor=slurm, this sweep has sweep/executor=local",
        ),
        (
            ("sweep.executor.slots=2",),
            (
                "sweep.executor.slots: must be 1 where a trial has several nodes"
                " (sweep.resources.nodes_per_trial is 2), got 2"
            ),
        ),
        (
            ("sweep.resources.nodes_per_trial=0",),
            "sweep.resources.nodes_per_trial: must be at least 1, got 0",
        ),
        (
            ("sweep.resources.nodes_per_trial=3",),
            "sweep.executor: 3 nodes with 1 GPUs, 1 CPUs are more than partition 'debug' has (2)",
        ),
        (
            ("x=1,2", "sweep.executor.nodes=3"),
            (
                "sweep.executor.nodes: a job has the nodes of one trial, sweep.resources.nodes_per_trial,"
                " which is 2; got 3"
            ),
        ),
    ],
)
def test_nodes_that_cannot_be_had_are_refused_in_one_line(
    overrides: tuple[str, ...], problem: str, project: Project, cluster: Cluster
) -> None:
    words = on_two_nodes("train", *overrides)
    if "sweep/executor=local" in overrides:
        words = tuple(
            word for word in words if not word.startswith(("sweep.executor.", "sweep/executor=slurm"))
        )
    result = project.run("plan", *words, env=env(cluster))
    assert result.returncode == 2
    assert result.stderr.splitlines() == [f"repro-sweep: {problem}"]


def test_the_plan_of_a_trial_on_two_nodes_shows_a_job_of_two_nodes(
    project: Project, cluster: Cluster
) -> None:
    result = project.run("plan", *on_two_nodes("train", "x=1,2"), env=env(cluster))
    assert result.returncode == 0, result.stderr
    for line in ("#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --signal=B:USR2@90"):
        assert line in result.stdout
    assert "2 nodes a trial, each with 1 CPUs, 1 GPUs" in result.stdout
    assert "2 nodes for one trial" in result.stdout
