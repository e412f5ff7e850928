"""What a trial may do to itself, and what it is given: it never harms its sweep, and its end is on record."""

from __future__ import annotations

import gc
import json
import re
import stat
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from helpers import Project, Sweep

from repro_sweep.ledger import Ledger
from repro_sweep.records import Attempt
from repro_sweep.states import FailureKind, TrialState

MakeProject = Callable[..., Project]

HEAD = "defaults: [base_sweep, sampler: grid, executor: local, _self_]\n"

ZOO = """
import ctypes
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

import repro_sweep


def note_environment(cfg):
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "REPRO_SWEEP_TRIAL", "REPRO_SWEEP_NAME")
    facts = {name: os.environ.get(name) for name in names} | {
        "random": random.random(), "numpy": float(np.random.random()), "pid": os.getpid(), "parent": os.getppid(),
        "collector": [gc.isenabled(), *gc.get_threshold()],
    }
    Path("facts").mkdir(exist_ok=True)
    Path("facts", cfg.do).write_text(json.dumps(facts))


def train(cfg):
    note_environment(cfg)
    print("starts", cfg.do)
    return globals()[cfg.do.rstrip("0123456789")]()


def good():
    return 1.5


def together():  # four at the same time, or none of them ends well
    mine = Path("together", str(os.getpid()))
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("")
    deadline = time.monotonic() + 100
    while len(list(mine.parent.iterdir())) < 4:
        if time.monotonic() > deadline:
            raise TimeoutError("alone")
        time.sleep(0.01)
    return 1.0


def exception():
    raise ValueError("first line\\nsecond line")


class Unpicklable(Exception):
    def __init__(self, needed, also_needed):
        self.lock = threading.Lock()
        self.function = lambda: None
        super().__init__("cannot be pickled")

    def __reduce__(self):
        raise TypeError("no")


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


def unpicklable():
    raise Unpicklable(1, 2)


def unprintable():
    raise Unprintable()


class UnprintableRuntimeError(RuntimeError):
    __str__ = __repr__ = Unprintable.__str__


def unprintable_too():
    raise UnprintableRuntimeError()


def not_an_exception():
    raise KeyboardInterrupt


def system_exit():
    sys.exit("left early")


def system_exit_without_error():
    sys.exit(0)


def os_exit():
    print("last words", flush=True)
    os._exit(3)


def segfault():
    ctypes.string_at(0)


def sigkill():
    os.kill(os.getpid(), signal.SIGKILL)


def sigterm_to_its_group():
    os.killpg(0, signal.SIGTERM)
    time.sleep(60)


def recursion():
    return recursion()


def closed_descriptors():
    os.closerange(0, 256)
    return 1.0


def not_a_number():
    return float("nan")


def infinite():
    return float("inf")


def text():
    return "0.9"


def text_in_dict():
    return {"score": "0.9", "loss": 0.5}


def none_of_a_number():
    return {"score": np.array([1.0, 2.0])}


def out_of_memory():
    raise MemoryError("not enough")


def scalars():
    return {"score": np.float32(0.5), "count": np.int64(7), "flag": True, "note": "no number", "array": np.array([3.0])}


def reports():
    for step in range(5):
        repro_sweep.report(step, score=step / 10, loss=np.float64(1 / (step + 1)))
    repro_sweep.report(5, loss=float("nan"))
    return {"score": 0.75}


def only_reports():
    repro_sweep.report(0, score=0.25)
    repro_sweep.report(1, score=0.5)


def bad_report():
    repro_sweep.report(0, score=0.125)
    repro_sweep.report("one", score=1.0)


def reports_from_threads():
    threads = [threading.Thread(target=repro_sweep.report, args=(step,), kwargs={"score": step}) for step in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 1.0


def reports_from_processes():
    for start in (0, 10):
        repro_sweep.report(start, score=start)
        if os.fork() == 0:
            for step in range(start + 1, start + 10):
                repro_sweep.report(step, score=step)
            os._exit(0)
        os.wait()
    return 1.0


def flood():
    print("the first line")
    block = b"x" * 999_999 + b"\\n"
    for _ in range(200):
        sys.stdout.buffer.write(block)
    print("the last line")
    return 1.0


def bytes_():
    sys.stdout.buffer.write(b"\\xff\\xfe\\x00 no text\\n")
    return 1.0


def leaves_a_child():
    subprocess.Popen(["sleep", "1000"])
    return 1.0


def leaves_a_session():
    subprocess.Popen(["sleep", "1000"], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return 1.0


def dies_with_children():
    subprocess.Popen(["sleep", "1000"])
    os.kill(os.getpid(), signal.SIGSEGV)


def daemon_thread():
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    return 1.0


def subprocesses():
    import multiprocessing

    assert subprocess.run(["true"]).returncode == 0
    assert os.system("exit 7") == 7 << 8
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return sum(pool.map(abs, [-1, -2]))


def at_exit():
    import atexit

    atexit.register(print, "said at exit")
    return 1.0


def folders():
    (repro_sweep.artifact_dir() / "kept").write_text("artifact")
    (repro_sweep.checkpoint_dir() / "kept").write_text("checkpoint")
    return 1.0


def stdin():
    return float(len(sys.stdin.read()))
"""
FATES = {
    "exception": (FailureKind.EXCEPTION, "ValueError: first line"),
    "unpicklable": (FailureKind.EXCEPTION, "Unpicklable: cannot be pickled"),
    "unprintable": (FailureKind.EXCEPTION, "Unprintable: (its text cannot be had)"),
    "unprintable_too": (FailureKind.EXCEPTION, "UnprintableRuntimeError: (its text cannot be had)"),
    "not_an_exception": (FailureKind.EXCEPTION, "KeyboardInterrupt"),
    "system_exit": (FailureKind.EXCEPTION, "SystemExit: left early"),
    "system_exit_without_error": (FailureKind.EXCEPTION, "SystemExit: 0"),
    "os_exit": (FailureKind.CRASH, "its process exited with status 3 before the task returned"),
    "segfault": (FailureKind.CRASH, "killed by SIGSEGV"),
    "sigkill": (FailureKind.CRASH, "killed by SIGKILL"),
    "sigterm_to_its_group": (FailureKind.CRASH, "killed by SIGTERM"),
    "recursion": (FailureKind.EXCEPTION, "RecursionError: maximum recursion depth exceeded"),
    "closed_descriptors": (FailureKind.CRASH, "its process exited with status 1 before the task returned"),
    "not_a_number": (FailureKind.INVALID_METRIC, "metric 'score' is NaN"),
    "text": (FailureKind.INVALID_METRIC, "returned metric 'score' must be a number, got str"),
    "text_in_dict": (FailureKind.INVALID_METRIC, "returned metric 'score' must be a number, got str"),
    "none_of_a_number": (
        FailureKind.INVALID_METRIC,
        "returned metric 'score' must be a number, got ndarray: .*",
    ),
    "out_of_memory": (FailureKind.OUT_OF_MEMORY, "MemoryError: not enough"),
    "bad_report": (FailureKind.EXCEPTION, "TypeError: report: step must be a whole number, got 'one'"),
    "dies_with_children": (FailureKind.CRASH, "killed by SIGSEGV"),
}
LUCKY = (
    "together1", "together2", "together3", "together4", "good1", "good2", "infinite", "scalars", "reports",
    "only_reports", "reports_from_threads", "reports_from_processes", "flood", "bytes_", "leaves_a_child",
    "leaves_a_session", "daemon_thread", "subprocesses", "at_exit", "folders", "stdin",
)  # fmt: skip


