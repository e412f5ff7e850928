"""A sweep whose workers are actors of a real Ray cluster: it runs, and survives what happens to actors and nodes."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import MakeProject, eventually
from ray_cluster import FILES, Place, RayCluster

from repro_sweep.errors import SweepError
from repro_sweep.executors import ray as ray_executor
from repro_sweep.executors.base import Context, Executor
from repro_sweep.executors.ray import Options, RayExecutor, fitting
from repro_sweep.states import FailureKind, TrialState
from repro_sweep.sweep import Resources, SweepSpec
from repro_sweep.testing.executors import ExecutorConformance, sweep

COMPLETE = TrialState.COMPLETE
DRIVER = "repro_sweep.ray_driver"
ACTOR = "ray::RayWorker"


@pytest.fixture(scope="module")
def lasting() -> Iterator[RayCluster]:
    """A head and two nodes with two CPUs each, which the tests of this module share and leave as they are."""
    cluster = RayCluster()
    try:
        cluster.start_head()
        for name in ("a", "b"):
            cluster.add_node(name, env={"NODE": name})
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def place(make_project: MakeProject, lasting: RayCluster) -> Place:
    """A small project and the lasting cluster, on which nothing runs."""
    return Place(make_project(FILES), lasting)


# --- it runs -----------------------------------------------------------------------------------------------------


def test_a_grid_runs_on_all_nodes_with_an_actor_for_each_slot(place: Place) -> None:
    place.run("+sweep=grid", "x=range(12)", "wait_s=0.2", "steps=5")
    assert place.states() == {COMPLETE: 12}
    assert set(place.executed().values()) == {1}
    assert place.nodes() == {"a", "b"}
    assert len(place.workers()) == 4
    assert not place.kinds()


def test_an_actor_may_have_several_slots(place: Place) -> None:
    """It asks Ray for what all of its trials need, and runs that many at a time."""
    place.run("+sweep=grid", "x=range(8)", "wait_s=0.5", "steps=4", "sweep.executor.slots=2")
    assert set(place.executed().values()) == {1}
    assert place.nodes() == {"a", "b"}
    assert len(place.workers()) == 2
    attempts = place.project.sweep("grid").attempts
    assert len({(each.worker, each.slot) for each in attempts}) == 4
    worker = attempts[0].worker
    first, second = sorted(each.started_at for each in attempts if each.worker == worker)[:2]
    assert second - first < 1.5  # a trial takes 2 s


def test_a_search_runs_with_no_more_actors_than_the_user_wants(place: Place) -> None:
    place.run(
        "+sweep=grid", "sweep/sampler=random", "sweep.params={x: 'interval(0, 1)'}", "sweep.budget.trials=6",
        "sweep.executor.workers=2",
    )  # fmt: skip
    assert place.states() == {COMPLETE: 6}
    assert len(place.workers()) == 2


def test_a_custom_resource_and_fewer_trials_than_slots_choose_where_actors_are(place: Place) -> None:
    place.run("+sweep=grid", "x=1,2,3", "+sweep.executor.resources={b: 0.5}")
    assert place.nodes() == {"b"}
    assert len(place.workers()) == 2


def test_without_an_address_a_ray_of_this_machines_own_is_started_and_stopped(
    make_project: MakeProject, lasting: RayCluster
) -> None:
    project = make_project(FILES)
    env = {"RAY_AUTH_TOKEN": lasting.env["RAY_AUTH_TOKEN"], "RAY_TMPDIR": str(lasting.folder)}
    done = project.run("+sweep=grid", "x=range(4)", "sweep.executor.workers=2", env=env)
    assert done.returncode == 0, done.stderr
    assert project.sweep("grid").states() == {COMPLETE: 4}
    eventually(lambda: not project.processes(), "nothing is left of it", 30)


def test_two_sweeps_share_a_cluster(place: Place) -> None:
    names = ("one", "two")
    options = ("x=range(6)", "wait_s=0.2", "steps=3")
    running = [
        place.project.start("+sweep=grid", f"sweep.name={name}", *options, env=place.env) for name in names
    ]
    for command in running:
        with command:
            assert command.wait() == 0, command.stderr
    assert [place.states(name) for name in names] == [{COMPLETE: 6}] * 2
    assert set(place.executed().values()) == {2}


# --- it survives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["stop_node", "kill_node"])
def test_actors_come_and_go_with_the_clusters_nodes(place: Place, way: str) -> None:
    """What ran on a node that is gone runs elsewhere, from its checkpoint; that is no failure of the trial's."""
    options = ("x=range(8)", "wait_s=0.1", "steps=3000")
    with place.project.start("+sweep=grid", *options, env=place.env) as running:
        running.until(lambda: len(place.ran()) >= 4, "all slots have a trial")
        place.cluster.add_node("c", env={"NODE": "c"})
        try:
            running.until(lambda: len(place.ran()) >= 6, "the new node's slots have one, too")
        finally:
            getattr(place.cluster, way)("c")
        running.until(lambda: place.kinds().total() == 2, "they are known to be lost")
        (place.project.root / "enough").touch()
        assert running.wait() == 0, running.stderr
    assert place.states() == {COMPLETE: 8}
    assert place.nodes() == {"a", "b", "c"}
    assert set(place.kinds()) <= {FailureKind.PREEMPTED, FailureKind.NODE_LOST}
    assert place.executed().total() == 10


