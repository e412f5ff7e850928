"""Submit and leave: a sweep's coordinator as a SLURM job, looked after from a login node, on a real cluster.

Within a job a machine's name is its node's, so the test's own machine is another one than the coordinator's.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import CONSOLE_SCRIPT, MARK, Project, environment, eventually
from slurm_fakes import NO_ANSWER, calls, with_fake

from repro_sweep.states import FailureKind, TrialState
from slurm.testbed import Cluster, Options

pytest_plugins = ["slurm_cluster"]

MakeProject = Callable[..., Project]

ROOT = Path(__file__).parents[1]
SWEEP = (
    "+sweep=default", "sweep/executor=slurm", "sweep.task=tasks.train", "sweep.metric=score",
    "sweep.executor.workers=2", "sweep.executor.gpus_per_node=1", "sweep.resources.gpus_per_trial=1",
    "sweep.executor.host=127.0.0.1", "sweep.executor.poll_s=1", "sweep.executor.mem_gb=1",
    "sweep.executor.coordinator_mem_gb=1", "sweep.reuse=false",
)  # fmt: skip
SIX = (*SWEEP, "x=range(6)")
DETACHED = (*SIX, "sweep.detach=true")
FILES = {
    "conf/config.yaml": "x: 0",
    "tasks.py": """
        import os
        import time
        from pathlib import Path

        def train(cfg):
            Path("started").mkdir(exist_ok=True)
            Path("started", f"{cfg.x}-{os.getpid()}").write_text("")
            print(f"has x={cfg.x}", flush=True)
            deadline = time.monotonic() + 120
            while not (Path("open").exists() or Path(f"open-{cfg.x}").exists()):
                if time.monotonic() > deadline:
                    raise TimeoutError("nobody has opened the gate")
                time.sleep(0.02)
            return {"score": cfg.x}
    """,
}
BOUND_S = 60.0


class Site(Project):
    """A project whose commands use a cluster."""

    def __init__(self, project: Project, cluster: Cluster) -> None:
        super().__init__(project.root, project.mark)
        self.cluster = cluster
        self.env = {**cluster.exports(), "PATH": cluster.environment()["PATH"]}

    def command(self, *arguments: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        result = self.run(*arguments, env=self.env)
        assert code is None or result.returncode == code, f"{result.stdout}\n{result.stderr}"
        assert "Traceback" not in result.stderr
        return result

    def detach(self, *arguments: str) -> str:
        """Submit a detached sweep; returns the id of its coordinator's job."""
        found = re.search(r"job (\d+) runs sweep", self.command(*arguments).stderr)
        assert found is not None
        return found[1]

    def open(self, name: str = "open") -> None:
        """Let trials end."""
        (self.root / name).touch()

    def started(self) -> Counter[str]:
        """How often each trial has started."""
        folder = self.root / "started"
        return (
            Counter(path.name.partition("-")[0] for path in folder.iterdir())
            if folder.exists()
            else Counter()
        )

    def until_started(self, total: int) -> None:
        """Wait until so many trials have started."""
        eventually(lambda: self.started().total() >= total, f"{total} trials start", BOUND_S)

    def until_state(self, job: str, *states: str) -> None:
        """Wait until a job is in one of some states."""
        self.cluster.until(
            lambda: self.cluster.job_state(job) in states, f"job {job} is {' or '.join(states)}", BOUND_S
        )

    def coordinator(self) -> dict[str, object]:
        """Who coordinates the sweep, as it has announced itself."""
        eventually(self._announcement.exists, "a coordinator announces itself", BOUND_S)
        record: dict[str, object] = json.loads(self._announcement.read_text())
        return record

    def until_epoch(self, least: int) -> dict[str, object]:
        """Wait for a coordinator with at least this epoch."""

        def holds() -> bool:
            return (
                self._announcement.exists() and json.loads(self._announcement.read_text())["epoch"] >= least
            )

        eventually(holds, f"a coordinator of epoch {least} takes over", BOUND_S)
        return self.coordinator()

    def until_complete(self) -> None:
        """Wait until the sweep is complete, and see that no trial ran twice."""
        eventually(
            lambda: self.sweep("default").states() == {TrialState.COMPLETE: 6}, "all are complete", BOUND_S
        )
        assert self.started() == {str(x): 1 for x in range(6)}

    @property
    def _announcement(self) -> Path:
        return self.root / "multirun/default/coordinator.json"