@pytest.fixture(scope="module")
def zoo(make_shared_project: MakeProject) -> SimpleNamespace:
    """One sweep of trials that misbehave in every way, four at a time, on two pretended GPUs."""
    everything = [*LUCKY[:5], *FATES, *LUCKY[5:]]
    sweep = {
        "conf/config.yaml": "do: good",
        "conf/sweep/zoo.yaml": HEAD
        + f"task: zoo.train\nmetric: score\nparams: {{do: '{','.join(everything)}'}}\n",
        "zoo.py": ZOO,
    }
    project = make_shared_project(sweep)
    result = project.run(
        "+sweep=zoo", "sweep.executor.slots=4", "sweep.resources.gpus_per_trial=0.5", "sweep.log_limit_mb=1",
        "sweep.retries.CRASH=0", "sweep.retries.OUT_OF_MEMORY=0",
        env={"CUDA_VISIBLE_DEVICES": "0,1"},
    )  # fmt: skip
    left = project.processes()
    ledger = project.sweep("zoo")
    facts = {path.name: json.loads(path.read_text()) for path in (project.root / "facts").iterdir()}
    return SimpleNamespace(
        project=project,
        result=result,
        left=left,
        sweep=ledger,
        by=ledger.by("do"),
        facts=facts,
        all=everything,
    )


