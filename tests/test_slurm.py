"""A sweep whose workers are jobs of a real SLURM cluster: it runs, and survives what clusters do to jobs."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import stat
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from helpers import MARK, MakeProject, Project, eventually, run
from slurm_fakes import NO_ANSWER, calls, with_fake

from repro_sweep import jobs
from repro_sweep.executors import slurm as slurm_executor
from repro_sweep.executors.base import Context, Executor
from repro_sweep.ledger import Ledger
from repro_sweep.states import FailureKind, TrialState
from repro_sweep.submitting import TooManyJobsError
from repro_sweep.sweep import SweepSpec
from repro_sweep.testing.executors import ExecutorConformance, sweep
from slurm.testbed import Cluster, Options

pytest_plugins = ["slurm_cluster"]

COMPLETE = TrialState.COMPLETE
CPU_ONLY = (
    "sweep.executor.gpus_per_node=0",
    "sweep.executor.cpus_per_task=1",
    "sweep.resources.gpus_per_trial=0",
)
FILES = {
    "conf/config.yaml": "{x: 0, wait_s: 0.0, steps: 1}",
    "conf/sweep/grid.yaml": """
        defaults: [base_sweep, sampler: grid, executor: slurm, _self_]
        task: tasks.train
        metric: score
        executor:
          {workers: 2, gpus_per_node: 2, timeout_min: 30, host: 127.0.0.1, poll_s: 1.0, signal_delay_s: 60}
    """,
    "tasks.py": """
        import os
        import time
        from pathlib import Path

        import repro_sweep

        def train(cfg):
            with open("ran", "a") as ran:
                print(cfg.x, os.environ["SLURMD_NODENAME"], os.environ.get("CUDA_VISIBLE_DEVICES"), file=ran)
            kept = repro_sweep.checkpoint_dir() / "step"
            first = int(kept.read_text()) if kept.exists() else 0
            for step in range(first, cfg.steps):
                time.sleep(cfg.wait_s)
                new = kept.with_name(f"step-{os.getpid()}")
                new.write_text(str(step + 1))
                new.replace(kept)
                repro_sweep.report(step, score=cfg.x)
            return {"score": cfg.x, "first": first}
    """,
}


class Place:
    """A project whose sweeps run on the cluster."""

    def __init__(self, project: Project, cluster: Cluster) -> None:
        self.project, self.cluster = project, cluster
        self.env = {
            key: value for key, value in cluster.environment().items() if key in ("PATH", "SLURM_CONF")
        }

    def run(self, *arguments: str, env: dict[str, str] | None = None, status: int = 0) -> str:
        """Run the command to its end; returns what it said."""
        done = self.project.run(*arguments, env=self.env | (env or {}))
        assert done.returncode == status, done.stderr
        return done.stderr

    def jobs(self) -> list[str]:
        """The sweep's jobs, each with its state, once accounting has heard of all ends: it lags some seconds behind."""
        records = list((self.project.root / "multirun/grid/slurm").glob("*.json"))
        mine = {json.loads(path.read_text())["name"] for path in records}
        command = ("sacct", "--noheader", "--allocations", "--parsable2", "--format=JobName,JobID,State")
        found: list[str] = []

        def all_have_ended() -> bool:
            found[:] = [
                line for line in self.cluster.run(*command).splitlines() if line.partition("|")[0] in mine
            ]
            open_ones = [line for line in found if line.endswith(("|RUNNING", "|PENDING"))]
            return not open_ones and {line.partition("|")[0] for line in found} == mine

        eventually(all_have_ended, "accounting knows how all jobs have ended", 60)
        return found

    def queue(self) -> list[str]:
        """The ids of the workers' jobs that run or wait."""
        lines = self.cluster.run("squeue", "--noheader", "--array", "--format=%j|%i").splitlines()
        return [line.partition("|")[2] for line in lines if line.startswith("grid.")]

    def executed(self) -> Counter[str]:
        """How often each trial was executed, by its x."""
        path = self.project.root / "ran"
        return (
            Counter(line.split()[0] for line in path.read_text().splitlines()) if path.exists() else Counter()
        )

    def states(self) -> Counter[TrialState]:
        """How many trials are in each state."""
        return self.project.sweep("grid").states()

    def failures(self) -> list[str | None]:
        """What the attempts said that were the trials' own fault."""
        clusters = (None, FailureKind.PREEMPTED, FailureKind.NODE_LOST)
        return [each.message for each in self.project.sweep("grid").attempts if each.kind not in clusters]

    def kinds(self) -> Counter[FailureKind]:
        """How often attempts have failed as each kind."""
        return Counter(each.kind for each in self.project.sweep("grid").attempts if each.kind is not None)


