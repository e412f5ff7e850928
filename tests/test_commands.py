"""The commands beside a sweep: they look at it, stop it, and go on with it, whether or not somebody runs it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import CONSOLE_SCRIPT, Project, Running, environment, eventually

from repro_sweep.ledger import Ledger
from repro_sweep.states import FailureKind, TrialState

MakeProject = Callable[..., Project]

SWEEP = ("+sweep=default", "sweep.task=tasks.train", "sweep.metric=score", "sweep.executor.slots=2")
SIX = (*SWEEP, "sweep.retries.EXCEPTION=1", "x=range(6)")
FILES = {
    "conf/config.yaml": "x: 0",
    "tasks.py": """
        import os
        import time
        from pathlib import Path

        import repro_sweep

        def train(cfg):
            Path("started").mkdir(exist_ok=True)
            Path("started", f"{cfg.x}-{os.getpid()}").write_text("")
            os.write(1, b"\\xff " if cfg.x == 1 else b"")
            print(f"has x={cfg.x}", flush=True)
            repro_sweep.report(7, loss=cfg.x)
            deadline = time.monotonic() + 250
            while not (Path("open").exists() or Path(f"open-{cfg.x}").exists()):
                if time.monotonic() > deadline:
                    raise TimeoutError("nobody has opened the gate")
                time.sleep(0.01)
            if cfg.x == 5 and not Path("failed").exists():
                Path("failed").touch()
                raise RuntimeError("the first attempt fails")
            return {"score": cfg.x}
    """,
}
AGENT = "repro_sweep.worker.agent"
NO_SUCH = {
    ("status", "nix"): "there is no sweep 'nix' in multirun/, which has default",
    ("attach", "defalt"): "did you mean 'default'?",
    ("sync", "multirun"): "there is no sweep 'multirun'",
    ("cancel", "default", "2", "77"): "has no trial 77: its trials are 0 to 5",
    ("resume", "default", "77,78"): "has no trials 77, 78: its trials are 0 to 5",
    ("resume", "default", "1"): "trial 1 is COMPLETE: it has its result and is not run again",
    ("cancel", "default", "first"): "'first' is not the number of a trial",
    ("logs", "default/77"): "has no trial 77: its trials are 0 to 5",
    ("logs", "default"): "'default' names no trial: say NAME/NUMBER, such as default/0",
    ("logs", "-n", "-1", "default/0"): "must be at least 0, got -1",
    ("resume",): "the following arguments are required: NAME; see 'repro-sweep resume --help'",
    ("resmue", "default"): "did you mean 'resume'?",
}


def started(project: Project) -> Counter[str]:
    """How often each trial has started."""
    folder = project.root / "started"
    return Counter(path.name.partition("-")[0] for path in folder.iterdir()) if folder.exists() else Counter()


def until_started(command: Running, project: Project, total: int) -> None:
    """Wait until so many trials have started, and the ledger has their first reports."""
    command.until(lambda: started(project).total() >= total, f"{total} trials start")
    command.until(
        lambda: (
            [each.reports for each in project.sweep("default").attempts if each.ended_at is None] == [1, 1]
        ),
        "both trials have reported",
    )


def gate(project: Project, name: str = "open") -> Path:
    """The file that lets trials end."""
    return project.root / name


def code_of(project: Project) -> str:
    """The fingerprint of the code that the sweep's trials run with."""
    with contextlib.closing(Ledger.open(project.root / "multirun/default", readonly=True)) as ledger:
        return ledger.spec.code


def kill(project: Project) -> int:
    """Kill the coordinator; returns its process id."""
    record = json.loads((project.root / "multirun/default/coordinator.json").read_text())
    os.kill(record["pid"], signal.SIGKILL)
    return int(record["pid"])


