"""How often a trial is tried again after each kind of failure, what ends one that takes too long, what is kept."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import CONSOLE_SCRIPT, Project, Running, Sweep, eventually

from repro_sweep.ledger import Ledger
from repro_sweep.records import Attempt, Report
from repro_sweep.states import FailureKind, TrialState

MakeProject = Callable[..., Project]

SWEEP = ("+sweep=default", "sweep.task=tasks.train", "sweep.metric=score")
AGENT = "repro_sweep.worker.agent"
TASKS = """
import os
import signal
import sys
import threading
import time
from pathlib import Path

import hydra.utils

import repro_sweep


class OutOfMemoryError(RuntimeError):  # as torch's
    pass


def train(cfg):
    Path("started").mkdir(exist_ok=True)
    Path("started", f"{cfg.do}-{os.getpid()}").write_text("")
    return globals()[cfg.do.rstrip("0123456789")](cfg)


def attempts(cfg):
    return len(list(Path("started").glob(f"{cfg.do}-*")))


def until(condition):
    deadline = time.monotonic() + 100
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it does not happen")
        time.sleep(0.01)


def good(cfg):
    return 1.0


def exception(cfg):
    raise ValueError("always")


def second_time(cfg):
    if attempts(cfg) < 2:
        raise ValueError("not yet")
    return 1.0


def invalid(cfg):
    return float("nan")


def leaves(cfg):
    os._exit(3)


def aborts(cfg):
    os.abort()


def dies(cfg):
    os.kill(os.getpid(), signal.SIGRTMIN + 3)


def memory(cfg):
    if attempts(cfg) == 1:
        until(lambda: len(list(Path("started").glob("busy*"))) >= 2)
        raise MemoryError("too much")
    time.sleep(0.5)
    return 1.0


def gpu_memory(cfg):
    if attempts(cfg) == 1:
        until(lambda: len(list(Path("started").glob("busy*"))) >= 1)
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    time.sleep(0.5)
    return 1.0


def always_gpu_memory(cfg):
    raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def always_memory(cfg):
    raise MemoryError("too much")


def instantiated(cfg):
    hydra.utils.instantiate({"_target_": "tasks.always_memory", "cfg": None})


def kernel_memory(cfg):
    if attempts(cfg) == 1:
        block = bytearray(4_000_000_000)
        block[::4096] = b"x" * len(block[::4096])
    return 1.0


def busy(cfg):
    time.sleep(0.15)
    return 1.0


def hangs(cfg):
    repro_sweep.report(0, score=0.0)
    helper = threading.Thread(target=waits_for_nothing, daemon=True)
    helper.start()
    threading.Event().wait()  # here it hangs


def waits_for_nothing():
    threading.Event().wait()


def endless(cfg):
    step = 0
    while True:
        repro_sweep.report(step, score=step)
        step += 1
        time.sleep(0.05)


def slow_but_alive(cfg):
    for step in range(28):
        repro_sweep.report(step, score=step)
        time.sleep(0.15)
    return 1.0


def gated(cfg):
    until(Path("open").exists)
    return 1.0