@pytest.fixture
def place(make_project: MakeProject, cluster: Cluster) -> Place:
    """A small project and an idle cluster."""
    return Place(make_project(FILES), cluster)


def test_a_grid_runs_on_all_gpus_of_its_jobs(place: Place) -> None:
    place.run("+sweep=grid", "x=range(16)", "wait_s=0.2")
    assert place.states() == {COMPLETE: 16}
    assert set(place.executed().values()) == {1}
    used = {tuple(line.split()[1:]) for line in (place.project.root / "ran").read_text().splitlines()}
    assert used == {(node, gpu) for node in ("node1", "node2") for gpu in ("0", "1")}
    assert [job.split("|")[2] for job in place.jobs()] == ["COMPLETED"] * 2
    assert place.queue() == []


def test_few_trials_start_few_jobs_and_half_a_gpu_makes_two_slots(place: Place) -> None:
    place.run("+sweep=grid", "x=range(4)", "wait_s=0.5", "sweep.resources.gpus_per_trial=0.5")
    assert place.states() == {COMPLETE: 4}
    assert len(place.jobs()) == 1
    slots = Counter(line.split()[2] for line in (place.project.root / "ran").read_text().splitlines())
    assert slots == {"0": 2, "1": 2}


def test_a_trial_may_have_two_gpus(place: Place) -> None:
    place.run("+sweep=grid", "x=1,2", "sweep.resources.gpus_per_trial=2")
    gpus = [line.split()[2] for line in (place.project.root / "ran").read_text().splitlines()]
    assert gpus == ["0,1"] * 2


def test_a_sweep_is_run_again_on_the_cluster(place: Place) -> None:
    """What one machine has submitted comes out the same in jobs of another sweep."""
    place.run("+sweep=grid", "x=range(4)", *CPU_ONLY)
    options = (
        "workers=2",
        "timeout_min=30",
        "host=127.0.0.1",
        "poll_s=1.0",
        "gpus_per_node=0",
        "cpus_per_task=1",
    )
    done = place.project.run(
        "reproduce", "grid", "--all", "--format", "json", "sweep/executor=slurm",
        *(f"sweep.executor.{each}" for each in options), env=place.env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    assert [each["verdict"] for each in json.loads(done.stdout)] == ["EXACT"] * 4
    [again] = (place.project.root / "reproduced").glob("grid-*")
    assert list((again / "slurm").glob("*.json"))


def test_the_token_is_in_a_file_of_the_users_only_and_who_has_it_not_is_refused(place: Place) -> None:
    with place.project.start("+sweep=grid", "x=range(4)", "wait_s=1", "steps=600", env=place.env) as running:
        running.until(lambda: len(place.executed()) == 4, "all trials have begun")
        folder = place.project.root / "multirun/grid"
        path = folder / "coordinator.json"
        record = json.loads(path.read_text())
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE((folder / "slurm").stat().st_mode) == 0o700
        for token in ("", "wrong"):
            request = urllib.request.Request(
                f"http://{record['tcp'][0]}/status", b"{}", {"Authorization": f"Bearer {token}"}
            )
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=10)
            refused.value.close()
            assert refused.value.code == 401
        found = [pid for pid in place.project.processes() if _knows(pid, record["token"])]
        assert found == []
        assert not any(
            record["token"] in each.read_text() for each in (folder / "slurm").iterdir() if each.is_file()
        )
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == 130
    assert place.queue() == []


def _knows(pid: int, token: str) -> bool:
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return token.encode() in text