@pytest.fixture
def site(make_project: MakeProject, cluster: Cluster) -> Iterator[Site]:
    """A project on the cluster; its jobs are gone at the end."""
    yield Site(make_project(FILES), cluster)
    cluster.clear()


def test_a_detached_sweep_completes_after_its_command_has_ended_and_is_looked_after_from_elsewhere(
    site: Site,
) -> None:
    """Status, attach, logs, cancel and rank reach a coordinator on another machine, with the sweep's token."""
    job = site.detach(*DETACHED)
    site.until_started(2)
    record = site.coordinator()
    assert str(record["host"]).startswith("node")
    status = json.loads(site.command("status", "default", "--json").stdout)
    assert status["coordinator"]["answers"]
    assert (status["coordinator"]["host"], status["slots"]) == (record["host"], 2)
    assert (status["job"]["id"], status["job"]["state"]) == (job, "RUNNING")
    assert f"on {record['host']}, job {job}, since" in site.command("status", "default").stdout
    assert "has x=0" in site.command("logs", "default/0").stdout
    second = site.command(*DETACHED, code=2)
    assert len(second.stderr.splitlines()) == 1
    assert f"already running: process {record['pid']} on {record['host']}" in second.stderr
    assert "trial 5 is cancelled" in site.command("cancel", "default", "5").stderr
    with site.start("attach", "default", env=site.env) as watching:
        watching.until(lambda: "2 running" in watching.stderr, "it shows the sweep")
        site.open()
        assert watching.wait(BOUND_S) == 0, watching.stderr
    site.until_state(job, "COMPLETED")
    assert site.sweep("default").states() == {TrialState.COMPLETE: 5, TrialState.FAIL: 1}
    assert site.started() == {str(x): 1 for x in range(5)}
    assert "1  4  4.0000" in site.command("rank", "default").stdout
    assert "is finished; nothing to run (1 cancelled" in site.command("resume", "default").stderr


def test_a_coordinators_job_whose_submission_is_not_answered_is_found_by_its_name(
    site: Site, tmp_path: Path
) -> None:
    """SLURM has it: a second one would be refused by the lease, and wait in vain."""
    env = with_fake("sbatch", site.env["PATH"], tmp_path, '"$REAL" "$@"' + NO_ANSWER)
    site.open()
    before = dict(site.env)
    site.env |= env
    job = site.detach(*DETACHED)
    site.env = before
    assert len(calls(tmp_path)) == 1
    site.until_complete()
    site.until_state(job, "COMPLETED")


def test_a_coordinator_that_waits_in_the_queue_is_shown_and_cancelled_and_nobody_else_may_start(
    site: Site,
) -> None:
    """It has not begun, and has no process to ask."""
    for node in ("node1", "node2"):
        site.cluster.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    try:
        job = site.detach(*DETACHED)
        assert f"job {job} waits in SLURM's queue" in site.command("status", "default").stdout
        for again in (DETACHED, SIX, ("resume", "default")):
            refused = site.command(*again, code=2)
            assert len(refused.stderr.splitlines()) == 1
            assert f"sweep 'default' waits to be run by job {job} (PENDING" in refused.stderr
        with site.start("attach", "default", env=site.env) as watching:
            watching.until(lambda: f"job {job} (PENDING" in watching.stderr, "it waits too")
        cancelled = site.command("cancel", "default")
        assert "sweep default is stopped: 6 waiting" in cancelled.stderr
        assert site.cluster.job_state(job) == "CANCELLED"
    finally:
        for node in ("node1", "node2"):
            site.cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    assert "coordinator  none; 'repro-sweep resume" in site.command("status", "default").stdout
    site.open()
    site.detach("resume", "default")
    site.until_complete()


