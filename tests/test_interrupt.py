"""A sweep survives its user's Ctrl-C and the death of every one of its processes; what is done is never redone."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import Project, Running, eventually

from repro_sweep.states import FailureKind, TrialState

MakeProject = Callable[..., Project]

SWEEP = ("+sweep=default", "sweep.task=tasks.train", "sweep.metric=score", "sweep.executor.slots=2")
SIX = (*SWEEP, "x=range(6)")
FILES = {
    "conf/config.yaml": "x: 0",
    "tasks.py": """
        import os
        import time
        from pathlib import Path

        def train(cfg):
            Path("started").mkdir(exist_ok=True)
            Path("started", f"{cfg.x}-{os.getpid()}").write_text("")
            deadline = time.monotonic() + 250
            while not (Path("open").exists() or Path(f"open-{cfg.x}").exists()):
                if time.monotonic() > deadline:
                    raise TimeoutError("nobody has opened the gate")
                time.sleep(0.01)
            with open("ended", "a") as ended:
                print(cfg.x, file=ended)
            return {"score": cfg.x}
    """,
}
ZYGOTE = "repro_sweep.worker.zygote"
AGENT = "repro_sweep.worker.agent"


def started(project: Project) -> Counter[str]:
    """How often each trial has started."""
    folder = project.root / "started"
    return Counter(path.name.partition("-")[0] for path in folder.iterdir()) if folder.exists() else Counter()


def ended(project: Project) -> Counter[str]:
    """How often each trial has ended."""
    file = project.root / "ended"
    return Counter(file.read_text().split()) if file.exists() else Counter()


def until_started(command: Running, project: Project, total: int) -> None:
    """Wait until so many trials have started."""
    command.until(lambda: started(project).total() >= total, f"{total} trials start")


def gate(project: Project, name: str = "open") -> Path:
    """The file that lets trials end."""
    return project.root / name


@pytest.fixture(scope="module")
def interrupted(make_shared_project: MakeProject) -> SimpleNamespace:
    """Interrupted once while two run; started again and interrupted twice; started again and left alone."""
    project = make_shared_project(FILES)
    story = SimpleNamespace(project=project)

    def note(name: str, code: int, said: str) -> None:
        story.__dict__[name] = SimpleNamespace(
            code=code,
            said=said,
            sweep=project.sweep("default"),
            started=started(project),
            left=project.processes(),
        )

    with project.start(*SIX) as command:
        until_started(command, project, 2)
        story.second_start = project.run(*SIX)
        story.plan = project.run("plan", *SIX)
        command.interrupt("nothing new starts")
        story.while_draining = project.sweep("default").states()
        gate(project).touch()
        note("once", command.wait(), command.stderr)
    gate(project).unlink()
    with project.start(*SIX) as command:
        until_started(command, project, 4)
        command.interrupt("nothing new starts")
        command.process.send_signal(signal.SIGINT)
        note("twice", command.wait(), command.stderr)
    gate(project).touch()
    result = project.run(*SIX)
    note("last", result.returncode, result.stderr)
    return story


def test_after_the_first_ctrl_c_running_trials_finish_and_nothing_new_starts(
    interrupted: SimpleNamespace,
) -> None:
    """The exit status is that of an interrupted command."""
    once = interrupted.once
    assert interrupted.while_draining == {TrialState.RUNNING: 2, TrialState.WAITING: 4}
    assert once.code == 130, once.said
    assert once.sweep.states() == {TrialState.COMPLETE: 2, TrialState.WAITING: 4}
    assert once.started.total() == 2
    assert "once more to stop them" in once.said
    assert once.left == {}


def test_after_the_second_ctrl_c_running_trials_are_stopped(interrupted: SimpleNamespace) -> None:
    """They are no failures: they wait for the next start."""
    twice = interrupted.twice
    assert twice.code == 130, twice.said
    assert twice.sweep.states() == {TrialState.COMPLETE: 2, TrialState.WAITING: 4}
    stopped = [attempt for attempt in twice.sweep.attempts if attempt.state is TrialState.FAIL]
    assert [attempt.kind for attempt in stopped] == [FailureKind.CANCELLED] * 2
    assert twice.left == {}


def test_the_same_command_completes_an_interrupted_sweep(interrupted: SimpleNamespace) -> None:
    """Each trial has ended exactly once, however often it was started."""
    last = interrupted.last
    assert last.code == 0, last.said
    assert last.sweep.states() == {TrialState.COMPLETE: 6}
    assert ended(interrupted.project) == {str(x): 1 for x in range(6)}
    assert last.started.total() == 8


def test_an_interrupted_sweep_prints_no_traceback(interrupted: SimpleNamespace) -> None:
    """Nor any warning."""
    for step in (interrupted.once, interrupted.twice, interrupted.last):
        assert "Traceback" not in step.said
        assert "Warning" not in step.said


def test_a_second_start_of_a_running_sweep_says_who_runs_it(interrupted: SimpleNamespace) -> None:
    """And disturbs nothing."""
    second = interrupted.second_start
    assert second.returncode == 2
    assert len(second.stderr.splitlines()) == 1
    assert re.search(
        r"sweep 'default' is already running: process \d+ on \S+ since [\d-]+ [\d:]+ UTC;"
        r" watch it with 'repro-sweep attach default', stop it with 'repro-sweep cancel default'$",
        second.stderr.rstrip(),
    ), second.stderr


def test_a_running_sweep_can_be_planned(interrupted: SimpleNamespace) -> None:
    """Reading needs no lease."""
    assert interrupted.plan.returncode == 0
    assert "x=5" in interrupted.plan.stdout or "again" in interrupted.plan.stdout


def test_trials_that_end_while_there_is_no_coordinator_are_complete_with_the_next_start(
    make_project: MakeProject,
) -> None:
    """Their worker keeps the results and runs nothing else meanwhile; nothing runs twice."""
    project = make_project(FILES)
    for x in (0, 1):
        gate(project, f"open-{x}").touch()
    kill_coordinator(project, trials=4)
    assert project.sweep("default").states() == {
        TrialState.COMPLETE: 2,
        TrialState.RUNNING: 2,
        TrialState.WAITING: 2,
    }
    gate(project).touch()
    results = project.root / "multirun" / "default" / "workers"
    eventually(lambda: len(list(results.glob("*/results/*.json"))) == 2, "both results are on disk")
    assert started(project).total() == 4

    result = project.run(*SIX)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert_each_ran_once(project)
    assert list(results.glob("*/results/*.json")) == []
    project.until_all_have_ended()


def test_trials_that_a_killed_coordinator_has_left_running_go_on_under_the_next(
    make_project: MakeProject,
) -> None:
    """In the same worker, which then gets the trials that still wait."""
    project = make_project(FILES)
    kill_coordinator(project, trials=2)
    [agent] = project.processes_of(AGENT)
    with project.start(*SIX) as command:
        [log] = (project.root / "multirun" / "default" / "workers").glob("*/worker.log")
        command.until(lambda: "(epoch 2)" in log.read_text(), "the worker comes to the new coordinator")
        assert list(project.processes_of(AGENT)) == [agent]
        assert started(project).total() == 2
        gate(project).touch()
        assert command.wait() == 0, command.stderr
    assert_each_ran_once(project)
    assert len({attempt.worker for attempt in project.sweep("default").attempts}) == 1
    project.until_all_have_ended()


def kill_coordinator(project: Project, *, trials: int) -> None:
    """Start the sweep and kill its coordinator when so many trials have started."""
    with project.start(*SIX) as command:
        until_started(command, project, trials)
        command.process.kill()
        command.wait()


def assert_each_ran_once(project: Project) -> None:
    """Each of the six trials is complete after one attempt."""
    sweep = project.sweep("default")
    assert sweep.states() == {TrialState.COMPLETE: 6}
    assert started(project) == ended(project) == {str(x): 1 for x in range(6)}
    assert [attempt.state for attempt in sweep.attempts] == [TrialState.COMPLETE] * 6


def test_trials_of_a_killed_worker_are_run_again_by_another_and_those_of_a_killed_zygote_by_its_successor(
    make_project: MakeProject,
) -> None:
    """Neither costs the sweep anything but time; no trial runs twice at the same time."""
    project = make_project(FILES)
    with project.start(*SWEEP, "x=range(3)") as command:
        until_started(command, project, 2)
        [agent] = project.processes_of(AGENT)
        [zygote] = project.processes_of(ZYGOTE)
        first = trials_of(zygote)
        os.kill(agent, signal.SIGKILL)
        until_started(command, project, 4)
        eventually(lambda: not first & set(project.processes()), "the trials of the killed worker are gone")

        [other] = project.processes_of(AGENT)
        assert other != agent
        [zygote] = project.processes_of(ZYGOTE)
        second = trials_of(zygote)
        os.kill(zygote, signal.SIGKILL)
        until_started(command, project, 6)
        eventually(lambda: not second & set(project.processes()), "the trials of the killed zygote are gone")
        assert list(project.processes_of(AGENT)) == [other]

        gate(project).touch()
        assert command.wait() == 0, command.stderr
    sweep = project.sweep("default")
    assert sweep.states() == {TrialState.COMPLETE: 3}
    assert started(project) == {"0": 3, "1": 3, "2": 1}
    assert ended(project) == {"0": 1, "1": 1, "2": 1}
    lost = Counter(attempt.kind for attempt in sweep.attempts if attempt.kind is not None)
    assert lost == {FailureKind.NODE_LOST: 4}


def test_without_a_coordinator_workers_leave_when_their_trials_are_over_and_the_results_wait(
    make_project: MakeProject,
) -> None:
    project = make_project(FILES)
    with project.start(*SIX, "sweep.orphan_timeout_min=0.05") as command:
        until_started(command, project, 2)
        os.kill(command.process.pid, signal.SIGKILL)
        command.wait()
    (agent,) = project.processes_of(AGENT)
    eventually(lambda: "no coordinator" in worker_log(project), "it looks for the next one")
    assert list(project.processes_of(AGENT)) == [agent]
    gate(project).touch()
    eventually(lambda: not project.processes_of(AGENT), "it has nothing more to do")
    assert ended(project) == {"0": 1, "1": 1}
    resumed = project.run("resume", "default")
    assert resumed.returncode == 0, resumed.stderr
    assert project.sweep("default").states() == {TrialState.COMPLETE: 6}
    assert set(started(project).values()) == {1}


def test_sigterm_stops_a_sweep_at_once_and_leaves_nothing(make_project: MakeProject) -> None:
    """As a batch system ends a job; its trials wait for the next start."""
    project = make_project(FILES)
    with project.start(*SIX) as command:
        until_started(command, project, 2)
        command.process.terminate()
        assert command.wait() == 130, command.stderr
    assert project.processes() == {}
    assert project.sweep("default").states() == {TrialState.WAITING: 6}


def worker_log(project: Project) -> str:
    """What the sweep's only worker has noted."""
    (path,) = project.root.glob("multirun/default/workers/*/worker.log")
    return path.read_text()


def trials_of(zygote: int) -> set[int]:
    """The trials that a zygote has forked."""
    return {int(pid) for pid in Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()}