def trial_pids(project: Project) -> dict[str, int]:
    """The latest process of each trial."""
    files = sorted((project.root / "started").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return {path.name.partition("-")[0]: int(path.name.partition("-")[2]) for path in files}


@contextlib.contextmanager
def beside(project: Project, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that runs beside the block."""
    process = subprocess.Popen(
        [CONSOLE_SCRIPT, *arguments], cwd=project.root, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    """What a command says first."""
    assert process.stderr is not None
    return process.stderr.readline()


@pytest.fixture(scope="module")
def story(make_shared_project: MakeProject) -> SimpleNamespace:
    """A sweep of six is watched, two trials of it are cancelled, it ends; then one of those runs after all."""
    project = make_shared_project(FILES)
    story = SimpleNamespace(project=project)
    with project.start(*SIX) as command:
        until_started(command, project, 2)
        story.status = project.run("status", "default")
        story.json = project.run("status", "default", "--json")
        with project.start("attach", "default") as attached:
            attached.until(lambda: "2 running" in attached.stderr, "it shows the sweep")
            attached.process.send_signal(signal.SIGINT)
            story.detached = SimpleNamespace(code=attached.wait(), said=attached.stderr)
        story.sync_beside = project.run("sync", "default")
        story.resume_beside = project.run("resume", "default")
        story.log = subprocess.run(
            [CONSOLE_SCRIPT, "logs", "1"],
            cwd=project.root,
            env=environment(),
            capture_output=True,
            timeout=300,
        )
        story.no_log = project.run("logs", "default/5")
        story.cancel = project.run("cancel", "default", "0", "4")
        story.cancel_again = project.run("cancel", "default", "0", "4")
        with (
            beside(project, "logs", "-f", "default/5") as logs,
            beside(project, "attach", "default") as attach,
        ):
            story.follows, story.attaches = first_line(logs), first_line(attach)
            gate(project).touch()
            story.exit = command.wait()
            story.followed, _ = logs.communicate(timeout=300)
            story.attached = SimpleNamespace(output=attach.communicate(timeout=300), code=attach.returncode)
        story.said = command.stderr
    story.sweep = project.sweep("default")
    story.started = started(project)
    for name, arguments in {
        "resumed": ("resume", "default"),
        "again": SIX,
        "attach_late": ("attach", "default"),
        "cancel_late": ("cancel", "default"),
        "cancel_complete": ("cancel", "default", "1", "4"),
        "sync_late": ("sync", "default"),
        "status_late": ("status", "default"),
        "last_line": ("logs", "default/5", "-n", "1"),
    }.items():
        story.__dict__[name] = project.run(*arguments)
    story.workers = len(list(story.sweep.directory.glob("workers/*")))
    story.wrong = {arguments: project.run(*arguments) for arguments in NO_SUCH}
    story.started_after = started(project)
    story.code = code_of(project)
    with (project.root / "tasks.py").open("a") as file:
        file.write("# edited\n")
    story.named = project.run("resume", "default", "0")
    story.code_at_last = code_of(project)
    story.sweep_at_last = project.sweep("default")
    story.started_at_last = started(project)
    return story


def test_status_shows_what_runs_waits_and_who_coordinates(story: SimpleNamespace) -> None:
    """With the last report of each running trial."""
    assert story.status.returncode == 0, story.status.stderr
    said = story.status.stdout
    assert said.startswith("default: 0/6 done, 2 running, 4 waiting")
    assert "coordinator  process " in said
    assert "(epoch 1)" in said
    assert "EXCEPTION 1" in said
    for number in (0, 1):
        assert f"  trial {number}  attempt 1 on " in said
    assert said.count("step 7 reported ") == 2


def test_status_is_json_for_scripts(story: SimpleNamespace) -> None:
    """All of it."""
    status = json.loads(story.json.stdout)
    assert status["counts"] == {"WAITING": 4, "RUNNING": 2, "COMPLETE": 0, "PRUNED": 0, "FAIL": 0}
    assert status["coordinator"]["answers"] is True
    assert [(each["trial"], each["step"]) for each in status["running"]] == [(0, 7), (1, 7)]
    assert status["retries"]["PREEMPTED"] is None
    assert status["finished"] is False


def test_ctrl_c_ends_the_watching_and_not_the_sweep(story: SimpleNamespace) -> None:
    """It says so, and the sweep completes later."""
    assert story.detached.code == 130
    assert "detached: the sweep goes on" in story.detached.said
    assert "Traceback" not in story.detached.said
    assert story.exit == 0, story.said


def test_who_watches_to_the_end_sees_the_ranking(story: SimpleNamespace) -> None:
    """And gets the exit status of the sweep."""
    shown, said = story.attached.output
    assert story.attached.code == 0, said
    assert "2 running" in story.attaches
    assert "repro-sweep: sweep default has ended" in said
    assert "default: 4 complete, 2 cancelled" in shown
    assert "by score, maximize:" in shown


def test_a_running_sweep_brings_its_trials_to_mlflow_itself(story: SimpleNamespace) -> None:
    """``sync`` says so and disturbs nothing."""
    assert story.sync_beside.returncode == 0
    assert "does this itself" in story.sync_beside.stderr


def test_a_running_sweep_cannot_be_resumed(story: SimpleNamespace) -> None:
    """The message says who runs it, and what can be done."""
    assert story.resume_beside.returncode == 2
    [line] = story.resume_beside.stderr.splitlines()
    assert "already running: process " in line
    assert "repro-sweep attach default" in line


def test_a_trial_that_runs_and_one_that_waits_are_cancelled(story: SimpleNamespace) -> None:
    """The first is stopped; neither is a failure of the sweep."""
    assert story.cancel.returncode == 0
    assert story.cancel.stderr.splitlines() == [
        "repro-sweep: trial 0 is cancelled and stopped",
        "repro-sweep: trial 4 is cancelled",
        "repro-sweep: 'repro-sweep resume default 0 4' would run them after all",
    ]
    assert "trial 0 was cancelled before" in story.cancel_again.stderr
    assert story.cancel_again.returncode == 0
    assert "another command has cancelled trial 4" in story.said
    trials = {trial.number: trial for trial in story.sweep.trials}
    assert {number for number, trial in trials.items() if trial.cancelled} == {0, 4}
    assert story.sweep.last_attempt(trials[0]).kind is FailureKind.CANCELLED
    assert story.started == {"0": 1, "1": 1, "2": 1, "3": 1, "5": 2}


def test_a_finished_sweep_is_shown_and_not_run_again(story: SimpleNamespace) -> None:
    """Neither by ``resume`` nor by its own command; no worker starts; cancelled trials stay cancelled."""
    for result in (story.resumed, story.again, story.attach_late):
        assert result.returncode == 0, result.stderr
        assert "by score, maximize:" in result.stdout
    assert "sweep default is finished; nothing to run (2 cancelled" in story.resumed.stderr
    assert "4 of 6 trials are complete already, 2 cancelled; nothing to run" in story.again.stderr
    assert story.workers == 1
    assert story.started_after == story.started


def test_only_what_has_not_ended_can_be_cancelled(story: SimpleNamespace) -> None:
    """What cannot is named with its state."""
    assert story.cancel_late.returncode == 0
    assert "nothing to stop" in story.cancel_late.stderr
    assert story.cancel_complete.returncode == 1
    assert "trial 1 is COMPLETE" in story.cancel_complete.stderr
    assert "trial 4 was cancelled before" in story.cancel_complete.stderr


def test_a_cancelled_trial_runs_when_it_is_named(story: SimpleNamespace) -> None:
    """The other one does not."""
    assert story.named.returncode == 0, story.named.stderr
    assert story.started_at_last == story.started + Counter({"0": 1})
    assert {trial.number for trial in story.sweep_at_last.trials if trial.cancelled} == {4}
    assert story.sweep_at_last.states() == {TrialState.COMPLETE: 5, TrialState.FAIL: 1}


def test_what_is_resumed_runs_with_the_code_that_was_submitted(story: SimpleNamespace) -> None:
    """It was edited since, and is frozen."""
    assert story.code
    assert story.code_at_last == story.code


def test_the_log_of_a_trial_is_shown_as_it_is(story: SimpleNamespace) -> None:
    """A number alone is a trial of the latest sweep, which is named; bytes that are no text do no harm."""
    assert story.log.returncode == 0
    assert story.log.stdout == b"\xff has x=1\n"
    assert story.log.stderr == b"repro-sweep: trial 1 of sweep default\n"
    assert story.last_line.stdout == "has x=5\n"


def test_a_trial_that_waits_has_no_log_yet(story: SimpleNamespace) -> None:
    """One line says it."""
    assert story.no_log.returncode == 1
    assert story.no_log.stderr == "repro-sweep: trial 5 is WAITING and has no log yet\n"


def test_a_log_is_followed_from_before_the_trial_starts_to_the_end_of_its_last_attempt(
    story: SimpleNamespace,
) -> None:
    """Its first attempt fails and is retried."""
    assert "trial 5 is WAITING and has no log yet" in story.follows
    assert story.followed == (story.sweep.directory / "trials/5/trial.log").read_text()
    assert story.followed.count("has x=5") == 2
    assert "RuntimeError: the first attempt fails" in story.followed
    assert "[repro-sweep: attempt 2]" in story.followed


def test_the_status_of_a_finished_sweep_says_what_failed_where_and_what_was_cancelled(
    story: SimpleNamespace,
) -> None:
    """Also what was retried with success."""
    said = story.status_late.stdout
    assert said.startswith("default: 4/4 done, 2 cancelled")
    assert "best         score 5, trial 5 (maximize)" in said
    assert "coordinator  none\n" in said
    assert "has everything" in said
    assert "failed attempts: 1 EXCEPTION\n  trial 5  EXCEPTION on " in said
    assert "cancelled: trials 0, 4" in said
    assert story.sync_late.returncode == 0
    assert "MLflow has all of sweep default" in story.sync_late.stderr


@pytest.mark.parametrize("arguments", NO_SUCH, ids=" ".join)
def test_what_a_command_cannot_find_or_understand_is_one_line(
    story: SimpleNamespace, arguments: tuple[str, ...]
) -> None:
    """With what there is instead; nothing is changed."""
    result = story.wrong[arguments]
    assert result.returncode == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("repro-sweep: ")
    assert NO_SUCH[arguments] in line


def test_a_killed_coordinators_sweep_is_resumed_and_no_trial_runs_twice(make_project: MakeProject) -> None:
    """What its workers run goes on meanwhile; who watches is told; the ledger is all that is needed."""
    project = make_project(FILES)
    gate(project, "failed").touch()
    with contextlib.ExitStack() as stack:
        command = stack.enter_context(project.start(*SIX))
        until_started(command, project, 2)
        attached = stack.enter_context(project.start("attach", "default"))
        attached.until(lambda: "2 running" in attached.stderr, "it shows the sweep")
        pid = kill(project)
        command.wait()
        assert attached.wait() == 1
        assert f"its coordinator, process {pid} on " in attached.stderr
        assert "'repro-sweep resume default' takes over" in attached.stderr
    status = project.run("status", "default")
    assert "default: 0/6 done, 2 running, 4 waiting" in status.stdout
    assert f"none: process {pid} on " in status.stdout
    assert status.stdout.count("step 7 reported ") == 2
    assert status.stdout.count("its worker goes on with it") == 2
    nobody = project.run("attach", "default")
    assert nobody.returncode == 2
    assert "nobody runs sweep default (4 waiting, 2 running)" in nobody.stderr

    gate(project, "open-0").touch()
    eventually(
        lambda: "1 result waits" in project.run("status", "default").stdout,
        "the result of trial 0 waits on disk",
    )
    with project.start("resume", "multirun/default") as command:
        command.until(lambda: project.sweep("default").states()[TrialState.COMPLETE], "the result is taken")
        gate(project).touch()
        assert command.wait() == 0, command.stderr
    assert project.sweep("default").states() == {TrialState.COMPLETE: 6}
    assert started(project) == {str(x): 1 for x in range(6)}
    project.until_all_have_ended()


def test_a_sweep_is_stopped_from_another_terminal_and_when_nobody_coordinates_it(
    make_project: MakeProject,
) -> None:
    """Nothing keeps running, nothing has failed; one trial alone can be stopped while the others go on."""
    project = make_project(FILES)
    with project.start(*SIX) as command:
        until_started(command, project, 2)
        stopped = project.run("cancel", "default")
        assert stopped.returncode == 0, stopped.stderr
        assert "is stopped: 6 waiting; 'repro-sweep resume default' goes on" in stopped.stderr
        assert command.wait(10) == 1
        assert "another command stops the sweep" in command.stderr
        assert "Traceback" not in command.stderr
    assert project.processes() == {}
    assert project.sweep("default").states() == {TrialState.WAITING: 6}

    with project.start("resume", "default") as command:
        until_started(command, project, 4)
        kill(project)
        command.wait()
    pids = trial_pids(project)
    one = project.run("cancel", "default", "0", "3")
    assert one.returncode == 0, one.stderr
    assert "trial 0 is cancelled and stopped" in one.stderr
    assert "trial 3 is cancelled" in one.stderr
    assert pids["0"] not in project.processes()
    assert pids["1"] in project.processes()
    assert project.sweep("default").states() == {
        TrialState.FAIL: 2,
        TrialState.RUNNING: 1,
        TrialState.WAITING: 3,
    }

    rest = project.run("cancel", "default")
    assert rest.returncode == 0, rest.stderr
    assert "sweep default is stopped: 4 waiting, 2 cancelled" in rest.stderr
    eventually(lambda: not project.processes(), f"nothing is left: {project.processes()}")
    sweep = project.sweep("default")
    assert sweep.states() == {TrialState.FAIL: 2, TrialState.WAITING: 4}
    assert {attempt.kind for attempt in sweep.attempts} == {FailureKind.CANCELLED}
    again = project.run("cancel", "default")
    assert again.returncode == 0
    assert "sweep default is not running: 4 waiting, 2 cancelled" in again.stderr


def test_what_mlflow_lacks_after_it_was_away_is_sent_later(make_project: MakeProject) -> None:
    """Its store is locked while the sweep runs, and while it is tried the first time."""
    project = make_project(FILES)
    store = sqlite3.connect(project.root / "mlflow.db", isolation_level=None, timeout=300)
    with contextlib.closing(store):
        with project.start(*SWEEP, "x=1,2") as command:
            until_started(command, project, 2)
            store.execute("BEGIN EXCLUSIVE")
            gate(project).touch()
            command.until(lambda: "on the way to MLflow" in command.stderr, "only MLflow lacks something")
            command.process.send_signal(signal.SIGINT)
            assert command.wait() == 130
            assert "Traceback" not in command.stderr
        lacks = project.run("status", "default")
        assert "lacks 2 runs; 'repro-sweep sync default' sends what is missing" in lacks.stdout
        with project.start("sync", "default") as command:
            command.until(lambda: "to go" in command.stderr, "it says how much is left")
            command.process.send_signal(signal.SIGINT)
            assert command.wait() == 130
            assert "MLflow still lacks " in command.stderr
            assert "Traceback" not in command.stderr
        store.execute("ROLLBACK")
    synced = project.run("sync", "default")
    assert synced.returncode == 0, synced.stderr
    with contextlib.closing(sqlite3.connect(project.root / "mlflow.db")) as store:
        [(count,)] = store.execute("SELECT count(*) FROM runs WHERE status = 'FINISHED'")
    assert count == 3
    assert "has everything" in project.run("status", "default").stdout


def test_no_command_that_looks_after_a_sweep_needs_hydra_or_mlflow(make_project: MakeProject) -> None:
    """So they answer at once, in any environment; ``--help`` needs nothing at all."""
    code = """
import sys
from repro_sweep.cli.main import main
heavy = sys.argv.pop(1).split(",")
try:
    main()
except SystemExit as end:
    assert end.code in (0, 2), end.code
found = [name for name in heavy if name in sys.modules]
assert not found, found
"""
    project = make_project(FILES)
    for command in ("status", "attach", "cancel", "resume", "logs", "sync"):
        for heavy, arguments in {
            "hydra,omegaconf,mlflow,pydantic,rich": ("--help",),
            "hydra,omegaconf,mlflow": ("nix/0",),
        }.items():
            result = project.run("-c", code, heavy, command, *arguments, python=True)
            assert result.returncode == 0, result.stderr