def test_the_trials_of_a_cancelled_job_go_to_the_others(place: Place) -> None:
    with place.project.start("+sweep=grid", "x=range(8)", "wait_s=0.2", "steps=10", env=place.env) as running:
        running.until(lambda: len(place.executed()) >= 4, "four trials have begun")
        place.cluster.run("scancel", place.queue()[0])
        assert running.wait() == 0, running.stderr
    assert place.states() == {COMPLETE: 8}
    assert place.kinds().keys() <= {FailureKind.PREEMPTED, FailureKind.NODE_LOST}
    assert place.kinds().total() == 2
    assert len(place.jobs()) == 2


def test_a_sweep_whose_jobs_are_all_cancelled_pauses_and_says_how_to_go_on(place: Place) -> None:
    with place.project.start("+sweep=grid", "x=range(6)", "wait_s=0.2", "steps=10", env=place.env) as running:
        running.until(lambda: len(place.executed()) >= 4, "four trials have begun")
        place.cluster.run("scancel", *place.queue())
        assert running.wait() == 130, running.stderr
        assert "all of its workers were cancelled" in running.stderr
        assert "repro-sweep resume grid" in running.stderr
    assert TrialState.FAIL not in place.states()
    place.run("resume", "grid")
    assert place.states() == {COMPLETE: 6}


@pytest.mark.parametrize("partition", ["requeued", "cancelled"])
def test_preempted_jobs_hand_their_trials_back_which_go_on_from_their_checkpoints(
    place: Place, partition: str
) -> None:
    options = ("x=range(4)", "wait_s=0.2", "steps=30", f"sweep.executor.partition={partition}")
    with place.project.start("+sweep=grid", *options, env=place.env) as running:
        running.until(lambda: _reported(place) >= 12, "the trials have got somewhere")
        high = place.cluster.submit("--partition=high", "--nodes=2", "--gpus-per-node=2", script="sleep 3")
        place.cluster.until(
            lambda: place.cluster.job_state(high) == "COMPLETED", "the other job has ended", 90
        )
        assert running.wait() == 0, running.stderr
    assert place.states() == {COMPLETE: 4}
    assert set(place.kinds()) <= {FailureKind.PREEMPTED, FailureKind.NODE_LOST}
    assert place.kinds()[FailureKind.PREEMPTED] >= 2
    sweep = place.project.sweep("grid")
    assert all(sweep.last_attempt(trial).metrics["first"] > 0 for trial in sweep.trials)


def test_the_trials_of_a_suspended_job_go_to_another_one_with_free_slots(place: Place) -> None:
    """And the job goes on when it may, with nothing that runs elsewhere."""
    options = (
        "wait_s=0.2",
        "steps=60",
        "sweep.executor.partition=suspended",
        "sweep.executor.cpus_per_task=4",
    )
    with place.project.start("+sweep=grid", "x=range(4)", *options, env=place.env) as running:
        running.until(lambda: _reported(place) >= 12, "the trials have got somewhere")
        high = place.cluster.submit(
            "--partition=high", "--cpus-per-task=4", "--nodelist=node1", script="sleep 600"
        )
        place.cluster.until(
            lambda: place.cluster.job_state(high) == "RUNNING", "a job is suspended for it", 60
        )
        running.until(lambda: place.kinds()[FailureKind.PREEMPTED] == 2, "two attempts are over")
        running.until(lambda: place.executed().total() == 6, "their trials run elsewhere")
        place.cluster.run("scancel", high)
        code = running.wait()
    assert place.failures() == []
    assert code == 0, running.stderr
    assert place.states() == {COMPLETE: 4}
    assert place.kinds() == {FailureKind.PREEMPTED: 2}
    messages = {each.message for each in place.project.sweep("grid").attempts if each.kind is not None}
    assert all("its worker is SUSPENDED (job " in str(message) for message in messages)
    assert sorted(place.executed().values()) == [1, 1, 2, 2]
    assert place.queue() == []


def _reported(place: Place) -> int:
    path = place.project.root / "multirun/grid/ledger.db"
    if not path.exists():
        return 0
    ledger = Ledger.open(path.parent, readonly=True)
    try:
        return len(ledger.reports())
    finally:
        ledger.close()