def test_cancelling_a_detached_sweep_stops_its_workers_and_ends_its_coordinators_job(site: Site) -> None:
    """Its trials wait for the next start; as they are not complete, its job says that it failed."""
    job = site.detach(*DETACHED)
    site.until_started(2)
    cancelled = site.command("cancel", "default")
    assert "sweep default is stopped: 6 waiting; 'repro-sweep resume default' goes on" in cancelled.stderr
    site.until_state(job, "FAILED")
    site.cluster.until(lambda: not site.cluster.run("squeue", "--noheader"), "no job is left", BOUND_S)
    attempts = site.sweep("default").attempts
    assert [attempt.kind for attempt in attempts] == [FailureKind.CANCELLED] * 2


def test_a_killed_coordinator_of_a_job_is_replaced_within_a_minute_and_no_trial_runs_twice(
    site: Site,
) -> None:
    """By the job's keeper; the workers come to the new one over TCP."""
    job = site.detach(*DETACHED)
    site.until_started(2)
    first = site.coordinator()
    began = time.monotonic()
    os.kill(int(str(first["pid"])), signal.SIGKILL)
    second = site.until_epoch(int(str(first["epoch"])) + 1)
    assert time.monotonic() - began < 60
    assert (second["host"], second["pid"] != first["pid"]) == (first["host"], True)
    site.open()
    site.until_complete()
    site.until_state(job, "COMPLETED")


def test_a_coordinator_whose_time_is_nearly_over_hands_over_and_its_job_goes_on_later(site: Site) -> None:
    """USR2 is what SLURM sends before the time limit; the workers run on meanwhile."""
    job = site.detach(*DETACHED)
    site.until_started(2)
    epoch = int(str(site.coordinator()["epoch"]))
    site.cluster.run("scancel", "--batch", "--signal=USR2", job)
    site.until_state(job, "PENDING")
    assert [attempt.state for attempt in site.sweep("default").attempts] == [TrialState.RUNNING] * 2
    site.open("open-0")
    site.until_epoch(epoch + 1)
    assert site.cluster.job_state(job) == "RUNNING"
    site.open()
    site.until_complete()