def attempt_of(zoo: SimpleNamespace, name: str) -> Attempt:
    """The one attempt of a trial of the zoo."""
    sweep: Sweep = zoo.sweep
    return sweep.last_attempt(zoo.by[name])


def log_of(zoo: SimpleNamespace, name: str) -> bytes:
    """The log of a trial of the zoo."""
    sweep: Sweep = zoo.sweep
    return (sweep.folder(zoo.by[name]) / "trial.log").read_bytes()


@pytest.mark.parametrize(
    ("name", "kind", "message"), [(name, *fate) for name, fate in FATES.items()], ids=list(FATES)
)
def test_a_trial_that_goes_wrong_is_a_recorded_failure_of_its_kind_with_one_line(
    zoo: SimpleNamespace, name: str, kind: FailureKind, message: str
) -> None:
    """And with its log, which begins with what it printed."""
    attempt = attempt_of(zoo, name)
    assert zoo.by[name].state is TrialState.FAIL
    assert attempt.kind is kind
    assert re.fullmatch(message.replace("(", r"\(").replace(")", r"\)"), attempt.message or "")
    assert b"starts " + name.encode() in log_of(zoo, name)


@pytest.mark.parametrize("name", LUCKY)
def test_a_trial_that_returns_its_metric_is_complete_whatever_else_it_does(
    zoo: SimpleNamespace, name: str
) -> None:
    """Whatever goes wrong beside it."""
    assert zoo.by[name].state is TrialState.COMPLETE, attempt_of(zoo, name)


def test_failing_trials_never_stop_the_others(zoo: SimpleNamespace) -> None:
    """Each has run once; the exit status says that some failed."""
    assert zoo.result.returncode == 1, zoo.result.stderr
    assert zoo.sweep.states() == {TrialState.COMPLETE: len(LUCKY), TrialState.FAIL: len(FATES)}
    assert len(zoo.sweep.attempts) == len(zoo.all)
    assert len({attempt.worker for attempt in zoo.sweep.attempts}) == 1


def test_the_summary_shows_failures_with_kind_line_and_log(zoo: SimpleNamespace) -> None:
    """The first ten; how many more there are."""
    assert f"{len(FATES)} failed:" in zoo.result.stdout
    assert f"{len(FATES) - 10} more" in zoo.result.stdout
    shown = re.findall(r"^ +trial (\d+) +(\w+) +(.+?) +(/\S+/trial\.log)$", zoo.result.stdout, re.MULTILINE)
    assert len(shown) == 10
    for number, kind, message, log in shown:
        [attempt] = [attempt for attempt in zoo.sweep.attempts if attempt.trial == int(number)]
        assert (kind, message) == (attempt.kind, attempt.message)
        assert log == str(zoo.sweep.directory / f"trials/{number}/trial.log")