def test_trials_are_interrupted_before_the_time_limit_and_go_on_in_the_next_job(place: Place) -> None:
    """A limit of a minute, of which the last 50 seconds are for leaving."""
    options = (
        "x=1,2",
        "wait_s=0.5",
        "steps=50",
        "sweep.executor.timeout_min=1",
        "sweep.executor.signal_delay_s=50",
    )
    place.run("+sweep=grid", *options)
    sweep = place.project.sweep("grid")
    assert sweep.states() == {COMPLETE: 2}
    assert set(place.kinds()) == {FailureKind.PREEMPTED}
    messages = {each.message for each in sweep.attempts if each.kind is FailureKind.PREEMPTED}
    assert all("its worker must leave" in str(message) for message in messages)
    assert all(sweep.last_attempt(trial).metrics["first"] > 0 for trial in sweep.trials)


def test_jobs_outlive_a_killed_coordinator_and_the_next_one_finds_them(place: Place) -> None:
    with place.project.start("+sweep=grid", "x=range(8)", "wait_s=0.2", "steps=20", env=place.env) as running:
        running.until(lambda: len(place.executed()) >= 4, "four trials have begun")
        running.process.kill()
        running.wait()
    assert len(place.queue()) == 2
    place.run("resume", "grid")
    assert place.states() == {COMPLETE: 8}
    assert set(place.executed().values()) == {1}
    assert len(place.jobs()) == 2


def test_the_trials_of_a_lost_node_run_elsewhere(place: Place) -> None:
    with place.project.start("+sweep=grid", "x=range(6)", "wait_s=0.2", "steps=15", env=place.env) as running:
        running.until(lambda: len(place.executed()) >= 4, "four trials have begun")
        place.cluster.node("node2").lose()
        running.until(lambda: place.kinds()[FailureKind.NODE_LOST] == 2, "two attempts are lost")
        place.cluster.node("node2").start()
        assert running.wait() == 0, running.stderr
    assert place.states() == {COMPLETE: 6}
    assert place.kinds() == {FailureKind.NODE_LOST: 2}


def test_two_minutes_without_controller_and_accounting_cost_only_what_nobody_could_see(place: Place) -> None:
    """A node is lost meanwhile: that its workers are silent is all that tells."""
    with place.project.start(
        "+sweep=grid", "x=range(10)", "wait_s=0.5", "steps=60", env=place.env
    ) as running:
        running.until(lambda: len(place.executed()) >= 4, "four trials have begun")
        away = time.monotonic()
        place.cluster.controller.stop()
        place.cluster.accounting.stop()
        place.cluster.node("node2").lose()
        running.until(lambda: place.kinds()[FailureKind.NODE_LOST] == 2, "the silent worker is given up")
        running.until(lambda: time.monotonic() - away > 120, "two minutes are over")
        place.cluster.accounting.start()
        place.cluster.controller.start()
        place.cluster.node("node2").start()
        running.until(lambda: place.states()[COMPLETE] == 10, "all trials are complete")
        assert running.wait() == 0, running.stderr
    assert place.kinds() == {FailureKind.NODE_LOST: 2}
    assert sorted(place.executed().values()) == [1] * 8 + [2] * 2


def test_a_sweep_ends_while_the_controller_is_away(place: Place) -> None:
    """All its trials are done; nothing more is to be waited for."""
    with place.project.start("+sweep=grid", "x=range(8)", "wait_s=0.2", "steps=10", env=place.env) as running:
        running.until(lambda: len(place.executed()) >= 4, "four trials have begun")
        place.cluster.controller.stop()
        try:
            assert running.wait() == 0, running.stderr
        finally:
            place.cluster.controller.start()
    assert place.states() == {COMPLETE: 8}
    assert not place.kinds()


@pytest.mark.parametrize("daemon", ["controller", "accounting"])
def test_a_sweep_goes_on_while_slurm_itself_is_away(place: Place, daemon: str) -> None:
    down = getattr(place.cluster, daemon)
    with place.project.start("+sweep=grid", "x=range(8)", "wait_s=0.2", "steps=15", env=place.env) as running:
        running.until(lambda: len(place.executed()) >= 4, "four trials have begun")
        down.stop()
        running.until(lambda: place.states()[COMPLETE] >= 6, "six trials are complete")
        down.start()
        assert running.wait() == 0, running.stderr
    assert place.states() == {COMPLETE: 8}
    assert set(place.executed().values()) == {1}
    assert not place.kinds()