def reports(cfg):
    numbers = iter(range(10**9))
    lock = threading.Lock()
    log = os.open(f"acked-{os.environ['REPRO_SWEEP_ATTEMPT']}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def work():
        while not Path("open").exists():
            with lock:
                step = next(numbers)
            repro_sweep.report(step, score=step, pid=os.getpid())
            os.write(log, f"{step}\\n".encode())
            time.sleep(0.002)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 1.0
"""
FILES = {"conf/config.yaml": "do: good", "tasks.py": TASKS}
PEST = "threading.Thread(target=threading.Event().wait, daemon=True, name='pest').start()\n"
LINE = next(number for number, line in enumerate(TASKS.splitlines(), 1) if "here it hangs" in line)


@pytest.fixture(scope="module")
def project(make_shared_project: MakeProject) -> Project:
    """One project for all sweeps that only need another name; what trials write is by their sweep's own ``do``."""
    return make_shared_project(FILES)


def sweep(
    project: Project, name: str, do: str, *options: str, status: int, env: dict[str, str] | None = None
) -> Sweep:
    """Run a sweep over ``do`` to its end."""
    result = project.run(*SWEEP, f"sweep.name={name}", f"do={do}", *options, env=env)
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert project.processes() == {}
    return project.sweep(name)


def kinds(found: Sweep) -> dict[object, list[FailureKind | None]]:
    """The kinds of each trial's attempts, None for a good end."""
    by_number = {trial.number: name for name, trial in found.by("do").items()}
    ended: dict[object, list[FailureKind | None]] = defaultdict(list)
    for attempt in found.attempts:
        ended[by_number[attempt.trial]].append(attempt.kind)
    return ended


def attempts_of(found: Sweep, name: str) -> list[Attempt]:
    """The attempts of a trial."""
    return [attempt for attempt in found.attempts if attempt.trial == found.by("do")[name].number]


def log_of(found: Sweep, name: str) -> str:
    """What a trial has printed in all its attempts."""
    return (found.folder(found.by("do")[name]) / "trial.log").read_text()


def reports_of(found: Sweep, attempt: Attempt) -> list[Report]:
    """The reports of an attempt in the ledger."""
    ledger = Ledger.open(found.directory, readonly=True)
    rows = [report for report in ledger.reports(limit=1_000_000) if report.attempt == attempt.id]
    ledger.close()
    return rows


# --- how often -----------------------------------------------------------------------------------------------


def test_an_endless_limit_is_none(project: Project) -> None:
    """Nor is one of centuries."""
    options = ("sweep.stall_timeout_min=inf", "sweep.trial_timeout_min=1e12")
    assert kinds(sweep(project, "endless", "good", *options, status=0)) == {"good": [None]}


def test_by_default_a_trial_is_tried_again_where_its_code_may_not_be_at_fault(project: Project) -> None:
    """Once after a crash or too little memory; never after an exception or a metric that is no number."""
    names = "good,exception,invalid,leaves,aborts,always_memory,always_gpu_memory,instantiated"
    found = sweep(project, "usual", names, "sweep.executor.slots=3", status=1)
    assert kinds(found) == {
        "good": [None],
        "exception": [FailureKind.EXCEPTION],
        "invalid": [FailureKind.INVALID_METRIC],
        "leaves": [FailureKind.CRASH] * 2,
        "aborts": [FailureKind.CRASH] * 2,
        "always_memory": [FailureKind.OUT_OF_MEMORY] * 2,
        "always_gpu_memory": [FailureKind.GPU_OUT_OF_MEMORY] * 2,
        "instantiated": [FailureKind.OUT_OF_MEMORY] * 2,
    }
    assert found.states() == {TrialState.COMPLETE: 1, TrialState.FAIL: 7}
    crashes = attempts_of(found, "aborts")
    assert [(each.ordinal, each.message) for each in crashes] == [
        (0, "killed by SIGABRT"),
        (1, "killed by SIGABRT"),
    ]
    assert all(each.host and each.ended_at for each in crashes)
    assert "[repro-sweep: attempt 2]" in log_of(found, "aborts")


def test_sweep_retries_says_how_often_a_trial_is_tried_again_after_each_kind(project: Project) -> None:
    """A trial that ends well in the meantime is not tried again; each kind is counted on its own."""
    found = sweep(
        project, "told", "exception1,second_time,invalid1,leaves1,dies,always_memory1,always_gpu_memory1",
        "sweep.executor.slots=3", "sweep.retries.EXCEPTION=2", "sweep.retries.INVALID_METRIC=1",
        "sweep.retries.CRASH=0", "sweep.retries.OUT_OF_MEMORY=0", "sweep.retries.GPU_OUT_OF_MEMORY=2",
        status=1,
    )  # fmt: skip
    assert kinds(found) == {
        "exception1": [FailureKind.EXCEPTION] * 3,
        "second_time": [FailureKind.EXCEPTION, None],
        "invalid1": [FailureKind.INVALID_METRIC] * 2,
        "leaves1": [FailureKind.CRASH],
        "dies": [FailureKind.CRASH],
        "always_memory1": [FailureKind.OUT_OF_MEMORY],
        "always_gpu_memory1": [FailureKind.GPU_OUT_OF_MEMORY] * 3,
    }
    assert found.by("do")["second_time"].state is TrialState.COMPLETE
    assert attempts_of(found, "dies")[0].message == f"killed by signal {signal.SIGRTMIN + 3}"
    assert {attempt.worker for attempt in found.attempts} == {found.attempts[0].worker}


def test_retries_do_not_count_as_failures_of_a_sweep_but_their_trial_does_when_they_are_spent(
    project: Project,
) -> None:
    """``sweep.max_failures`` is about trials; one that failed by itself waits behind the others."""
    found = sweep(
        project, "many", ",".join(f"exception{number}" for number in range(2, 8)),
        "sweep.executor.slots=1", "sweep.retries.EXCEPTION=1", "sweep.max_failures=1", status=1,
    )  # fmt: skip
    assert found.states() == {TrialState.FAIL: 2, TrialState.WAITING: 4}
    in_order = sorted(found.attempts, key=lambda attempt: attempt.started_at)
    assert [attempt.trial for attempt in in_order] == [0, 1, 2, 3, 4, 5, 0, 1]


# --- alone after too little memory ---------------------------------------------------------------------------


def assert_ran_alone(found: Sweep, name: str, kind: FailureKind) -> None:
    """The second attempt of a trial had nothing beside it; before and after, trials ran side by side."""
    first, second = attempts_of(found, name)
    assert (first.kind, second.kind) == (kind, None)
    others = [attempt for attempt in found.attempts if attempt.id != second.id]
    assert beside(first, others)
    assert beside(second, others) == []
    later = [attempt for attempt in others if attempt.started_at > ended(second)]
    assert any(beside(attempt, [each for each in later if each is not attempt]) for attempt in later)
    assert found.states() == {TrialState.COMPLETE: len(found.trials)}


def beside(attempt: Attempt, others: list[Attempt]) -> list[Attempt]:
    """The attempts that ran at the same time."""
    return [each for each in others if each.started_at < ended(attempt) and attempt.started_at < ended(each)]


def ended(attempt: Attempt) -> float:
    """When an attempt has ended, in seconds UTC."""
    assert attempt.ended_at is not None
    return attempt.ended_at


def test_a_trial_that_was_out_of_gpu_memory_runs_again_with_nothing_beside_it_on_its_gpu(
    make_project: MakeProject,
) -> None:
    """Two slots share the GPU; when it is done, the others go on."""
    project = make_project(FILES)
    names = ",".join(["gpu_memory", *(f"busy{number}" for number in range(12))])
    found = sweep(
        project, "gpu", names, "sweep.resources.gpus_per_trial=0.5", "sweep.executor.slots=2", status=0,
        env={"CUDA_VISIBLE_DEVICES": "0"},
    )  # fmt: skip
    assert_ran_alone(found, "gpu_memory", FailureKind.GPU_OUT_OF_MEMORY)


def test_a_trial_that_was_out_of_memory_runs_again_with_nothing_beside_it_on_its_worker(
    make_project: MakeProject,
) -> None:
    """Where trials have no GPU, they share the machine."""
    project = make_project(FILES)
    names = ",".join(["memory", *(f"busy{number}" for number in range(15))])
    found = sweep(project, "machine", names, "sweep.executor.slots=3", status=0)
    assert_ran_alone(found, "memory", FailureKind.OUT_OF_MEMORY)


# --- the kernel's own killing --------------------------------------------------------------------------------


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group of 1.5 GB of memory below this process's own."""
    folder = own_memory_group()
    if folder is None:
        pytest.skip("no memory control group can be made here")
    group = folder / f"repro-sweep-test-{os.getpid()}"
    limit = "memory.max" if (folder / "cgroup.controllers").exists() else "memory.limit_in_bytes"
    try:
        group.mkdir()
        (group / limit).write_text("1500000000")
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no memory control group can be made here: {error}")
    yield group
    eventually(lambda: (group / "cgroup.procs").read_text() == "", "the group is empty")
    group.rmdir()


def own_memory_group() -> Path | None:
    """The folder of this process's memory control group, of version 1 or 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path(f"/sys/fs/cgroup/memory{path}")
        if not controllers and Path(f"/sys/fs/cgroup{path}/memory.max").exists():
            return Path(f"/sys/fs/cgroup{path}")
    return None


INSIDE = """
import os
import sys
from pathlib import Path

Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_a_trial_that_the_kernel_kills_for_want_of_memory_is_out_of_memory_and_tried_again(
    make_project: MakeProject, memory_group: Path
) -> None:
    """A kill by anybody else is a crash."""
    project = make_project({**FILES, "inside.py": INSIDE})
    result = project.run(
        "inside.py", str(memory_group), str(CONSOLE_SCRIPT), *SWEEP, "do=good,kernel_memory", "sweep.executor.slots=1",
        python=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = project.sweep("default")
    assert kinds(found) == {"good": [None], "kernel_memory": [FailureKind.OUT_OF_MEMORY, None]}
    assert attempts_of(found, "kernel_memory")[0].message == "killed by the kernel: out of memory"


# --- too long ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def limited(make_shared_project: MakeProject) -> Sweep:
    """Trials with limits on their time."""
    return sweep(
        make_shared_project(FILES, name="limited"), "limited", "hangs,endless,slow_but_alive",
        "sweep.executor.slots=3", "sweep.trial_timeout_min=0.13", "sweep.stall_timeout_min=0.02", status=1,
    )  # fmt: skip


def test_a_trial_that_takes_too_long_is_ended_and_not_tried_again(limited: Sweep) -> None:
    """However much it reports; all of that is kept."""
    [attempt] = attempts_of(limited, "endless")
    assert attempt.kind is FailureKind.TIMEOUT
    assert attempt.message == "longer than 0.13 min (sweep.trial_timeout_min)"
    assert ended(attempt) - attempt.started_at >= 0.13 * 60
    steps = [report.step for report in reports_of(limited, attempt)]
    assert len(steps) > 20
    assert steps == list(range(len(steps)))


def test_a_trial_that_reports_nothing_for_too_long_is_ended_and_tried_again(limited: Sweep) -> None:
    """Once; one that reports may take longer."""
    assert kinds(limited)["hangs"] == [FailureKind.STALLED] * 2
    stalled = attempts_of(limited, "hangs")[0]
    assert stalled.message == "no report for 0.02 min (sweep.stall_timeout_min); see its log"
    assert kinds(limited)["slow_but_alive"] == [None]


def test_the_log_of_a_stalled_trial_shows_where_each_of_its_threads_hangs(limited: Sweep) -> None:
    """In each of its attempts."""
    first, second = log_of(limited, "hangs").split("[repro-sweep: attempt 2]")
    for log in (first, second):
        assert_shows_where_it_hangs(log)


def test_the_log_of_a_stalled_trial_with_a_process_of_its_own_shows_the_same(
    make_project: MakeProject,
) -> None:
    """As a task has that starts threads at its import."""
    project = make_project({**FILES, "tasks.py": TASKS + PEST})
    options = ("sweep.stall_timeout_min=0.07", "sweep.retries.STALLED=0", "sweep.executor.slots=2")
    found = sweep(project, "default", "hangs,good", *options, status=1)
    assert kinds(found) == {"hangs": [FailureKind.STALLED], "good": [None]}
    assert_shows_where_it_hangs(log_of(found, "hangs"))


def test_a_trial_that_is_stalled_before_its_process_is_ready_is_no_crash(make_project: MakeProject) -> None:
    """The signal that asks for its stacks does it no harm."""
    project = make_project({**FILES, "tasks.py": TASKS + PEST})
    options = ("sweep.stall_timeout_min=0.0002", "sweep.retries.STALLED=0", "sweep.executor.slots=1")
    found = sweep(project, "default", "hangs,good", *options, status=1)
    assert kinds(found) == {"hangs": [FailureKind.STALLED], "good": [None]}


def assert_shows_where_it_hangs(log: str) -> None:
    """The line of the main thread, and the function of the other one."""
    assert f'tasks.py", line {LINE} in hangs' in log
    assert "in waits_for_nothing" in log


# --- through no fault of its own -----------------------------------------------------------------------------


def started(project: Project) -> int:
    """How many attempts have started."""
    folder = project.root / "started"
    return len(list(folder.iterdir())) if folder.exists() else 0


def signal_agent(command: Running, project: Project, number: signal.Signals, *, started_before: int) -> None:
    """Send its worker a signal as soon as so many attempts have started."""
    command.until(lambda: started(project) == started_before, f"{started_before} attempts start")
    [agent] = project.processes_of(AGENT)
    os.kill(agent, number)


def test_trials_of_a_worker_that_is_asked_to_leave_are_preempted_and_run_again_first_without_limit(
    make_project: MakeProject,
) -> None:
    """As a cluster does that takes a machine back."""
    project = make_project(FILES)
    with project.start(*SWEEP, "do=gated1,gated2,good", "sweep.executor.slots=2") as command:
        for times in range(1, 4):
            signal_agent(command, project, signal.SIGTERM, started_before=2 * times)
        command.until(lambda: started(project) == 8, "both are started for the fourth time")
        (project.root / "open").touch()
        assert command.wait() == 0, command.stderr
    found = project.sweep("default")
    assert kinds(found) == {
        "gated1": [*[FailureKind.PREEMPTED] * 3, None],
        "gated2": [*[FailureKind.PREEMPTED] * 3, None],
        "good": [None],
    }
    assert len({attempt.worker for attempt in found.attempts}) == 4
    assert all(attempt.host for attempt in found.attempts)
    assert project.processes() == {}


def test_a_trial_whose_workers_are_lost_too_often_fails_and_the_others_go_on(
    make_project: MakeProject,
) -> None:
    """``sweep.retries.NODE_LOST`` losses are no accident any more."""
    project = make_project(FILES)
    options = ("do=gated,good", "sweep.executor.slots=1", "sweep.retries.NODE_LOST=1")
    with project.start(*SWEEP, *options) as command:
        for times in (1, 2):
            signal_agent(command, project, signal.SIGKILL, started_before=times)
        assert command.wait() == 1, command.stderr
    found = project.sweep("default")
    assert kinds(found) == {"gated": [FailureKind.NODE_LOST] * 2, "good": [None]}
    assert attempts_of(found, "gated")[0].message == "its worker killed by SIGKILL"
    assert found.by("do")["gated"].state is TrialState.FAIL


# --- reports -------------------------------------------------------------------------------------------------


def test_every_report_of_a_trial_whose_worker_was_killed_is_recorded(make_project: MakeProject) -> None:
    """Those that it made from several threads, up to its last instant; its own record of them is then removed."""
    project = make_project(FILES)
    with project.start(*SWEEP, "do=reports", "sweep.executor.slots=1") as command:
        [first] = acked(command, project, 1)
        [agent] = project.processes_of(AGENT)
        os.kill(agent, signal.SIGKILL)
        acked(command, project, 2)
        assert len(list(project.root.glob("multirun/default/trials/*/reports-*.jsonl"))) == 1
        (project.root / "open").touch()
        assert command.wait() == 0, command.stderr
    found = project.sweep("default")
    lost, last = found.attempts
    assert [lost.kind, last.kind] == [FailureKind.NODE_LOST, None]
    assert first.name == f"acked-{lost.id}"
    for attempt in (lost, last):
        said = sorted(map(int, (project.root / f"acked-{attempt.id}").read_text().split()))
        recorded = sorted(report.step for report in reports_of(found, attempt))
        assert len(said) >= 100
        assert recorded == list(range(len(recorded)))
        assert recorded[: len(said)] == list(range(len(said))), "what was reported is recorded"
        assert attempt.reports == len(recorded)
        assert 0 <= len(recorded) - len(said) <= 3, "at most one more for each thread"
    assert list(found.directory.glob("trials/*/reports-*.jsonl")) == []


def acked(command: Running, project: Project, count: int) -> list[Path]:
    """Wait until so many attempts have made a hundred reports each; returns their files."""

    def files() -> list[Path]:
        return [path for path in project.root.glob("acked-*") if path.read_bytes().count(b"\n") >= 100]

    command.until(lambda: len(files()) >= count, f"{count} attempts report")
    return files()
