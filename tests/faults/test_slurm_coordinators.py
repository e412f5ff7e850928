"""The same on a real SLURM cluster: whenever a coordinator dies, its workers' jobs go on, and the next one has them."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable

from chaos import Finished, Swarm, kill, kill_coordinators, wait_at_most
from helpers import eventually

from repro_sweep.failpoints import ENVIRONMENT
from slurm.testbed import Cluster

pytest_plugins = ["slurm_cluster"]

Size = Callable[[int, int], int]

COORDINATOR = "repro_sweep.cli.coordinate"
OPTIONS = (
    "sweep/executor=slurm", "sweep.executor.gpus_per_node=0", "sweep.executor.host=127.0.0.1",
    "sweep.executor.poll_s=1", "sweep.executor.mem_gb=1", "sweep.executor.coordinator_mem_gb=1",
)  # fmt: skip
DEATHS = (
    "lease.taken", "record.committed", "lease.announced", "workers.before_start", "workers.started",
    "register.received", "claim.answering", "report.received", "heartbeat.received",
    "heartbeat.answering",
)  # fmt: skip
LAST = ("sweep.over", "lease.before_release")


def test_a_coordinator_killed_at_random_instants_leaves_its_slurm_jobs_at_work(
    make_swarm: Callable[..., Swarm],
    undisturbed: Callable[[int], Finished],
    cluster: Cluster,
    rng: random.Random,
    size: Size,
    figures: Callable[..., None],
) -> None:
    """Each trial is executed exactly once, by the one job there is."""
    trials, kills, pause_s = size(60, 300), size(4, 30), 0.06
    expected = undisturbed(trials)
    swarm, env = make_swarm(trials, *OPTIONS, pause_s=pause_s, sweep="random"), _environment(cluster)
    swarm.hold(str(trials - 1))
    kill_coordinators(swarm, kills, rng, pause_s=pause_s, start_s=3.0, **env)
    swarm.release()
    with swarm.start(**env) as command:
        assert command.wait(300) == 0, command.stderr
    verdict = swarm.verdict(expected)
    figures(kills=kills, jobs=_jobs(swarm, cluster), **verdict.counted)
    assert verdict.wrong == {}, verdict.remarks
    assert verdict.executions == trials, "a trial was executed again though its worker was alive"


def test_a_coordinator_killed_where_it_submits_jobs_or_answers_them(
    make_swarm: Callable[..., Swarm],
    undisturbed: Callable[[int], Finished],
    cluster: Cluster,
    figures: Callable[..., None],
) -> None:
    """One sweep dies at one place after the other; no job is submitted that is not needed."""
    trials = 100
    expected = undisturbed(trials)
    swarm, env = make_swarm(trials, *OPTIONS, pause_s=0.1, sweep="places"), _environment(cluster)
    for name in (*DEATHS, *LAST):
        with swarm.start(**env, **{ENVIRONMENT: name}) as command:
            assert command.wait(120) == -signal.SIGKILL, f"{name} is not reached\n{command.stderr}"
        assert name in LAST or swarm.count("end") < trials, "too few trials to die everywhere"
    with swarm.start(**env) as command:
        assert command.wait(300) == 0, command.stderr
    verdict = swarm.verdict(expected)
    jobs = _jobs(swarm, cluster)
    figures(kills=len(DEATHS) + len(LAST), jobs=jobs, **verdict.counted)
    assert verdict.wrong == {}, verdict.remarks
    assert verdict.executions == trials, "a trial was executed again though its worker was alive"
    assert jobs == 1


def test_a_detached_coordinator_killed_at_random_instants_starts_again_in_its_job(
    make_swarm: Callable[..., Swarm],
    undisturbed: Callable[[int], Finished],
    cluster: Cluster,
    rng: random.Random,
    figures: Callable[..., None],
) -> None:
    """With nobody there to do it: no more often than its job takes as bad luck."""
    trials, kills = 60, 4
    expected = undisturbed(trials)
    swarm, env = make_swarm(trials, *OPTIONS, pause_s=0.06, sweep="detached"), _environment(cluster)
    swarm.hold(str(trials - 1))
    with swarm.start("sweep.detach=true", **env) as command:
        assert command.wait(60) == 0, command.stderr
    for _ in range(kills):
        before = swarm.epoch
        eventually(lambda: swarm.pids(COORDINATOR), "the job has a coordinator", 60)
        wait_at_most(rng.random() * 4, lambda: False)
        for pid in swarm.pids(COORDINATOR):
            kill(pid)
        eventually(lambda before=before: swarm.epoch > before, "another one takes over", 60)
    swarm.release()
    eventually(lambda: swarm.count("end") == trials, "all trials have ended", 120)
    eventually(lambda: not swarm.project.processes(), "the job has ended", 120)
    verdict = swarm.verdict(expected)
    figures(kills=kills, jobs=_jobs(swarm, cluster), **verdict.counted)
    assert verdict.wrong == {}, verdict.remarks
    assert verdict.executions == trials, "a trial was executed again though its worker was alive"


def _environment(cluster: Cluster) -> dict[str, str]:
    return {**cluster.exports(), "PATH": cluster.environment()["PATH"]}


def _jobs(swarm: Swarm, cluster: Cluster) -> int:
    """How many jobs with workers there were."""
    names = cluster.run("squeue", "--noheader", "--states=all", "--format=%j").split()
    return sum(name.startswith(f"{swarm.name}.") and ".coordinator." not in name for name in names)