def test_the_trial_of_a_killed_actor_runs_again_in_another(place: Place) -> None:
    with place.project.start("+sweep=grid", "x=range(6)", "wait_s=0.2", "steps=10", env=place.env) as running:
        running.until(lambda: len(place.ran()) >= 4, "all slots have a trial")
        os.kill(place.cluster.pids("a", ACTOR)[0], signal.SIGKILL)
        assert running.wait() == 0, running.stderr
    assert place.states() == {COMPLETE: 6}
    assert place.kinds().total() == 1
    assert place.executed().total() == 7
    assert len(place.workers()) == 5


def test_a_killed_driver_is_replaced_and_no_trial_notices(place: Place) -> None:
    with place.project.start("+sweep=grid", "x=range(8)", "wait_s=0.2", "steps=10", env=place.env) as running:
        running.until(lambda: len(place.ran()) >= 4, "all slots have a trial")
        (driver,) = place.project.processes_of(DRIVER)
        os.kill(driver, signal.SIGKILL)
        assert running.wait() == 0, running.stderr
    assert place.states() == {COMPLETE: 8}
    assert set(place.executed().values()) == {1}
    assert len(place.workers()) == 4


def test_actors_outlive_a_killed_coordinator_and_resume_finds_them(place: Place) -> None:
    with place.project.start("+sweep=grid", "x=range(8)", "wait_s=0.3", "steps=30", env=place.env) as running:
        running.until(lambda: len(place.ran()) >= 4, "all slots have a trial")
        os.killpg(running.process.pid, signal.SIGKILL)
        running.wait()
    place.run("resume", "grid")
    assert place.states() == {COMPLETE: 8}
    assert set(place.executed().values()) == {1}
    assert len(place.workers()) == 4


def test_an_interrupted_sweep_leaves_no_actor(place: Place) -> None:
    with place.project.start("+sweep=grid", "x=range(8)", "wait_s=5", "steps=10", env=place.env) as running:
        running.until(lambda: len(place.ran()) >= 4, "all slots have a trial")
        running.interrupt("interrupted: nothing new starts")
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == 130
    assert set(place.states()) == {TrialState.WAITING}
    eventually(
        lambda: not [*place.cluster.pids("a", ACTOR), *place.cluster.pids("b", ACTOR)], "no actor is left", 30
    )