def test_a_failed_trial_s_log_holds_the_traceback(zoo: SimpleNamespace) -> None:
    """Of Python, and of a crash in native code."""
    assert b"ValueError: first line\nsecond line" in log_of(zoo, "exception")
    assert b'zoo.py", line' in log_of(zoo, "exception")
    assert b"last words" in log_of(zoo, "os_exit")
    assert b"Segmentation fault" in log_of(zoo, "segfault")
    assert b"in segfault" in log_of(zoo, "segfault")
    assert b"is NaN" in log_of(zoo, "not_a_number")


def test_a_flood_of_output_is_cut_to_its_head_and_tail(zoo: SimpleNamespace) -> None:
    """200 MB printed, at most ``sweep.log_limit_mb`` kept."""
    log = log_of(zoo, "flood")
    assert len(log) < 1_400_000
    assert log.startswith(b"starts flood\nthe first line\nxxx")
    assert log.endswith(b"xxx\nthe last line\n")
    assert re.search(rb"\n\[repro-sweep: [\d,]+ bytes left out \(sweep.log_limit_mb\)\]\n", log)


def test_output_that_is_no_text_is_kept_as_it_is(zoo: SimpleNamespace) -> None:
    """Byte for byte."""
    assert b"\xff\xfe\x00 no text\n" in log_of(zoo, "bytes_")


def test_what_a_task_registered_with_atexit_runs_at_the_trial_s_end(zoo: SimpleNamespace) -> None:
    """As in a process of its own."""
    assert b"said at exit" in log_of(zoo, "at_exit")


def test_no_process_is_left_when_a_sweep_has_ended(zoo: SimpleNamespace) -> None:
    """Not even those that a trial started in a session of their own."""
    assert zoo.left == {}


def test_reports_are_recorded_with_their_steps_and_times(zoo: SimpleNamespace) -> None:
    """In their order, NaN included; the times are those of the calls."""
    ledger = Ledger.open(zoo.sweep.directory, readonly=True)
    reports = ledger.reports(trial=zoo.by["reports"].number)
    threads = ledger.reports(trial=zoo.by["reports_from_threads"].number)
    processes = ledger.reports(trial=zoo.by["reports_from_processes"].number)
    ledger.close()
    assert [(report.step, report.metrics) for report in reports[:5]] == [
        (step, {"score": step / 10, "loss": 1 / (step + 1)}) for step in range(5)
    ]
    assert len(reports) == 6
    assert reports[5].metrics["loss"] != reports[5].metrics["loss"]
    attempt = attempt_of(zoo, "reports")
    times = [report.time for report in reports]
    assert times == sorted(times)
    assert attempt.started_at <= times[0]
    assert times[-1] <= (attempt.ended_at or 0)
    assert sorted(report.step for report in threads) == list(range(20))
    assert [report.step for report in processes] == list(range(20))


def test_the_returned_metrics_are_final_and_the_last_reported_ones_complete_them(
    zoo: SimpleNamespace,
) -> None:
    """Numpy's numbers count as numbers; a note that is no number is left out."""
    metrics = attempt_of(zoo, "reports").metrics
    assert metrics["score"] == 0.75
    assert metrics["loss"] != metrics["loss"]
    assert attempt_of(zoo, "only_reports").metrics == {"score": 0.5}
    assert attempt_of(zoo, "scalars").metrics == {"score": 0.5, "count": 7, "flag": 1, "array": 3}
    assert attempt_of(zoo, "good1").metrics == {"score": 1.5}
    assert attempt_of(zoo, "infinite").metrics == {"score": float("inf")}
    assert attempt_of(zoo, "bad_report").metrics == {"score": 0.125}


def test_random_state_differs_between_trials(zoo: SimpleNamespace) -> None:
    """Although they are forked from one process that has imported numpy."""
    for source in ("random", "numpy"):
        assert len({facts[source] for facts in zoo.facts.values()}) == len(zoo.all)