def test_without_accounting_and_with_small_arrays_it_runs_as_well(
    make_project: MakeProject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What has ended is seen in the queue, while that remembers it."""
    folder = tmp_path_factory.mktemp("bare") / "cluster"
    options = Options(nodes=3, gpus=1, cpus=8, accounting=False, max_array_size=5, kill_wait_s=2)
    with Cluster(folder, options) as cluster:
        place = Place(make_project(FILES), cluster)
        place.run("+sweep=grid", "x=range(7)", "wait_s=0.3", "steps=3", "sweep.executor.workers=7", *CPU_ONLY)
        assert place.states() == {COMPLETE: 7}
        records = (place.project.root / "multirun/grid/slurm").glob("*.json")
        assert sorted(json.loads(path.read_text())["count"] for path in records) == [2, 5]
        assert place.queue() == []


REFUSES_ALL_BUT_ONE = """
case "$(cat "$1")" in *--array=*) many=1;; esac
if [ -z "$many" ] && [ "$(wc -l <"$CALLS")" -lt 4 ]; then exec "$REAL" "$@"; fi
echo "sbatch: error: AssocMaxSubmitJobLimit" >&2
echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit)" >&2
exit 1
"""


def test_a_submission_whose_reply_is_lost_is_found_by_its_name_and_not_repeated(
    place: Place, tmp_path: Path
) -> None:
    env = with_fake("sbatch", place.env["PATH"], tmp_path, '"$REAL" "$@"' + NO_ANSWER)
    place.run("+sweep=grid", "x=range(8)", "wait_s=0.2", env=env)
    assert place.states() == {COMPLETE: 8}
    assert len(calls(tmp_path)) == 1
    assert len(place.jobs()) == 2


def test_a_submission_that_slurm_has_never_got_is_repeated_once_that_is_sure(
    place: Place, tmp_path: Path
) -> None:
    env = with_fake(
        "sbatch", place.env["PATH"], tmp_path, '[ "$(wc -l <"$CALLS")" = 1 ] || exec "$REAL" "$@"' + NO_ANSWER
    )
    place.run("+sweep=grid", "x=range(4)", env=env)
    assert place.states() == {COMPLETE: 4}
    lost, sent = (float(line.split()[0]) for line in calls(tmp_path))
    assert sent - lost > 30


def test_as_many_workers_run_as_slurm_takes_and_the_others_are_submitted_when_it_takes_more(
    place: Place, tmp_path: Path
) -> None:
    """Here: one job at a time, and no array; the fourth call is the next look's."""
    env = with_fake("sbatch", place.env["PATH"], tmp_path, REFUSES_ALL_BUT_ONE)
    said = place.run("+sweep=grid", "x=range(16)", "wait_s=0.5", "sweep.executor.workers=4", env=env)
    assert place.states() == {COMPLETE: 16}
    assert said.count("AssocMaxSubmitJobLimit") == 1, said
    assert "SLURM takes no more jobs for now" in said
    assert 1 <= len(place.jobs()) <= 3
    assert place.queue() == []


def test_while_slurm_refuses_many_jobs_there_never_seem_to_be_too_few(tmp_path: Path) -> None:
    """Else more would be started, again and again."""
    spec = sweep(tmp_path)
    executor = slurm_executor.SlurmExecutor(
        Context(spec=spec, socket=""), slurm_executor.Options(workers=8, poll_s=60)
    )
    counts: list[int] = []

    class Refusing:
        def __init__(self, *_: object) -> None:
            pass

        def submit(self, command: str, count: int) -> str:
            counts.append(len(executor.poll()))
            if count > 1:
                raise TooManyJobsError("AssocMaxSubmitJobLimit")
            time.sleep(0.05)
            return str(len(counts))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm_executor, "submission", Refusing)
        patch.setattr(jobs, "ask", lambda *_, **__: None)
        patch.setattr(jobs, "largest_array", lambda: 1000)
        executor.start(8)
        eventually(lambda: len(counts) == 15, "all are submitted one by one")
        executor.close(0.1)
    assert min(counts) == 8


