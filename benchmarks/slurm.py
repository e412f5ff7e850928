"""``slurm_noop`` and ``slurm_slots``: on a real cluster of this machine, beside Hydra's own launcher for SLURM."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import harness, peers
from benchmarks.harness import Project, Times
from benchmarks.report import OURS, Row, Table, Target
from benchmarks.spans import Span
from slurm.testbed import Cluster, Options, TestbedError

# the newest of the launcher, which pins nothing that we need; its environment has nothing of ours, as a user's would
PACKAGES = ("hydra-submitit-launcher==1.2.0", "hydra-core==1.3.2", "submitit==1.5.4", "omegaconf==2.3.1")
_PEER = "hydra-submitit-launcher"
_GPUS = 4
_SLEEP_S = 0.1
_LOOKS, _LOOK_S = 20, 2.0


def noop(folder: Path, *, quick: bool) -> Table:
    """Seconds from the command to its end, which is the ranking for us, of trials that do nothing."""
    trials = 8 if quick else 40
    python = peers.python(harness.cache(), _PEER, PACKAGES)
    with _cluster(folder) as cluster:
        project = _project(folder, cluster, trials)
        ours = project.sweep(trials, *_OURS, "sweep.executor.workers=2", "sweep.executor.gpus_per_node=2")
        jobs = _jobs(cluster)
        theirs = project.peer(_theirs(trials), trials, python=python)
        their_jobs = _jobs(cluster) - jobs
    return Table(
        title="slurm_noop: what a sweep of many small trials costs on SLURM",
        text=f"{trials} trials that do nothing, each with a GPU of its own, on {_GPUS} GPUs of a cluster of two nodes"
        " that has nothing else to do; from the command's start to its end. For us that includes the upload to MLflow,"
        " into an empty store as `mlflow` makes it, and the ranking; the peer has neither.",
        unit="s",
        rows=[
            Row(system=OURS, value=ours.command_s, note=f"{jobs} jobs; {_parts(ours)}"),
            Row(system=_PEER, value=theirs.command_s, note=f"{their_jobs} jobs; {_parts(theirs)}"),
        ],
        targets=[
            Target(what="command to ranking", value=ours.command_s, limit=theirs.command_s / 3, unit="s")
        ],
    )


def slots(folder: Path, *, quick: bool) -> Table:
    """How full the slots of four workers are whose trials take a tenth of a second."""
    trials, few = (100, 8) if quick else (1000, 40)
    python = peers.python(harness.cache(), _PEER, PACKAGES)
    with _cluster(folder) as cluster:
        project = _project(folder, cluster, trials, body=f"time.sleep({_SLEEP_S})")
        ours = project.sweep(trials, *_OURS, "sweep.executor.workers=4", "sweep.executor.gpus_per_node=1")
        jobs = _jobs(cluster)
        busy, by_stamps = _busy(project.ledger()), _busy(project.stamps(trials))
        theirs = project.peer(_theirs(few), few, python=python)
        their_jobs, their_busy = _jobs(cluster) - jobs, _busy(project.stamps(few))
    return Table(
        title="slurm_slots: how full the GPUs of a SLURM cluster are",
        text=f"Trials of {_SLEEP_S:g} s, each with a GPU of its own, on {_GPUS} GPUs: {trials:,} of ours by four"
        f" workers, {few} of the peer's; from the first start to the last end, divided by the number of trials. A slot"
        " is busy while a trial is handed out to it; slots count from the first start of all to the last end.",
        unit="ms a trial",
        rows=[
            Row(
                system=OURS, value=ours.per_trial_ms,
                note=f"{jobs} jobs in sacct; slots {_percent(by_stamps)} busy; {_parts(ours)}",
            ),
            Row(
                system=f"{OURS}, ledger", value=ours.ledger_s / trials * 1000,
                note=f"slots {_percent(busy)} busy",
            ),
            Row(
                system=_PEER, value=theirs.per_trial_ms,
                note=f"{their_jobs} jobs in sacct; slots {_percent(their_busy)} busy; {_parts(theirs)}",
            ),
        ],
        ideal=_SLEEP_S / _GPUS * 1000,
        ideal_is=f"{_SLEEP_S * 1000:g} ms / {_GPUS} slots",
        targets=[
            Target(what="jobs in sacct", value=jobs, limit=4, unit="jobs"),
            Target(what="slots' idle time (ledger)", value=100 * (1 - busy), limit=10.0, unit="%"),
        ],
    )  # fmt: skip


_OURS = (
    "sweep/executor=slurm", "sweep.resources.gpus_per_trial=1", "sweep.executor.timeout_min=10",
    "sweep.executor.host=127.0.0.1",
)  # fmt: skip


def _theirs(trials: int) -> list[str]:
    launcher = ("gpus_per_node=1", "cpus_per_task=1", "timeout_min=10")
    return [
        "app.py", "--multirun", "hydra.sweep.dir=multirun/peer", "hydra/launcher=submitit_slurm",
        *(f"hydra.launcher.{option}" for option in launcher), f"x=range({trials})",
    ]  # fmt: skip


@contextlib.contextmanager
def _cluster(folder: Path) -> Iterator[Cluster]:
    try:
        with Cluster(folder / "cluster", Options(nodes=2, gpus=_GPUS // 2, cpus=8)) as cluster:
            yield cluster
    except TestbedError as error:
        raise harness.BenchmarkError(f"the cluster: {error}") from error


def _project(folder: Path, cluster: Cluster, trials: int, body: str = "pass") -> Project:
    env = {**cluster.exports(), "PATH": cluster.environment()["PATH"]}
    project = Project(folder / "project", params=f"{{x: range({trials})}}", body=body, env=env)
    project.make_store()
    return project


def _jobs(cluster: Cluster) -> int:
    """How many jobs the accounting has, when it has heard of all ends: it lags some seconds behind."""
    command = ("sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State")
    cluster.until(lambda: not cluster.run("squeue", "--noheader"), "no job is left")
    seen: list[str] = []
    for _ in range(_LOOKS):
        time.sleep(_LOOK_S)
        before, seen = seen, cluster.run(*command).splitlines()
        if seen == before and all("COMPLETED" in line for line in seen):
            return len(seen)
    raise harness.BenchmarkError(f"sacct says of the jobs: {', '.join(seen)}")


def _busy(spans: list[Span]) -> float:
    """Which part of the GPUs' time was filled, from the first start to the last end."""
    makespan = max(span.ended_s for span in spans) - min(span.started_s for span in spans)
    return sum(span.ended_s - span.started_s for span in spans) / (_GPUS * makespan)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _parts(times: Times) -> str:
    """First start and what follows the last end, where the command's time went besides."""
    return f"first start after {times.first_start_s:.1f} s, over {times.after_s:.1f} s after the last end"