def test_trials_are_forked_from_one_process(zoo: SimpleNamespace) -> None:
    """Each in a process of its own."""
    assert len({facts["parent"] for facts in zoo.facts.values()}) == 1
    assert len({facts["pid"] for facts in zoo.facts.values()}) == len(zoo.all)


def test_each_trial_sees_only_the_gpu_of_its_slot(zoo: SimpleNamespace) -> None:
    """Two of four trials at a time share each of two GPUs; more slots than CPUs are the user's right."""
    devices = Counter(zoo.facts[f"together{number}"]["CUDA_VISIBLE_DEVICES"] for number in range(1, 5))
    assert devices == {"0": 2, "1": 2}
    assert {facts["CUDA_VISIBLE_DEVICES"] for facts in zoo.facts.values()} == {"0", "1"}
    assert {attempt.slot for attempt in zoo.sweep.attempts} == {0, 1, 2, 3}


def test_a_trial_knows_its_number_and_its_sweep(zoo: SimpleNamespace) -> None:
    """From the environment."""
    for name, facts in zoo.facts.items():
        assert facts["REPRO_SWEEP_TRIAL"] == str(zoo.by[name].number)
        assert facts["REPRO_SWEEP_NAME"] == "zoo"


def test_numeric_libraries_get_as_many_threads_as_the_trial_has_cpus(zoo: SimpleNamespace) -> None:
    """One, unless the sweep or the user says otherwise."""
    assert {facts["OMP_NUM_THREADS"] for facts in zoo.facts.values()} == {"1"}
    assert {facts["MKL_NUM_THREADS"] for facts in zoo.facts.values()} == {"1"}


def test_artifacts_and_checkpoints_lie_in_the_trial_s_folder(zoo: SimpleNamespace) -> None:
    """Which only the user can read."""
    folder = zoo.sweep.folder(zoo.by["folders"])
    assert (folder / "artifacts" / "kept").read_text() == "artifact"
    assert (folder / "checkpoints" / "kept").read_text() == "checkpoint"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


# --- a task whose import makes forking unsafe ----------------------------------------------------------------

THREADED = """
import threading
threading.Thread(target=threading.Event().wait, daemon=True, name="pest").start()
"""


@pytest.fixture(scope="module")
def threaded(make_shared_project: MakeProject) -> SimpleNamespace:
    """Three trials of a module that starts a thread at its import, on whole GPUs, with two CPUs each."""
    project = make_shared_project(
        {
            "conf/config.yaml": "do: good",
            "threaded.py": THREADED + ZOO,
        },
        name="threaded",
    )  # fmt: skip
    result = project.run(
        "+sweep=default", "sweep.task=threaded.train", "sweep.metric=score", "do=good,sigkill,leaves_a_child",
        "sweep.resources.cpus_per_trial=2", "sweep.executor.slots=2",
        env={"CUDA_VISIBLE_DEVICES": "GPU-one,GPU-two,GPU-three", "MKL_NUM_THREADS": "7"},
    )  # fmt: skip
    left = project.processes()
    facts = {path.name: json.loads(path.read_text()) for path in (project.root / "facts").iterdir()}
    return SimpleNamespace(result=result, left=left, sweep=project.sweep("default"), facts=facts)


def test_a_task_that_starts_threads_at_import_is_not_forked_but_runs(threaded: SimpleNamespace) -> None:
    """Each trial in a new process; a crash is still only its own."""
    by = threaded.sweep.by("do")
    assert {name: trial.state for name, trial in by.items()} == {
        "good": TrialState.COMPLETE,
        "sigkill": TrialState.FAIL,
        "leaves_a_child": TrialState.COMPLETE,
    }
    assert threaded.sweep.last_attempt(by["sigkill"]).message == "killed by SIGKILL"
    assert threaded.sweep.last_attempt(by["good"]).metrics == {"score": 1.5}
    assert threaded.left == {}


