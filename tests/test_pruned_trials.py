"""A worker's trials wait for the coordinator's word on what they report, and never for long."""

from __future__ import annotations

import json
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from helpers import a_spec, environment, eventually

from repro_sweep import protocol
from repro_sweep.errors import TrialInterrupted, TrialPruned
from repro_sweep.lease import ADDRESS_NAME
from repro_sweep.states import Direction, FailureKind, TrialState
from repro_sweep.sweep import Chosen, Composition, Objective, SweepSpec, TaskSpec
from repro_sweep.worker import inbox as inbox_module
from repro_sweep.worker.agent import Agent
from repro_sweep.worker.inbox import Inbox
from repro_sweep.worker.outbox import Outbox
from repro_sweep.worker.trial import Context

Verdict = Callable[[protocol.Report], bool]

TASK = '''
import itertools
import os
import sys
import threading
import time
from pathlib import Path

from hydra.utils import instantiate

import repro_sweep
from repro_sweep import TrialPruned


class Note:
    """A callback of the application's."""

    def on_job_start(self, **_):
        pass

    def on_job_end(self, config, job_return, **_):
        Path(f"ended-{config.do}").write_text(f"{job_return.status.name} {type(job_return._return_value).__name__}")


def note(name, text):
    with open(name, "a") as file:
        file.write(f"{text}\\n")


def train(cfg):
    return globals()[cfg.do]()


def steps():
    for step in range(10):
        repro_sweep.report(step, score=step / 10)
    return 1.0


def stubborn():
    for step in range(6):
        try:
            repro_sweep.report(step, score=step)
        except TrialPruned as error:
            pruned = error
            note("raised", step)
    raise pruned


def swallows():
    try:
        steps()
    except TrialPruned:
        return 0.5


def other_metric():
    for step in range(3):
        repro_sweep.report(step, loss=step)
    return 1.0


def impatient():
    for step in itertools.count():
        repro_sweep.report(step, score=step)
        note("passed", step)
        time.sleep(0.02)


def from_threads():
    def report(number):
        for step in range(3):
            try:
                repro_sweep.report(step, score=number)
                note("went on", number)
            except TrialPruned:
                note("stopped", number)

    threads = [threading.Thread(target=report, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 1.0


def from_processes():
    for start in (0, 4):
        if os.fork() == 0:
            for step in range(start, start + 4):
                try:
                    repro_sweep.report(step, score=step)
                    note("went on", step)
                except TrialPruned:
                    note("stopped", step)
            os._exit(0)
        os.wait()
    repro_sweep.report(8, score=8)


def own():
    repro_sweep.report(0, score=0.25, loss=3)
    raise TrialPruned("diverged")


def of_optuna():
    import optuna

    repro_sweep.report(0, score=0.5)
    raise optuna.TrialPruned("diverged")


def instantiated():
    instantiate({"_target_": "job.of_optuna"})


def instantiated_twice():
    instantiate({"_target_": "job.instantiated"})


def pair():
    repro_sweep.report(0, latency=100)
    return 0.5, 12


def triple():
    return [1.0, 2.0, 3.0]


def failed_after():
    try:
        own()
    except TrialPruned as error:
        raise RuntimeError("no room for the checkpoint") from error
'''