# --- GPUs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2])
def test_four_trials_share_one_gpu(place: Place, slots: int) -> None:
    """Ray hands out shares of a device; each trial sees that one."""
    place.cluster.add_node(
        "g", "--num-cpus=4", "--num-gpus=1", env={"NODE": "g", "CUDA_VISIBLE_DEVICES": "0"}
    )
    try:
        place.run(
            "+sweep=grid", "x=range(8)", "wait_s=0.5", "steps=4", "sweep.resources.gpus_per_trial=0.25",
            f"sweep.executor.slots={slots}",
        )  # fmt: skip
    finally:
        place.cluster.stop_node("g")
    assert place.nodes() == {"g"}
    assert {line[2] for line in place.ran()} == {"0"}
    assert len(place.workers()) == 4 / slots
    starts = sorted(float(line[3]) for line in place.ran())
    assert (
        starts[3] - starts[0] < 20
    )  # four at once, not one after the other: those take 2 s each, in two rounds
    assert starts[4] > starts[3]


def test_actors_wait_for_nodes_that_are_added_on_demand(place: Place) -> None:
    options = (
        "sweep.resources.gpus_per_trial=1",
        "sweep.executor.workers=3",
        "sweep.executor.autoscaling=true",
    )
    with place.project.start("+sweep=grid", "x=range(3)", *options, env=place.env) as running:
        running.until(lambda: len(place.workers()) == 3, "all actors that are wanted are asked for")
        place.cluster.add_node("g", "--num-gpus=1", env={"NODE": "g", "CUDA_VISIBLE_DEVICES": "0"})
        try:
            assert running.wait() == 0, running.stderr
        finally:
            place.cluster.stop_node("g")
    assert place.states() == {COMPLETE: 3}
    assert place.nodes() == {"g"}


def test_trials_have_the_variables_of_the_users_runtime_env(place: Place) -> None:
    """A secret among them is in no record of the sweep, nor on a command line."""
    variables = "{NODE: ${oc.env:PLANTED_NODE}, MY_API_KEY: '${oc.env:PLANTED_KEY}'}"
    planted = {"PLANTED_NODE": "mine", "PLANTED_KEY": "planted-4711"}
    place.run("+sweep=grid", "x=1,2", f"+sweep.executor.runtime_env={{env_vars: {variables}}}", env=planted)
    assert place.states() == {COMPLETE: 2}
    assert place.nodes() == {"mine"}
    spec = place.project.sweep("grid").directory / "ledger.db"
    assert b"oc.env:PLANTED_KEY" in spec.read_bytes()
    assert b"planted-4711" not in spec.read_bytes()


# --- what cannot be ----------------------------------------------------------------------------------------------


def test_an_address_where_no_ray_is_is_said_in_one_line_before_ray_itself_is_asked(place: Place) -> None:
    """Ray would try for a long time, and say something else."""
    said = place.run("+sweep=grid", "x=1,2", "sweep.executor.address=127.0.0.1:1", status=2)
    assert said.splitlines() == [
        "repro-sweep: sweep/executor=ray: there is no Ray at 127.0.0.1:1: [Errno 111] Connection refused"
    ]
    assert not (place.project.root / "multirun").exists()


def test_a_wrong_token_is_said_in_one_line(place: Place) -> None:
    said = place.run("+sweep=grid", "x=1,2", env={"RAY_AUTH_TOKEN": "0" * 32}, status=2)
    assert len(said.splitlines()) == 1
    assert f"Ray at {place.cluster.address} cannot be used" in said
    assert "token" in said.lower()


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        (
            "sweep.resources.gpus_per_trial=2",
            (
                "sweep/executor=ray: no node can hold a trial, which needs 1 CPUs, 2 GPUs (sweep.resources,"
                " sweep.executor.resources); the most that any of 3 nodes has is 2 CPUs, 0 GPUs;"
                " where nodes are added on demand, set sweep.executor.autoscaling=true"
            ),
        ),
        (
            "sweep.executor.autoscaling=true",
            "sweep.executor.autoscaling: needs sweep.executor.workers, the most actors to ask for",
        ),
        (
            "sweep.executor.slots=3",
            (
                "sweep/executor=ray: no node can hold 3 trials, which need 3 CPUs (sweep.resources,"
                " sweep.executor.resources, sweep.executor.slots); the most that any of 3 nodes has is 2 CPUs;"
                " where nodes are added on demand, set sweep.executor.autoscaling=true"
            ),
        ),
        ("sweep.executor.slots=0", "sweep.executor.slots: must be at least 1, got 0"),
        ("sweep.executor.workers=0", "sweep.executor.workers: must be at least 1, got 0"),
        ("+sweep.executor.resources.CPU=2", "sweep.executor.resources.CPU: set sweep.resources instead"),
        (
            "+sweep.executor.resources.tpu=-1",
            "sweep.executor.resources.tpu: must be greater than 0, got -1.0",
        ),
    ],
)
def test_what_can_never_run_is_said_at_the_start(place: Place, option: str, problem: str) -> None:
    assert place.run("+sweep=grid", "x=1,2", option, status=2).splitlines() == [f"repro-sweep: {problem}"]
    assert not (place.project.root / "multirun").exists()