def test_a_coordinator_and_workers_that_are_preempted_with_a_grace_time_go_on_later(
    make_project: MakeProject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """SLURM asks job steps to end at once, which the workers are; the coordinator is none, and is ended later."""
    folder = tmp_path_factory.mktemp("grace") / "cluster"
    with Cluster(folder, Options(nodes=1, gpus=2, cpus=8, grace_s=5, kill_wait_s=2)) as cluster:
        site = Site(make_project(FILES), cluster)
        job = site.detach(*DETACHED, "sweep.executor.partition=requeued")
        site.until_started(2)
        epoch = int(str(site.coordinator()["epoch"]))
        high = cluster.submit("--partition=high", "--cpus-per-task=8", script="sleep 2")
        site.until_state(high, "COMPLETED")
        site.open()
        site.until_epoch(epoch + 1)
        eventually(
            lambda: site.sweep("default").states() == {TrialState.COMPLETE: 6},
            "all are complete",
            2 * BOUND_S,
        )
        lost = Counter(each.kind for each in site.sweep("default").attempts if each.kind is not None)
        assert lost == {FailureKind.PREEMPTED: 2}
        site.until_state(job, "COMPLETED")


def test_when_the_coordinators_job_is_cancelled_its_workers_finish_what_they_run_and_resume_goes_on(
    site: Site,
) -> None:
    """The user has cancelled one job, not the sweep."""
    job = site.detach(*DETACHED)
    site.until_started(2)
    site.cluster.run("scancel", job)
    site.until_state(job, "CANCELLED")
    site.open()
    kept = site.root / "multirun/default/workers"
    eventually(lambda: len(list(kept.glob("*/results/*.json"))) == 2, "both results are on disk", BOUND_S)
    assert site.started().total() == 2
    assert "'repro-sweep resume default' goes on" in site.command("status", "default").stdout
    site.detach("resume", "default")
    site.until_complete()


SESSION = """
import subprocess, sys, time
subprocess.run(sys.argv[1:])
time.sleep(300)
"""


def test_killing_the_login_session_changes_nothing_for_a_detached_sweep(site: Site) -> None:
    """Whatever the shell had started is killed with it."""
    session = subprocess.Popen(
        [sys.executable, "-c", SESSION, CONSOLE_SCRIPT, *DETACHED], cwd=site.root, start_new_session=True,
        env=environment({MARK: site.mark, **site.env}), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    site.until_started(2)
    os.killpg(session.pid, signal.SIGKILL)
    session.wait(BOUND_S)
    site.open()
    site.until_complete()


def test_killing_the_login_session_of_an_attached_sweep_leaves_its_workers_at_work_and_resume_completes_it(
    site: Site,
) -> None:
    """Its coordinator, tracker and all die at once."""
    with site.start(*SIX, env=site.env) as command:
        site.until_started(2)
        os.killpg(command.process.pid, signal.SIGKILL)
        command.wait()
    site.open()
    kept = site.root / "multirun/default/workers"
    eventually(lambda: len(list(kept.glob("*/results/*.json"))) == 2, "both results are on disk", BOUND_S)
    site.command("resume", "default")
    site.until_complete()


def test_a_sweep_runs_the_traditional_way_by_sbatch_and_goes_on_when_it_is_requeued(site: Site) -> None:
    """The same job again does not begin anew."""
    words = ("sbatch", "--parsable", "--mem=1G", ROOT / "slurm/sweep.sbatch", *SIX)
    environ = environment({MARK: site.mark, **site.env})
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    done = subprocess.run(words, cwd=site.root, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    site.until_started(2)
    epoch = int(str(site.coordinator()["epoch"]))
    site.cluster.run("scontrol", "requeue", job)
    site.until_epoch(epoch + 1)
    site.open()
    site.until_complete()
    site.until_state(job, "COMPLETED")
    assert "6 complete" in (site.root / f"repro-sweep-{job}.out").read_text()


def test_a_sweep_that_runs_where_its_command_does_cannot_be_detached(make_project: MakeProject) -> None:
    """Nothing is written."""
    project = make_project(FILES)
    refused = project.run(
        "+sweep=default", "sweep.task=tasks.train", "sweep.metric=score", "x=1,2", "sweep.detach=true"
    )
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert "sweep.detach: sweep/executor=local runs where the command does; choose" in refused.stderr
    assert not (project.root / "multirun").exists()


PROFILES = sorted((ROOT / "slurm/profiles").glob("*.yaml"))


def test_every_site_profile_composes_with_the_real_options(make_bare_project: MakeProject) -> None:
    """And none can have a key that is not an option."""
    assert len(PROFILES) >= 4
    project = make_bare_project(
        {
            "conf/config.yaml": "x: 0",
            "look.py": """
                import sys
                from hydra import compose, initialize_config_dir
                from hydra.core.global_hydra import GlobalHydra
                from omegaconf import OmegaConf
                from repro_sweep.config import schema
                from repro_sweep.executors import slurm
                schema.register()
                for name in sys.argv[2:]:
                    with initialize_config_dir(sys.argv[1], version_base="1.3"):
                        options = compose("config", ["+sweep=default", f"sweep/executor={name}"]).sweep.executor
                    assert OmegaConf.get_type(options) is slurm.Options
                    print(name, options.workers)
            """,
            **{f"conf/sweep/executor/{path.name}": path.read_text() for path in PROFILES},
            "conf/sweep/executor/wrong.yaml": "defaults: [slurm, _self_]\npartitoin: gpu\n",
        }
    )
    conf = str(project.root / "conf")
    composed = project.run("look.py", conf, *(path.stem for path in PROFILES), python=True)
    assert composed.returncode == 0, composed.stderr
    assert [line.split()[0] for line in composed.stdout.splitlines()] == [path.stem for path in PROFILES]
    wrong = project.run("look.py", conf, "wrong", python=True)
    assert wrong.returncode != 0
    assert "Key 'partitoin' not in 'Options'" in wrong.stderr
