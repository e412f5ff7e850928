"""Sweeps whose Ray cluster ends, and perhaps comes again; and sweeps that Ray itself starts: ``ray job submit``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from helpers import MakeProject, Project, Sweep, eventually
from ray_cluster import FILES, Place, RayCluster

from repro_sweep.states import FailureKind, TrialState

COMPLETE = TrialState.COMPLETE
ACTOR = "ray::RayWorker"
OUTLASTS_ITS_HEAD_S = "RAY_gcs_rpc_server_reconnect_timeout_s"


# --- the head is killed ------------------------------------------------------------------------------------------


@pytest.fixture
def place(make_project: MakeProject, request: pytest.FixtureRequest) -> Iterator[Place]:
    """A small project and a cluster of two nodes, which outlast its head for some seconds; by default it's a minute."""
    cluster = RayCluster(**{OUTLASTS_ITS_HEAD_S: request.param})
    try:
        cluster.start_head()
        for name in ("a", "b"):
            cluster.add_node(name, env={"NODE": name})
        yield Place(make_project(FILES), cluster)
    finally:
        cluster.stop()


@pytest.mark.parametrize("place", ["40"], indirect=True)
def test_a_sweep_goes_on_in_the_cluster_that_another_head_makes_at_the_same_address(place: Place) -> None:
    """Nodes of the last cluster may still run when the next one is there: each trial ends once all the same."""
    options = ("x=range(8)", "wait_s=0.1", "steps=3000")
    with place.project.start("+sweep=grid", *options, env=place.env) as running:
        running.until(lambda: len(place.ran()) >= 4, "all slots have a trial")
        place.cluster.kill_node("head")
        place.cluster.start_head()
        place.cluster.add_node("c", "--num-cpus=4", env={"NODE": "c"})
        running.until(lambda: place.kinds().total() == 4, "what the last cluster ran is lost")
        running.until(lambda: len(place.ran()) >= 8, "all slots have a trial again")
        (place.project.root / "enough").touch()
        assert running.wait() == 0, running.stderr
    assert "Traceback" not in running.stderr
    assert place.states() == {COMPLETE: 8}
    assert place.kinds() == {FailureKind.NODE_LOST: 4}
    ends = Counter(each.trial for each in place.project.sweep("grid").attempts if each.state is COMPLETE)
    assert ends == dict.fromkeys(range(8), 1)


@pytest.mark.parametrize("place", ["5"], indirect=True)
def test_when_no_head_comes_back_the_command_says_so_and_resume_goes_on_in_another_cluster(
    place: Place,
) -> None:
    options = ("x=range(6)", "wait_s=0.1", "steps=3000")
    env = {**place.env, "REPRO_SWEEP_RAY_GIVE_UP_S": "15"}
    with place.project.start("+sweep=grid", *options, env=env) as running:
        running.until(lambda: len(place.ran()) >= 4, "all slots have a trial")
        place.cluster.kill_node("head")
        assert running.wait() == 2
    said = running.stderr.splitlines()[-1]
    assert said.startswith(f"repro-sweep: sweep/executor=ray: there is no Ray at {place.cluster.address}: ")
    assert "Traceback" not in running.stderr
    assert place.states() == {TrialState.WAITING: 6}
    (place.project.root / "enough").touch()
    place.cluster.start_head()
    place.cluster.add_node("c", env={"NODE": "c"})
    place.run("resume", "grid")
    assert place.states() == {COMPLETE: 6}
    assert place.nodes() == {"a", "b", "c"}


# --- ray job submit ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lasting() -> Iterator[RayCluster]:
    """A head that takes jobs, and a node with two CPUs that doesn't see what the head has unpacked."""
    cluster = RayCluster(RAY_JOB_STOP_WAIT_TIME_S="60")
    try:
        cluster.start_head(jobs=True)
        cluster.add_node("a", env={"NODE": "a"}, hidden=cluster.folder)
        yield cluster
    finally:
        cluster.stop()


class Submission:
    """A sweep's command as a job, with its results beside the project, which the job gets a copy of."""

    def __init__(self, project: Project, cluster: RayCluster) -> None:
        self._project, self._cluster = project, cluster
        self._results = project.root.with_name("results")

    def submit(self, *options: str, ident: str, wait: bool = True) -> str:
        """Submit it; returns what it has said by its end."""
        how = (
            f"--submission-id={ident}",
            f"--working-dir={self._project.root}",
            *([] if wait else ["--no-wait"]),
        )
        where = (
            f"hydra.sweep.dir={self._results}",
            f"sweep.tracking.uri=sqlite:///{self._project.root}/mlflow.db",
        )
        return self._cluster.ray("job", "submit", *how, "--", "repro-sweep", "+sweep=grid", *options, *where)

    def hurry(self) -> None:
        """Have the trials of the next submission end at once."""
        (self._project.root / "enough").touch()

    def states(self) -> Counter[TrialState]:
        """How many trials are in each state."""
        ledger = self._results / "ledger.db"
        return Sweep.read(self._results).states() if ledger.exists() else Counter()

    def logs(self) -> list[str]:
        """What each trial has said."""
        return [path.read_text() for path in self._results.glob("trials/*/trial.log")]

    def attempts(self) -> int:
        """How often trials were executed."""
        return len(Sweep.read(self._results).attempts)


@pytest.fixture
def submission(make_project: MakeProject, lasting: RayCluster) -> Submission:
    return Submission(make_project(FILES), lasting)


def test_a_submitted_job_runs_a_sweep_on_its_cluster(submission: Submission) -> None:
    said = submission.submit("x=range(6)", "wait_s=0.1", "steps=3", ident="whole")
    assert "grid: 6 complete" in said
    assert "Traceback" not in said
    assert submission.states() == {COMPLETE: 6}
    assert submission.attempts() == 6
    assert submission.logs() == ["runs on node a\n"] * 6


def test_a_job_that_is_stopped_leaves_no_actor_and_the_next_one_goes_on(
    submission: Submission, lasting: RayCluster
) -> None:
    options = ("x=range(4)", "wait_s=0.1", "steps=3000")
    submission.submit(*options, ident="stopped", wait=False)
    eventually(lambda: submission.states()[TrialState.RUNNING] == 2, "all slots have a trial")
    lasting.ray("job", "stop", "stopped")
    said = lasting.ray("job", "logs", "stopped")
    assert "4 trials are left" in said
    assert "the driver has ended" not in said  # all processes of the job have got the signal
    assert submission.states() == {TrialState.WAITING: 4}
    eventually(lambda: not lasting.pids("a", ACTOR), "no actor is left", 30)
    submission.hurry()
    submission.submit(*options, ident="next")
    assert submission.states() == {COMPLETE: 4}
    assert submission.attempts() == 6