class Judge:
    """A coordinator that hands out some trials and says of each report whether its trial is to stop."""

    def __init__(self, folder: Path, name: str, spec: SweepSpec, trials: list[protocol.Assignment]) -> None:
        self.path = str(folder / f"{name}.sock")
        self.verdict: Verdict = lambda _: False
        self.spec, self.trials = spec, list(trials)
        self.reports: list[tuple[protocol.Report, ...]] = []
        self.finished: dict[str, protocol.Finish] = {}
        self.silent = threading.Event()
        """Where it is set, a report is heard and not answered before ``speak``."""
        self.speak = threading.Event()
        self._connections: list[socket.socket] = []
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                judge._connections.append(self.connection)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                text = judge.answer(self.path, body).model_dump_json().encode()
                try:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)
                except OSError:  # it was killed meanwhile
                    self.close_connection = True

            def address_string(self) -> str:
                return "unix"

            def log_message(self, *_: object) -> None:
                pass

        self._server = socketserver.ThreadingUnixStreamServer(self.path, Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def answer(self, path: str, body: bytes) -> protocol.Message:
        """What it says to a message."""
        if path == "/register":
            return protocol.Registered(spec=self.spec.model_dump_json())
        if path == "/heartbeat":
            return protocol.Beat()
        if path == "/finish":
            return self._finish(protocol.Finish.model_validate_json(body))
        if path == "/report":
            return self._report(protocol.Reports.model_validate_json(body))
        claim = protocol.Claim.model_validate_json(body)
        if claim.finished is not None:
            self._finish(claim.finished)
        if not self.trials:
            return protocol.Claimed(over=True)
        next_one = self.trials.pop(0)
        return protocol.Claimed(assignment=next_one.model_copy(update={"attempt": claim.attempt}))

    def _report(self, message: protocol.Reports) -> protocol.Acknowledged:
        self.reports.append(message.reports)
        if self.silent.is_set():
            self.speak.wait(100)
        return protocol.Acknowledged(
            prune=tuple({each.attempt for each in message.reports if self.verdict(each)})
        )

    def _finish(self, finish: protocol.Finish) -> protocol.Acknowledged:
        self.finished[finish.attempt] = finish
        return protocol.Acknowledged()

    @property
    def last(self) -> protocol.Finish:
        """The one result."""
        [finish] = self.finished.values()
        return finish

    def seqs(self) -> list[int]:
        """The numbers of all reports that it was sent by themselves, in their order."""
        return [report.seq for message in self.reports for report in message]

    def kill(self) -> None:
        """End all connections and listen no more."""
        self._server.shutdown()
        self._server.server_close()
        Path(self.path).unlink(missing_ok=True)
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self.speak.set()
        self._thread.join()


class Place:
    """A folder with a task, a sweep's folder, and coordinators and workers for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.directory = folder / "sweep"
        self.directory.mkdir()
        (folder / "job.py").write_text(TASK)
        (folder / "conf").mkdir()
        (folder / "conf" / "config.yaml").write_text(
            "do: steps\nhydra: {callbacks: {note: {_target_: job.Note}}}\n"
        )
        self._judges: list[Judge] = []

    def spec(self, **changes: Any) -> SweepSpec:
        """The record of a sweep over ``do``, with a pruner."""
        search_path = (
            ("hydra", "pkg://hydra.conf"), ("main", f"file://{self.folder / 'conf'}"), ("schema", "structured://"),
        )  # fmt: skip
        usual: dict[str, Any] = {
            "pruner": Chosen(name="median"),
            "task": TaskSpec(
                module="job", qualname="train", cwd=str(self.folder), sys_path=(str(self.folder),)
            ),
            "composition": Composition(
                config_name="config", search_path=search_path, hydra_overrides=(), job_name="job",
                version_base="1.3",
            ),
        }  # fmt: skip
        return a_spec(self.directory, **(usual | changes))

    def judge(self, *trials: str, name: str = "one", epoch: int = 1, **changes: Any) -> Judge:
        """A coordinator with these trials to run."""
        assignments = [
            protocol.Assignment(
                attempt="", trial=number, ordinal=0, directory=str(self.directory / "trials" / do),
                overrides=(f"do={do}",), config=f"do: {do}\n",
            )
            for number, do in enumerate(trials)
        ]  # fmt: skip
        made = Judge(self.folder, name, self.spec(**changes), assignments)
        self._judges.append(made)
        (self.directory / ADDRESS_NAME).write_text(json.dumps({"epoch": epoch, "socket": made.path}))
        return made

    @contextmanager
    def worker(self, judge: Judge, slots: int = 1) -> Iterator[subprocess.Popen[bytes]]:
        """A worker process."""
        command = [sys.executable, "-P", "-m", "repro_sweep.worker.agent", "--worker", "w"]
        command += ["--directory", str(self.directory), "--socket", judge.path, *["--slot="] * slots]
        with (self.folder / "worker.log").open("wb") as log:
            process = subprocess.Popen(command, env=environment(), stderr=log, cwd=self.folder)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)

    def run(self, judge: Judge, slots: int = 1) -> None:
        """Run a worker until it has nothing to do any more."""
        with self.worker(judge, slots) as process:
            assert process.wait(120) == 0, (self.folder / "worker.log").read_text()

    def noted(self, name: str) -> list[str]:
        """The lines that the task has written into a file."""
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def close(self) -> None:
        """Kill the coordinators."""
        for judge in self._judges:
            if Path(judge.path).exists():
                judge.kill()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A folder to work in."""
    made = Place(tmp_path)
    yield made
    made.close()


# --- the verdict ---------------------------------------------------------------------------------------------


def test_a_trial_ends_at_the_step_at_which_it_is_decided_with_its_last_metrics(place: Place) -> None:
    """Each step waits for its verdict, so no later one is reported."""
    judge = place.judge("steps")
    judge.verdict = lambda report: report.step == 3
    place.run(judge)
    assert judge.last.state is TrialState.PRUNED
    assert judge.last.metrics == {"score": 0.3}
    assert [len(message) for message in judge.reports] == [1, 1, 1, 1]
    assert judge.seqs() == [0, 1, 2, 3]
    assert judge.last.reports == ()
    assert not list(place.directory.rglob("reports-*"))


def test_a_decision_stays(place: Place) -> None:
    """Although it was said once only, and the task goes on for a while; what it reports is recorded."""
    judge = place.judge("stubborn", "swallows")
    judge.verdict = lambda report: report.step == 2
    place.run(judge)
    stubborn, swallows = judge.finished.values()
    assert place.noted("raised") == ["2", "3", "4", "5"]
    assert stubborn.state is TrialState.PRUNED
    assert stubborn.metrics == {"score": 5}
    everything = [*(each for message in judge.reports for each in message), *stubborn.reports]
    assert {each.seq for each in everything if each.attempt == stubborn.attempt} == set(range(6))
    assert swallows.state is TrialState.COMPLETE
    assert swallows.metrics == {"score": 0.5}


def test_each_thread_and_process_of_a_trial_gets_the_verdict_on_its_own_report(place: Place) -> None:
    """All before the one that decides go on, that one and all later ones do not; other trials do not notice."""
    judge = place.judge("from_threads", "steps")
    first: list[str] = []

    def seventh(report: protocol.Report) -> bool:
        first[:] = first or [report.attempt] if report.metrics["score"] >= 1 else first
        return report.attempt in first and report.seq == 7

    judge.verdict = seventh
    place.run(judge, slots=2)
    assert (len(place.noted("went on")), len(place.noted("stopped"))) == (7, 23)
    assert [finish.state for finish in judge.finished.values()] == [TrialState.COMPLETE] * 2
    delivered = [each for message in judge.reports for each in message]
    delivered += [each for finish in judge.finished.values() for each in finish.reports]
    assert len({(each.attempt, each.seq) for each in delivered}) == 40


def test_a_process_that_the_trial_has_forked_hears_what_another_was_told(place: Place) -> None:
    """And so does the trial itself."""
    judge = place.judge("from_processes")
    judge.verdict = lambda report: report.step == 2
    place.run(judge)
    assert place.noted("went on") == ["0", "1"]
    assert place.noted("stopped") == ["2", "3", "4", "5", "6", "7"]
    assert judge.last.state is TrialState.PRUNED
    assert judge.last.metrics == {"score": 8}


# --- nobody waits who need not -------------------------------------------------------------------------------


@pytest.mark.parametrize("pruner", [None, Chosen(name="none")], ids=["no pruner", "the pruner 'none'"])
def test_without_a_pruner_no_trial_waits_for_an_answer_or_heeds_one(
    place: Place, pruner: Chosen | None
) -> None:
    """Its reports are gathered, not sent one by one."""
    judge = place.judge("steps", pruner=pruner)
    judge.verdict = lambda _: True
    place.run(judge)
    assert judge.last.state is TrialState.COMPLETE
    assert len(judge.reports) < 5
    assert {*judge.seqs(), *(report.seq for report in judge.last.reports)} == set(range(10))


def test_a_report_without_the_sweep_s_metric_does_not_wait(place: Place) -> None:
    """There is nothing to decide by."""
    judge = place.judge("other_metric")
    judge.verdict = lambda _: True
    place.run(judge)
    assert judge.last.state is TrialState.COMPLETE
    assert judge.last.metrics == {"loss": 2, "score": 1.0}
    assert {*judge.seqs(), *(report.seq for report in judge.last.reports)} == set(range(3))


# --- nobody to wait for --------------------------------------------------------------------------------------


def test_training_goes_on_when_the_coordinator_is_killed_in_the_middle_of_a_report(place: Place) -> None:
    """The next one gets every report; the one that was under way is sent to both."""
    old = place.judge("steps")
    old.verdict = lambda report: report.step == 2 and (old.silent.set() or False)
    with place.worker(old) as process:
        eventually(old.silent.is_set, "it is silent from now on")
        eventually(lambda: 3 in old.seqs(), "the report that is not answered")
        old.kill()
        eventually((place.folder / "ended-steps").exists, "the trial ends")
        assert not old.finished
        new = place.judge(name="two", epoch=2)
        assert process.wait(120) == 0
    assert new.last.state is TrialState.COMPLETE
    assert new.last.metrics == {"score": 1.0}
    seqs = [*new.seqs(), *(report.seq for report in new.last.reports)]
    assert set(seqs) == set(range(3, 10))
    assert old.seqs() == [0, 1, 2, 3]


def test_a_verdict_that_comes_too_late_counts_at_a_later_report(place: Place) -> None:
    """The trial waits for one report in vain, and for none until it hears something."""
    judge = place.judge("impatient")
    judge.verdict = lambda report: report.step == 0
    judge.silent.set()
    with place.worker(judge) as process:
        eventually(lambda: len(place.noted("passed")) >= 5, "it goes on")
        assert judge.seqs() == [0]
        judge.speak.set()
        assert process.wait(120) == 0
    assert judge.last.state is TrialState.PRUNED
    steps = int(judge.last.metrics["score"]) + 1
    assert place.noted("passed") == [str(step) for step in range(steps - 1)]
    seqs = [*judge.seqs(), *(report.seq for report in judge.last.reports)]
    assert set(seqs) == set(range(steps))


def test_a_coordinator_that_comes_later_may_still_decide(place: Place) -> None:
    """The report that was under way when the old one was killed is sent to it."""
    old = place.judge("impatient")
    old.silent.set()
    with place.worker(old) as process:
        eventually(lambda: old.reports, "a report is under way")
        old.kill()
        eventually(lambda: len(place.noted("passed")) >= 2, "it goes on")
        new = place.judge(name="two", epoch=2)
        new.verdict = lambda report: report.step == 0
        assert process.wait(120) == 0
    assert new.last.state is TrialState.PRUNED
    assert new.seqs()[0] == 0


def report_of(attempt: str, seq: int) -> protocol.Report:
    """A report."""
    return protocol.Report(attempt=attempt, seq=seq, step=seq, time=1.0, metrics={"score": 1.0})


def test_a_worker_without_a_coordinator_lets_a_trial_go_on_at_once(tmp_path: Path) -> None:
    """And keeps its report."""
    agent = Agent("w", tmp_path, str(tmp_path / "nobody.sock"), [()])
    said: list[tuple[int, bool]] = []
    agent.report(report_of("a", 4), lambda seq, prune: said.append((seq, prune)))
    assert said == [(4, False)]
    assert agent._outbox.take("a") == (report_of("a", 4),)


def test_a_trial_that_waits_is_let_go_once_and_told_the_late_verdict(tmp_path: Path) -> None:
    """Nothing is said to a trial whose reports have not asked."""
    outbox, said = Outbox(), []
    for seq in range(2):
        outbox.add(report_of("a", seq), lambda seq, prune: said.append(("a", seq, prune)))
    outbox.add(report_of("b", 0), None)
    batch = outbox.gather(1000.0)
    for _ in range(3):
        outbox.excuse()
    assert said == [("a", 1, False)]
    outbox.add(report_of("a", 2), lambda seq, prune: said.append(("a", seq, prune)))
    outbox.sent(batch, ["a", "b"])
    assert said[1:] == [("a", 1, True)]
    outbox.excuse()
    assert said[2:] == [("a", 2, False)]
    assert outbox.take("b") == ()
    assert outbox.take("a") == (report_of("a", 2),)


# --- the trial's end of the channel --------------------------------------------------------------------------


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The worker's and the trial's end of a channel."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        yield ours, theirs


def test_a_trial_whose_worker_goes_away_while_it_waits_goes_on(
    tmp_path: Path, ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs no patience for that."""
    monkeypatch.setattr(inbox_module, "PATIENCE_S", 1000.0)
    ours, theirs = ends
    context = Context(theirs, tmp_path, "a", judged="score")

    def leave() -> None:
        ours.recv(1 << 16)
        ours.close()

    leaving = threading.Thread(target=leave)
    leaving.start()
    context.report(0, {"score": 1.0})
    leaving.join()
    assert context.last == {"score": 1.0}


def test_an_answer_and_a_verdict_that_come_together_are_told_apart(
    tmp_path: Path, ends: tuple[socket.socket, socket.socket]
) -> None:
    """The verdict counts at the next report, whatever that one's metrics; no later word takes it back."""
    ours, theirs = ends
    context = Context(theirs, tmp_path, "a", judged="score")
    ours.sendall(b'{"verdict": [0, true]}\n{"run_id": "r"}\n{"verdict": [1, false]}\n')
    assert context.ask(run=True) == {"run_id": "r"}
    with pytest.raises(TrialPruned, match="step 7: the trial is not worth going on with"):
        context.report(7, {"loss": 1.0})
    question, report = ours.recv(1 << 16).splitlines()
    assert json.loads(question) == {"run": True}
    assert json.loads(report)["report"]["metrics"] == {"loss": 1.0}


def test_a_coordinator_that_hangs_is_waited_for_once_until_it_is_heard_of(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer to any report is a sign of life; one to an older report ends no wait."""
    monkeypatch.setattr(inbox_module, "PATIENCE_S", 0.01)
    ours, theirs = ends
    inbox = Inbox(theirs)
    inbox.await_verdict(0)
    monkeypatch.setattr(inbox_module, "PATIENCE_S", 1000.0)
    inbox.await_verdict(1)
    inbox.hear()
    ours.sendall(b'{"verdict": [0, false]}\n')
    inbox.hear()
    waiting = threading.Thread(target=inbox.await_verdict, args=(2,), daemon=True)
    waiting.start()
    ours.sendall(b'{"verdict": [1, false]}\n')
    waiting.join(0.2)
    assert waiting.is_alive()
    ours.sendall(b'{"verdict": [2, false]}\n')
    waiting.join(60)
    assert not waiting.is_alive()
    assert not inbox.stop


def test_a_trial_without_a_pruner_says_nothing_new_and_heeds_no_verdict(
    tmp_path: Path, ends: tuple[socket.socket, socket.socket]
) -> None:
    """Its messages are those that they were."""
    ours, theirs = ends
    context = Context(theirs, tmp_path, "a")
    ours.sendall(b'{"verdict": [0, true]}\n')
    context.report(0, {"score": 1.0})
    message = json.loads(ours.recv(1 << 16))
    assert list(message) == ["report"]
    assert sorted(message["report"]) == ["metrics", "seq", "step", "time"]
    context.report(1, {"score": 1.0})


def test_a_trial_whose_worker_must_leave_is_interrupted_at_its_next_report(
    tmp_path: Path, ends: tuple[socket.socket, socket.socket]
) -> None:
    """With or without a pruner; the report counts, and the trial stays interrupted."""
    ours, theirs = ends
    context = Context(theirs, tmp_path, "a")
    assert not context.interrupted
    ours.sendall(b'{"leave": true}\n')
    for step in range(2):
        with pytest.raises(TrialInterrupted, match=f"step {step}: its worker must leave"):
            context.report(step, {"score": 1.0})
    assert context.interrupted
    steps = [json.loads(line)["report"]["step"] for line in ours.recv(1 << 16).splitlines()]
    assert steps == [0, 1]


# --- a task that gives up by itself --------------------------------------------------------------------------


def test_a_task_may_prune_its_trial_itself_by_our_exception_or_by_optuna_s(place: Place) -> None:
    """Also inside of ``instantiate``, and without a pruner; a failure raised from it is a failure."""
    judge = place.judge("own", "of_optuna", "instantiated", "instantiated_twice", "failed_after", pruner=None)
    place.run(judge)
    *pruned, failed = judge.finished.values()
    assert [each.state for each in pruned] == [TrialState.PRUNED] * 4
    assert [each.metrics for each in pruned] == [{"score": 0.25, "loss": 3}] + [{"score": 0.5}] * 3
    assert failed.state is TrialState.FAIL
    assert (failed.kind, failed.message) == (
        FailureKind.EXCEPTION,
        "RuntimeError: no room for the checkpoint",
    )
    logs = [(place.directory / "trials" / do / "trial.log").read_text() for do in ("own", "instantiated")]
    assert all("pruned: diverged" in log and "Traceback" not in log for log in logs)


def test_a_hydra_callback_sees_the_exception_that_pruned_its_job(place: Place) -> None:
    """As under Hydra, which has no other word for it than a failure."""
    judge = place.judge("steps", "of_optuna")
    judge.verdict = lambda report: report.step == 1
    place.run(judge)
    assert place.noted("ended-steps") == ["FAILED TrialPruned"]
    assert place.noted("ended-of_optuna") == ["FAILED TrialPruned"]


# --- several objectives --------------------------------------------------------------------------------------


def test_a_task_written_for_several_objectives_returns_them_in_their_order(place: Place) -> None:
    """What it returns goes before what it reported; a wrong number of them is said to the coordinator as missing."""
    objectives = tuple(Objective(metric=name, direction=Direction.MINIMIZE) for name in ("score", "latency"))
    judge = place.judge("pair", "triple", pruner=None, objectives=objectives)
    place.run(judge)
    pair, triple = judge.finished.values()
    assert (pair.state, pair.metrics) == (TrialState.COMPLETE, {"score": 0.5, "latency": 12})
    assert (triple.kind, triple.metric_missing) == (FailureKind.INVALID_METRIC, True)
    assert triple.message == "sweep.metric: the task must return 2 numbers (score, latency), got 3"