def test_the_queue_is_looked_at_no_more_often_than_the_user_wants(place: Place, tmp_path: Path) -> None:
    env = with_fake("squeue", place.env["PATH"], tmp_path, 'exec "$REAL" "$@"')
    options = ("wait_s=0.2", "steps=60", "sweep.executor.poll_s=4")
    place.run("+sweep=grid", "x=range(8)", *options, env=env)
    assert place.states() == {COMPLETE: 8}
    looks = [float(line.split()[0]) for line in calls(tmp_path) if "--name=" in line]
    gaps = [later - earlier for earlier, later in itertools.pairwise(looks)]
    assert len(looks) >= 5
    assert min(gaps[:4]) > 3.9  # later ones may be of the end, when the jobs leave
    assert all("--name=grid." in line for line in calls(tmp_path) if "--name=" in line)  # one for all jobs


@pytest.mark.parametrize(
    ("study", "overrides", "trials"),
    [("optimizer_grid", (), 48), ("optimizer_search", ("sweep.budget.trials=16", "epochs=9"), 16)],
)
def test_the_reference_sweeps_run_on_the_cluster(
    make_bare_project: MakeProject, cluster: Cluster, study: str, overrides: tuple[str, ...], trials: int
) -> None:
    """With their ranking at the end, as anywhere; in the search, some trials are pruned."""
    root = Path(__file__).parents[1]
    place = Place(make_bare_project({}), cluster)
    for name in ("conf", "sweeps"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / name, place.project.root / name, ignore=ignored, dirs_exist_ok=True)
    executor = (
        "sweep/executor=slurm", "sweep.executor.workers=2", "sweep.executor.gpus_per_node=2",
        "sweep.resources.gpus_per_trial=1", "sweep.executor.host=127.0.0.1", "sweep.executor.poll_s=1",
    )  # fmt: skip
    env = {MARK: place.project.mark, **place.env}
    done = run(f"+sweep={study}", *executor, *overrides, cwd=place.project.root, env=env, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.lstrip().startswith("by val_accuracy, maximize:")
    sweep = place.project.sweep(study)
    assert sweep.states().total() == trials
    assert set(sweep.states()) <= {COMPLETE, TrialState.PRUNED}
    assert (sweep.states()[TrialState.PRUNED] > 0) == (study == "optimizer_search")
    assert {attempt.host for attempt in sweep.attempts} == {"node1", "node2"}
    assert len(sweep.attempts) == trials


def test_nothing_in_a_path_or_a_name_is_a_command(make_bare_project: MakeProject, cluster: Cluster) -> None:
    inner = make_bare_project({})
    project = Project(inner.root / """a b'c $(touch hacked) `touch hacked` ;touch hacked; &""", inner.mark)
    project.write(FILES)
    place = Place(project, cluster)
    place.run("+sweep=grid", "x=1,2", "+sweep.executor.additional_parameters.comment='$(touch hacked)'")
    assert place.states() == {COMPLETE: 2}
    assert not list(inner.root.rglob("hacked"))
    assert [job.split("|")[2] for job in place.jobs()] == ["COMPLETED"]


def test_what_slurm_refuses_is_one_line(place: Place) -> None:
    said = place.run("+sweep=grid", "x=1,2", "sweep.executor.partition=gpuu", status=2)
    assert "sweep/executor=slurm" in said or "sweep.executor.partition" in said
    assert "partition" in said.splitlines()[-1]


@pytest.mark.parametrize(
    "option",
    [
        "sweep.executor.partition='a\\nb'",
        "sweep.executor.setup=['a\\nb']",
        "+sweep.executor.additional_parameters.comment='a\\nb'",
    ],
)
def test_control_characters_are_refused_before_anything_starts(place: Place, option: str) -> None:
    said = place.run("+sweep=grid", "x=1,2", option.replace("\\n", "\n"), status=2)
    assert "control characters" in said
    assert not (place.project.root / "multirun").exists()


class TestSlurmExecutor(ExecutorConformance):
    """The suite that every executor must pass."""

    host = "127.0.0.1"

    @pytest.fixture(autouse=True)
    def _on_the_cluster(self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        for key, value in cluster.environment().items():
            monkeypatch.setenv(key, value)

    def create(self, spec: SweepSpec, socket: str) -> Executor:
        options = slurm_executor.Options(workers=2, poll_s=0.5, mem_gb=0.5)
        return slurm_executor.SlurmExecutor(Context(spec=spec, socket=socket), options)