def test_the_slots_of_an_actor_must_have_whole_gpus_together(tmp_path: Path) -> None:
    """Ray hands out shares of one GPU, or whole ones."""
    spec = sweep(tmp_path).model_copy(update={"resources": Resources(gpus=0.5)})
    RayExecutor(Context(spec=spec, socket=""), Options(address=None, slots=4))
    said = "sweep.executor.slots: 3 slots with 0.5 GPUs each need 1.5 GPUs, which is not a whole number"
    with pytest.raises(SweepError, match=re.escape(said)):
        RayExecutor(Context(spec=spec, socket=""), Options(address=None, slots=3))


def test_an_actor_has_no_more_slots_than_its_gpus_hold(tmp_path: Path) -> None:
    """Two GPUs hold four trials that have 0.4 of one each; its node would refuse a fifth one."""
    spec = sweep(tmp_path).model_copy(update={"resources": Resources(gpus=0.4)})
    RayExecutor(Context(spec=spec, socket=""), Options(address=None, slots=2))
    said = "sweep.executor.slots: 5 slots with 0.4 GPUs each need 2 GPUs, but these hold 4, as a trial has its share"
    with pytest.raises(SweepError, match=re.escape(said)):
        RayExecutor(Context(spec=spec, socket=""), Options(address=None, slots=5))


def test_without_ray_the_command_that_installs_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ray_executor, "find_spec", lambda _name: None)
    with pytest.raises(SweepError, match=r"Ray is not installed; pip install 'repro-sweep\[ray\]'"):
        RayExecutor(Context(spec=sweep(tmp_path), socket=""), Options(address=None))


@pytest.mark.parametrize(
    ("node", "wish", "count"),
    [
        ({"CPU": 4.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 0.25}, 4),
        ({"CPU": 16.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 0.25}, 8),
        ({"CPU": 16.0, "GPU": 3.0}, {"CPU": 1.0, "GPU": 0.4}, 6),
        ({"CPU": 16.0, "GPU": 3.0}, {"GPU": 2.0}, 1),
        ({"CPU": 3.0}, {"CPU": 0.1}, 30),
        ({"CPU": 3.0}, {"CPU": 1.0, "tpu": 1.0}, 0),
        ({"CPU": 3.0, "memory": 3e9}, {"CPU": 1.0, "memory": 2e9}, 1),
    ],
)
def test_how_many_actors_a_node_can_hold(node: dict[str, float], wish: dict[str, float], count: int) -> None:
    assert fitting(node, wish) == count


class TestRayExecutor(ExecutorConformance):
    """The suite that every executor must pass."""

    host = "127.0.0.1"

    @pytest.fixture(autouse=True)
    def _on_the_cluster(self, lasting: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
        for key, value in lasting.env.items():
            monkeypatch.setenv(key, value)
        self._address = lasting.address

    def create(self, spec: SweepSpec, socket: str) -> Executor:
        spec = spec.model_copy(update={"resources": Resources(cpus=0.5)})
        return RayExecutor(Context(spec=spec, socket=socket), Options(address=self._address, workers=2))