def test_the_worker_s_log_says_why_trials_are_not_forked(threaded: SimpleNamespace) -> None:
    """So that the user can do something about it."""
    [log] = (threaded.sweep.directory / "workers").glob("*/worker.log")
    assert "starts threads (pest)" in log.read_text()


def test_a_trial_gets_one_whole_gpu_where_the_machine_has_some(threaded: SimpleNamespace) -> None:
    """Named as CUDA_VISIBLE_DEVICES named it; two slots use two of three."""
    devices = {facts["CUDA_VISIBLE_DEVICES"] for facts in threaded.facts.values()}
    assert devices <= {"GPU-one", "GPU-two"}
    assert devices


def test_thread_counts_follow_the_trial_s_cpus_unless_the_user_has_set_them(
    threaded: SimpleNamespace,
) -> None:
    """``sweep.resources.cpus_per_trial`` was 2, MKL_NUM_THREADS was 7."""
    assert {facts["OMP_NUM_THREADS"] for facts in threaded.facts.values()} == {"2"}
    assert {facts["MKL_NUM_THREADS"] for facts in threaded.facts.values()} == {"7"}


@pytest.mark.parametrize("project", ["zoo", "threaded"])
def test_a_trial_has_python_s_own_settings_of_the_garbage_collector(
    project: str, request: pytest.FixtureRequest
) -> None:
    """The processes beside it have others, and so has the zygote while it imports the task."""
    facts = request.getfixturevalue(project).facts
    assert facts
    assert all(each["collector"] == [True, *gc.get_threshold()] for each in facts.values())


# --- a sweep that is edited, and one that fails too often ----------------------------------------------------


@pytest.fixture(scope="module")
def edited(make_shared_project: MakeProject) -> SimpleNamespace:
    """While the first trial runs, code and YAML that later ones use are edited; the last ones fail."""
    project = make_shared_project(
        {
            "conf/config.yaml": "defaults: [optimizer: sgd, _self_]\nx: 1\n",
            "conf/optimizer/sgd.yaml": "lr: 0.1",
            "conf/optimizer/adam.yaml": "lr: 0.001\nbeta: 0.9\n",
            "tasks.py": """
                from pathlib import Path

                def train(cfg):
                    import late

                    with open("ran", "a") as ran:
                        print(cfg.x, cfg.optimizer.lr, late.VALUE, file=ran)
                    Path("conf/optimizer/adam.yaml").write_text("lr: 0.5\\nbeta: 0.9\\n")
                    Path("late.py").write_text("VALUE = 2\\n")
                    Path("tasks.py").write_text("nothing that Python could read")
                    if cfg.x > 2:
                        raise ValueError(cfg.x)
                    return 1.0
            """,
            "late.py": "VALUE = 1\n",
        },
        name="edited",
    )
    result = project.run(
        "+sweep=default", "sweep.task=tasks.train", "sweep.executor.slots=1", "sweep.max_failures=2",
        "x=1,3,4,5,6,7", "optimizer=sgd,adam",
    )  # fmt: skip
    return SimpleNamespace(project=project, result=result, sweep=project.sweep("default"))


def test_trials_run_what_was_submitted_whatever_is_edited_meanwhile(edited: SimpleNamespace) -> None:
    """Code and YAML: those of the snapshot, not of the live tree."""
    ran = [line.split() for line in (edited.project.root / "ran").read_text().splitlines()]
    assert ran == [
        ["1", "0.1", "1"],
        ["1", "0.001", "1"],
        ["3", "0.1", "1"],
        ["3", "0.001", "1"],
        ["4", "0.1", "1"],
    ]
    assert (edited.project.root / "late.py").read_text() == "VALUE = 2\n"


def test_more_failures_than_max_failures_end_a_sweep(edited: SimpleNamespace) -> None:
    """Nothing new starts; the rest can be run later."""
    assert edited.result.returncode == 1
    assert edited.sweep.states() == {TrialState.COMPLETE: 2, TrialState.FAIL: 3, TrialState.WAITING: 7}
    assert "max_failures" in edited.result.stderr
