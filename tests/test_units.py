"""The parts on their own: slots, ledger, group commit, handing out, meter, log, task, numbers, imports, errors."""

from __future__ import annotations

import asyncio
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import a_ledger, a_spec, attempt, complete, environment, failed

import repro_sweep
from repro_sweep import coordinator as coordinator_module
from repro_sweep import errors, jobs, machine, protocol, retries, submitting, task
from repro_sweep.coordinator import Coordinator
from repro_sweep.crew import Crew, WorkersCancelledError
from repro_sweep.errors import LedgerError, SweepError, TaskError
from repro_sweep.executors.base import Cause, Executor, WorkerState, WorkerStatus
from repro_sweep.handout import Handout
from repro_sweep.journal import Journal
from repro_sweep.ledger import Ledger
from repro_sweep.progress import Meter
from repro_sweep.provenance import source
from repro_sweep.provenance.source import code_fingerprint
from repro_sweep.records import NewReport, NewTrial, Outcome
from repro_sweep.states import Direction, FailureKind, TrialState
from repro_sweep.sweep import Resources, SweepSpec, TaskSpec
from repro_sweep.worker import trial
from repro_sweep.worker.output import CappedLog

# --- slots of a machine --------------------------------------------------------------------------------------


def a_machine(cpus: int = 8, mem_gb: float = 32.0, gpus: str = "") -> machine.Machine:
    """A machine."""
    return machine.Machine(cpus=cpus, mem_gb=mem_gb, gpus=tuple(gpus))


@pytest.mark.parametrize(
    ("has", "resources", "wanted", "slots"),
    [
        (a_machine(), Resources(), None, [""] * 8),
        (a_machine(), Resources(cpus=3), None, [""] * 2),
        (a_machine(), Resources(cpus=0.5), None, [""] * 16),
        (a_machine(cpus=1), Resources(cpus=0.1), None, [""] * 10),
        (a_machine(), Resources(mem_gb=10), None, [""] * 3),
        (a_machine(cpus=2), Resources(), 5, [""] * 5),
        (a_machine(cpus=2), Resources(cpus=4, mem_gb=99), 1, [""]),
        (a_machine(gpus="ab"), Resources(gpus=1), None, ["a", "b"]),
        (a_machine(gpus="abcde"), Resources(gpus=2), None, ["ab", "cd"]),
        (a_machine(gpus="ab"), Resources(gpus=0.5), None, ["a", "b", "a", "b"]),
        (a_machine(gpus="ab"), Resources(gpus=0.5), 3, ["a", "b", "a"]),
        (a_machine(gpus="a"), Resources(gpus=1 / 3), None, ["a"] * 3),
        (a_machine(gpus="a"), Resources(gpus=0.1), None, ["a"] * 8),
        (a_machine(cpus=1, gpus="ab"), Resources(gpus=1), None, ["a"]),
        (a_machine(cpus=1, gpus="ab"), Resources(gpus=1), 2, ["a", "b"]),
        (a_machine(gpus="ab"), Resources(), None, [""] * 8),
    ],
)
def test_a_machine_has_as_many_slots_as_trials_fit_and_each_slot_its_gpus(
    has: machine.Machine, resources: Resources, wanted: int | None, slots: list[str]
) -> None:
    """The number that the user wants overrules CPUs and memory, never the GPUs."""
    assert machine.slots(has, resources, wanted) == tuple(tuple(gpus) for gpus in slots)


@pytest.mark.parametrize(
    ("has", "resources", "wanted", "says"),
    [
        (a_machine(), Resources(cpus=9), None, "cpus_per_trial: 9 asked for, this machine has 8"),
        (a_machine(), Resources(mem_gb=33), None, "mem_gb_per_trial: 33 asked for, this machine has 32.0"),
        (a_machine(), Resources(gpus=1), None, "gpus_per_trial: 1 asked for, this machine has 0"),
        (a_machine(gpus="ab"), Resources(gpus=3), None, "gpus_per_trial: 3 asked for, this machine has 2"),
        (a_machine(gpus="ab"), Resources(gpus=0.5), 5, "slots: 5 asked for, but 0.5 GPUs a trial allow 4"),
        (a_machine(), Resources(), 0, "slots: must be at least 1, got 0"),
    ],
)
def test_slots_that_a_machine_cannot_have_are_refused_with_what_it_has(
    has: machine.Machine, resources: Resources, wanted: int | None, says: str
) -> None:
    """Before anything starts."""
    with pytest.raises(SweepError, match=says):
        machine.slots(has, resources, wanted)


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [("0,1", ("0", "1")), (" 3 , GPU-ab", ("3", "GPU-ab")), ("", ()), ("-1", ()), ("0,", ("0",))],
)
def test_the_gpus_of_a_machine_are_those_that_cuda_visible_devices_leaves(
    visible: str, gpus: tuple[str, ...]
) -> None:
    """With their names as they stand there."""
    found = machine.inspect({"CUDA_VISIBLE_DEVICES": visible})
    assert found.gpus == gpus
    assert found.cpus >= 1
    assert 0 < found.mem_gb < 100_000


# --- the ledger ----------------------------------------------------------------------------------------------


@pytest.fixture
def spec(tmp_path: Path) -> SweepSpec:
    """A sweep's record."""
    return a_spec(tmp_path)


@pytest.fixture
def ledger(tmp_path: Path, spec: SweepSpec) -> Iterator[Ledger]:
    """A ledger with three waiting trials."""
    made = a_ledger(tmp_path, spec)
    yield made
    made.close()


def test_a_ledger_gives_back_what_was_recorded(ledger: Ledger, spec: SweepSpec) -> None:
    """Trials, attempts, reports with NaN and infinities, and the sweep itself."""
    ledger.start_attempt(attempt(1))
    first_step = NewReport(seq=0, step=0, time=1.5, metrics={"score": math.nan, "loss": math.inf})
    ledger.add_reports("a", [first_step, NewReport(seq=1, step=1, time=1.6, metrics={"score": 0.5})])
    ledger.finish_attempt("a", complete(score=0.5, loss=-math.inf))
    ledger.commit()
    assert ledger.spec == spec
    assert [each.number for each in ledger.trials(states=[TrialState.WAITING])] == [0, 2]
    found = ledger.trial(1)
    assert (found.overrides, found.params, found.config) == (("x=1",), {"x": 1}, "x: 1\n")
    assert (found.state, found.attempt) == (TrialState.COMPLETE, "a")
    assert ledger.attempts(1)[0].metrics == {"score": 0.5, "loss": -math.inf}
    first, second = ledger.reports(trial=1)
    assert math.isnan(first.metrics["score"])
    assert first.metrics["loss"] == math.inf
    assert (second.step, second.time, second.seq) == (1, 1.6, first.seq + 1)
    assert ledger.counts()[TrialState.COMPLETE] == 1
    assert ledger.next_number() == 3
    assert ledger.identities()["identity-1"] == (1, TrialState.COMPLETE)


def test_what_is_not_committed_is_not_there(ledger: Ledger, tmp_path: Path) -> None:
    """Rolled back, or lost with the process."""
    ledger.start_attempt(attempt(0))
    ledger.rollback()
    assert ledger.trial(0).state is TrialState.WAITING
    ledger.start_attempt(attempt(0, "b"))
    reader = Ledger.open(tmp_path, readonly=True)
    assert reader.attempts() == []
    ledger.commit()
    assert [each.id for each in reader.attempts()] == ["b"]
    reader.close()


def test_every_change_of_a_trial_gets_a_higher_number(ledger: Ledger, tmp_path: Path) -> None:
    """So a reader that remembers the last one finds all that is new, also after the ledger was opened again."""
    seen = max(each.change for each in ledger.trials())
    ledger.start_attempt(attempt(0))
    ledger.commit()
    ledger.close()
    again = Ledger.open(tmp_path)
    again.finish_attempt("a", complete(score=1.0))
    again.cancel([2])
    again.commit()
    changed = list(again.trials(changed_after=seen))
    again.close()
    assert [each.number for each in changed] == [0, 2]
    assert seen + 1 < changed[0].change < changed[1].change


def test_a_ledger_of_another_format_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    """Rather than misread."""
    ledger.set_meta("format", "99")
    ledger.commit()
    ledger.close()
    with pytest.raises(LedgerError, match="format 99, this version reads format 3"):
        Ledger.open(tmp_path)


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    """With its path."""
    with pytest.raises(LedgerError, match="no sweep here"):
        Ledger.open(tmp_path)
    (tmp_path / "ledger.db").write_bytes(b"something else altogether" * 100)
    with pytest.raises(LedgerError, match=r"ledger\.db"):
        Ledger.open(tmp_path)


def test_a_reader_cannot_write_a_ledger(ledger: Ledger, tmp_path: Path) -> None:
    """Only the coordinator does."""
    reader = Ledger.open(tmp_path, readonly=True)
    with pytest.raises(LedgerError, match="readonly"):
        reader.set_meta("key", "value")
    reader.close()


def test_the_same_identity_is_never_recorded_twice(ledger: Ledger) -> None:
    """The database itself sees to it."""
    twin = NewTrial(
        number=9, identity="identity-1", directory="d", overrides=(), params={}, repeat={}, config=""
    )
    with pytest.raises(LedgerError, match="identity"):
        ledger.add_trials([twin])


def test_a_committed_ledger_survives_the_kill_of_its_writer(tmp_path: Path, spec: SweepSpec) -> None:
    """Committed is durable; what was not committed is gone."""
    program = """
import os, signal, sys
from pathlib import Path
from repro_sweep.ledger import Ledger
ledger = Ledger.open(Path(sys.argv[1]))
ledger.set_meta("kept", "yes")
ledger.commit()
ledger.set_meta("lost", "yes")
os.kill(os.getpid(), signal.SIGKILL)
"""
    Ledger.create(tmp_path, spec).close()
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=300, env=environment())
    assert killed.returncode == -9
    found = Ledger.open(tmp_path)
    assert (found.meta("kept"), found.meta("lost")) == ("yes", None)
    found.close()


# --- group commit --------------------------------------------------------------------------------------------


def test_changes_that_wait_together_are_committed_together(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each caller gets its own result, after the commit."""
    commits: list[int] = []
    real = ledger.commit
    monkeypatch.setattr(ledger, "commit", lambda: (real(), commits.append(1)))

    async def scenario() -> list[str]:
        journal = Journal(ledger)

        async def write(number: int) -> str:
            def change(to: Ledger) -> str:
                to.set_meta(f"key-{number}", str(number))
                return f"result-{number}"

            result = await journal.write(change)
            assert commits
            return result

        results = await asyncio.gather(*(write(number) for number in range(100)))
        await journal.close()
        return results

    assert asyncio.run(scenario()) == [f"result-{number}" for number in range(100)]
    assert len(commits) <= 3


def test_a_change_that_fails_leaves_nothing_behind_and_the_journal_goes_on(
    ledger: Ledger, tmp_path: Path
) -> None:
    """Its batch is rolled back as a whole, and all of the batch hear of it."""

    async def scenario() -> list[Any]:
        journal = Journal(ledger)

        def bad(to: Ledger) -> None:
            to.set_meta("half", "done")
            raise LedgerError("disk full")

        first = await asyncio.gather(journal.write(bad), return_exceptions=True)
        second = await journal.write(lambda to: to.set_meta("good", "yes"))
        await journal.close()
        return [*first, second]

    failed, _ = asyncio.run(scenario())
    assert isinstance(failed, LedgerError)
    found = Ledger.open(tmp_path)
    assert (found.meta("half"), found.meta("good")) == (None, "yes")
    found.close()


# --- the coordinator -----------------------------------------------------------------------------------------


class OneWorker(Executor):
    """An executor whose one worker is the test itself: first ``w``, then, when that has ended, ``v``."""

    def __init__(self) -> None:
        self.closed = False
        self.started: list[str] = []
        self.ended: set[str] = set()
        self.beside: dict[str, WorkerStatus] = {}

    def wanted(self, trials: int) -> int:
        return min(1, trials)

    def start(self, count: int) -> list[str]:
        self.started.append("w" if not self.started else "v")
        return self.started[-count:]

    def poll(self) -> Mapping[str, WorkerStatus]:
        return {
            worker: WorkerStatus(state=WorkerState.ENDED if worker in self.ended else WorkerState.ALIVE)
            for worker in self.started
        } | self.beside

    def stop(self, workers: Iterable[str]) -> None:
        self.close(0.0)

    def close(self, timeout_s: float) -> None:
        self.closed = True


def coordinate(
    spec: SweepSpec, ledger: Ledger, worker: Callable[[Coordinator, OneWorker], Coroutine[Any, Any, None]]
) -> None:
    """Run a coordinator while ``worker`` claims and finishes."""

    async def scenario() -> None:
        executor = OneWorker()
        coordinator = Coordinator(spec, ledger, None)
        running = asyncio.create_task(coordinator.run(executor))
        await coordinator.register(protocol.Register(worker="w", host="h", pid=1, slots=1))
        await worker(coordinator, executor)
        await coordinator.heartbeat(protocol.Heartbeat(worker="w", leaving=True))
        await running
        await coordinator.close()

    asyncio.run(scenario())


def claim(attempt: str, worker: str = "w") -> protocol.Claim:
    """A claim of the worker's only slot."""
    return protocol.Claim(worker=worker, slot=0, attempt=attempt, wait_s=5.0)


def finish(attempt: str, *, kind: FailureKind | None = None, score: float = 1.0) -> protocol.Finish:
    """The end of an attempt."""
    state = TrialState.COMPLETE if kind is None else TrialState.FAIL
    return protocol.Finish(
        worker="w", attempt=attempt, state=state, kind=kind, metrics={"score": score}, ended_at=2.0
    )


def test_a_sweep_is_not_over_while_its_last_trial_is_being_handed_out(
    ledger: Ledger, spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the disk takes to commit it."""
    commit = ledger.commit
    monkeypatch.setattr(coordinator_module, "_CLOSE_S", 0.01)

    def slow_commit() -> None:
        time.sleep(0.6)  # more than two of the coordinator's looks at its workers
        commit()

    async def worker(coordinator: Coordinator, executor: OneWorker) -> None:
        for number in range(3):
            if number == 2:
                monkeypatch.setattr(ledger, "commit", slow_commit)
            assert (await coordinator.claim(claim(str(number)))).assignment is not None
            assert not executor.closed
            await coordinator.finish(finish(str(number)))

    coordinate(spec, ledger, worker)
    found = Ledger.open(tmp_path, readonly=True)
    assert found.counts()[TrialState.COMPLETE] == 3
    found.close()


def test_a_worker_that_dies_while_it_is_handed_a_trial_does_not_take_it_along(
    ledger: Ledger, spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial goes to the next worker."""
    commit, go_on = ledger.commit, threading.Event()

    def slow_commit() -> None:
        assert go_on.wait(60)
        commit()

    async def until(started: list[str], executor: OneWorker) -> None:
        while executor.started != started:  # noqa: ASYNC110  (it has none)
            await asyncio.sleep(0.01)

    async def worker(coordinator: Coordinator, executor: OneWorker) -> None:
        await until(["w"], executor)
        monkeypatch.setattr(ledger, "commit", slow_commit)
        claiming = asyncio.create_task(coordinator.claim(claim("lost")))
        await asyncio.sleep(0)
        executor.ended.add("w")
        await coordinator.heartbeat(protocol.Heartbeat(worker="w", leaving=True))
        go_on.set()
        await claiming
        await until(["w", "v"], executor)
        await coordinator.register(protocol.Register(worker="v", host="h", pid=2, slots=1))
        claimed = []
        for number in range(3):
            claimed.append((await coordinator.claim(claim(f"v{number}", "v"))).assignment)
            await coordinator.finish(finish(f"v{number}"))
        await coordinator.finish(finish("lost"))  # whatever is the matter, the sweep must end
        await coordinator.heartbeat(protocol.Heartbeat(worker="v", leaving=True))
        assert sorted(assignment.trial for assignment in claimed if assignment is not None) == [0, 1, 2]

    coordinate(spec, ledger, worker)
    found = Ledger.open(tmp_path, readonly=True)
    assert found.counts()[TrialState.COMPLETE] == 3
    found.close()


def test_a_claim_that_is_repeated_when_its_attempt_has_been_given_up_starts_nothing(
    ledger: Ledger, spec: SweepSpec, tmp_path: Path
) -> None:
    """The worker was taken for lost before it heard of its trial, and has come back."""

    async def worker(coordinator: Coordinator, executor: OneWorker) -> None:
        again = protocol.Register(worker="w", host="h", pid=1, slots=1)
        await coordinator.claim(claim("a"))
        await coordinator.register(again)
        assert await coordinator.claim(claim("a")) == protocol.Claimed()
        for number in range(3):
            assert (await coordinator.claim(claim(str(number)))).assignment is not None
            await coordinator.finish(finish(str(number)))

    coordinate(spec, ledger, worker)
    found = Ledger.open(tmp_path, readonly=True)
    assert found.counts()[TrialState.COMPLETE] == 3
    assert sorted(each.id for each in found.attempts()) == ["0", "1", "2", "a"]
    found.close()


def test_a_worker_that_is_not_known_gets_no_trial_and_loses_none(ledger: Ledger, spec: SweepSpec) -> None:
    """Such as one that was silent for too long, and given up."""

    async def worker(coordinator: Coordinator, _: OneWorker) -> None:
        stranger = claim("a", "stranger").model_copy(update={"wait_s": 0.0})
        assert await coordinator.claim(stranger) == protocol.Claimed()
        assert not (await coordinator.heartbeat(protocol.Heartbeat(worker="stranger"))).known
        for number in range(3):
            assert (await coordinator.claim(claim(str(number)))).assignment is not None
            await coordinator.finish(finish(str(number)))

    coordinate(spec, ledger, worker)


@pytest.mark.parametrize(
    ("state", "cause", "kind"),
    [
        (WorkerState.ENDED, Cause.EVICTED, FailureKind.PREEMPTED),
        (WorkerState.ENDED, Cause.CANCELLED, FailureKind.PREEMPTED),
        (WorkerState.ENDED, Cause.LOST, FailureKind.NODE_LOST),
        (WorkerState.ENDED, Cause.OWN, FailureKind.NODE_LOST),
        (WorkerState.MISSING, Cause.LOST, FailureKind.NODE_LOST),
        (WorkerState.SUSPENDED, Cause.EVICTED, FailureKind.PREEMPTED),
    ],
)
def test_what_became_of_a_worker_is_what_became_of_its_trial(
    ledger: Ledger,
    spec: SweepSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: WorkerState,
    cause: Cause,
    kind: FailureKind,
) -> None:
    monkeypatch.setattr(coordinator_module, "_MISSING_SILENT_S", 0.5)

    async def worker(coordinator: Coordinator, executor: OneWorker) -> None:
        executor.started.append("w")
        executor.beside["v"] = WorkerStatus(state=WorkerState.ALIVE)
        await coordinator.register(protocol.Register(worker="v", host="h", pid=2, slots=1))
        absent = (await coordinator.claim(claim("absent", "v"))).assignment
        executor.beside["v"] = WorkerStatus(state=state, cause=cause, detail="is away")
        for number in range(3):  # the last of them is the one that the other worker had
            assert (await coordinator.claim(claim(str(number)))).assignment is not None
            await coordinator.finish(finish(str(number)))
        assert absent is not None

    limits = spec.limits.model_copy(update={"retries": {kind: 1}})
    coordinate(spec.model_copy(update={"limits": limits}), ledger, worker)
    found = Ledger.open(tmp_path, readonly=True)
    assert found.counts()[TrialState.COMPLETE] == 3
    lost = found.attempt("absent")
    assert lost is not None
    assert (lost.kind, lost.message) == (kind, "its worker is away")
    found.close()


@pytest.mark.parametrize(
    ("causes", "trials", "missing"),
    [
        ((Cause.CANCELLED, Cause.EVICTED), 1, 1),  # one may still run
        ((Cause.CANCELLED, Cause.EVICTED), 9, 1),
        ((Cause.EVICTED, Cause.EVICTED), 9, 2),
        ((Cause.CANCELLED, None), 9, 0),
        ((Cause.CANCELLED, Cause.CANCELLED), 9, None),
        ((Cause.CANCELLED, Cause.CANCELLED), 0, 0),
    ],
)
def test_workers_that_the_user_cancels_are_not_replaced_and_those_that_the_cluster_ends_are(
    spec: SweepSpec, causes: tuple[Cause | None, ...], trials: int, missing: int | None
) -> None:
    class Two(OneWorker):
        def wanted(self, trials: int) -> int:
            return min(2, trials)

    executor = Two()
    executor.beside = {
        str(number): WorkerStatus(state=WorkerState.ALIVE)
        if cause is None
        else WorkerStatus(state=WorkerState.ENDED, cause=cause)
        for number, cause in enumerate(causes)
    }
    crew = Crew(spec, executor)
    if missing is None:
        with pytest.raises(WorkersCancelledError, match="all of its workers were cancelled"):
            crew.missing(trials)
    else:
        assert crew.missing(trials) == missing
    assert crew.knows("0") is (causes[0] is None)


def test_what_the_user_has_set_for_sbatch_and_squeue_by_hand_changes_no_job_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "squeue").write_text("#!/bin/sh\nenv\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for key in ("SQUEUE_PARTITION", "SBATCH_JOB_NAME", "SBATCH_ACCOUNT", "SLURM_CONF", "SLURM_JOB_NAME"):
        monkeypatch.setenv(key, "mine")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    said = jobs.ask("squeue")
    assert said is not None
    assert "SQUEUE_PARTITION" not in said
    assert "SLURM_CONF=mine" in said
    outside = submitting._outside(os.environ)
    assert "SBATCH_JOB_NAME" not in outside
    assert outside["SBATCH_ACCOUNT"] == "mine"  # where the script names none
    assert outside["SLURM_JOB_NAME"] == "mine"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    inside = submitting._outside(os.environ)
    assert not {"SLURM_JOB_NAME", "SLURM_JOB_ID"} & set(inside)
    assert inside["SLURM_CONF"] == "mine"


def test_a_suspended_worker_keeps_its_trial_while_no_other_has_a_free_slot(
    ledger: Ledger, spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with it when its cluster lets it; nobody expects it to speak at that very moment."""
    monkeypatch.setattr(coordinator_module, "_MISSING_SILENT_S", 0.1)
    monkeypatch.setattr(coordinator_module, "_WORKER_SILENT_S", 1.0)

    async def worker(coordinator: Coordinator, executor: OneWorker) -> None:
        executor.beside["v"] = WorkerStatus(state=WorkerState.ALIVE)
        await coordinator.register(protocol.Register(worker="v", host="h", pid=2, slots=1))
        await coordinator.claim(claim("kept", "v"))
        await coordinator.claim(claim("other"))
        executor.beside["v"] = WorkerStatus(state=WorkerState.SUSPENDED, cause=Cause.EVICTED)
        for _ in range(15):
            await asyncio.sleep(0.1)
            await coordinator.heartbeat(protocol.Heartbeat(worker="w", attempts=("other",)))
        executor.beside["v"] = WorkerStatus(state=WorkerState.ALIVE)
        await asyncio.sleep(0.5)  # the coordinator has looked at its workers meanwhile
        beat = await coordinator.heartbeat(protocol.Heartbeat(worker="v", attempts=("kept",)))
        assert (beat.known, beat.stop) == (True, ())
        await coordinator.finish(finish("kept").model_copy(update={"worker": "v"}))
        await coordinator.finish(finish("other"))
        await coordinator.claim(claim("last"))
        await coordinator.finish(finish("last"))
        await coordinator.heartbeat(protocol.Heartbeat(worker="v", leaving=True))

    coordinate(spec, ledger, worker)
    found = Ledger.open(tmp_path, readonly=True)
    assert found.counts()[TrialState.COMPLETE] == 3
    assert len(found.attempts()) == 3
    found.close()


def test_a_trial_is_handed_out_only_where_the_longest_so_far_would_have_had_the_time(
    ledger: Ledger, spec: SweepSpec, tmp_path: Path
) -> None:
    """Except as a worker's first: no other would have more."""
    spec = spec.model_copy(update={"executor": {"expected_trial_min": 2.0}})

    def claim_with(attempt: str, left_s: float) -> protocol.Claim:
        return claim(attempt).model_copy(update={"left_s": left_s, "wait_s": 0.0})

    async def worker(coordinator: Coordinator, _: OneWorker) -> None:
        assert (await coordinator.claim(claim_with("0", 60.0))).assignment is not None
        failing = finish("0", kind=FailureKind.PREEMPTED)
        await coordinator.finish(failing)
        assert (await coordinator.claim(claim_with("1", 119.0))).over  # what the user expects
        assert (await coordinator.claim(claim_with("1", 121.0))).assignment is not None
        await asyncio.sleep(0.3)
        await coordinator.finish(finish("1"))
        assert (await coordinator.claim(claim_with("2", 0.2))).over  # what it has seen
        for number in (2, 3):
            assert (await coordinator.claim(claim_with(str(number), 100.0))).assignment is not None
            await coordinator.finish(finish(str(number)))

    limits = spec.limits.model_copy(update={"retries": {FailureKind.PREEMPTED: None}})
    coordinate(spec.model_copy(update={"limits": limits}), ledger, worker)
    found = Ledger.open(tmp_path, readonly=True)
    assert found.counts()[TrialState.COMPLETE] == 3
    found.close()


def test_the_next_coordinator_knows_how_long_trials_have_taken(
    ledger: Ledger, spec: SweepSpec, tmp_path: Path
) -> None:
    ledger.start_attempt(attempt(0))
    ledger.finish_attempt(
        "a", Outcome(state=TrialState.COMPLETE, metrics={"score": 1.0}, ended_at=501.0), again=False
    )
    ledger.commit()

    async def worker(coordinator: Coordinator, _: OneWorker) -> None:
        await coordinator.claim(claim("1"))
        await coordinator.finish(finish("1"))
        short = claim("2").model_copy(update={"left_s": 499.0})
        assert (await coordinator.claim(short)).over
        assert (await coordinator.claim(short.model_copy(update={"left_s": 501.0}))).assignment is not None
        await coordinator.finish(finish("2"))

    coordinate(spec, ledger, worker)


def test_messages_that_come_twice_are_recorded_once(ledger: Ledger, spec: SweepSpec, tmp_path: Path) -> None:
    """A worker repeats each one whose reply was lost."""

    async def worker(coordinator: Coordinator, _: OneWorker) -> None:
        for number in range(3):
            ident = str(number)
            first = await coordinator.claim(claim(ident))
            assert await coordinator.claim(claim(ident)) == first
            reports = [
                protocol.Report(attempt=ident, seq=seq, step=seq, time=1.0, metrics={"score": 0.5})
                for seq in range(3)
            ]
            for part in (reports[:2], reports[:2], reports[1:]):
                await coordinator.report(protocol.Reports(worker="w", reports=tuple(part)))
            await asyncio.gather(*(coordinator.finish(finish(ident)) for _ in range(2)))
            await coordinator.finish(finish(ident, kind=FailureKind.CRASH))

    coordinate(spec, ledger, worker)
    found = Ledger.open(tmp_path, readonly=True)
    assert found.counts()[TrialState.COMPLETE] == 3
    assert len(found.attempts()) == 3
    assert [report.step for report in found.reports()] == [0, 1, 2] * 3
    found.close()


def test_a_trial_that_is_cancelled_while_it_is_being_handed_out_is_not(
    ledger: Ledger, spec: SweepSpec, tmp_path: Path
) -> None:
    """Nor does the sweep end for it."""

    async def worker(coordinator: Coordinator, _: OneWorker) -> None:
        cancelling = protocol.Cancel(trials=(0,))
        claimed, cancelled = await asyncio.gather(
            coordinator.claim(claim("a")), coordinator.cancel(cancelling)
        )
        assert cancelled.trials == (0,)
        for number in (1, 2):
            if claimed.assignment is not None and claimed.assignment.trial == 0:  # it was handed out before
                await coordinator.finish(finish("a", kind=FailureKind.CANCELLED))
                claimed = await coordinator.claim(claim("b"))
            assert claimed.assignment is not None
            assert claimed.assignment.trial == number
            await coordinator.finish(finish(claimed.assignment.attempt))
            claimed = await coordinator.claim(claim(f"next-{number}"))
        assert claimed.over
        assert coordinator.has_begun_all()  # a search would wait for it

    coordinate(spec, ledger, worker)
    found = Ledger.open(tmp_path, readonly=True)
    assert found.cancelled == {0}
    assert +Counter(found.counts()) == {TrialState.FAIL: 1, TrialState.COMPLETE: 2}
    found.close()


def test_a_trial_that_is_cancelled_while_it_fails_is_not_tried_again(
    ledger: Ledger, spec: SweepSpec, tmp_path: Path
) -> None:
    """Although its failure alone would have been."""
    limits = spec.limits.model_copy(update={"retries": {FailureKind.CRASH: None}})

    async def worker(coordinator: Coordinator, _: OneWorker) -> None:
        await coordinator.claim(claim("a"))
        failing = finish("a", kind=FailureKind.CRASH)
        await asyncio.gather(coordinator.finish(failing), coordinator.cancel(protocol.Cancel(trials=(0,))))
        for number in (1, 2):
            assigned = (await coordinator.claim(claim(str(number)))).assignment
            assert assigned is not None
            assert assigned.trial == number
            await coordinator.finish(finish(str(number)))
        assert (await coordinator.claim(claim("last"))).over
        assert coordinator.progress().cancelled == 1

    coordinate(spec.model_copy(update={"limits": limits}), ledger, worker)
    found = Ledger.open(tmp_path, readonly=True)
    assert found.cancelled == {0}
    assert +Counter(found.counts()) == {TrialState.FAIL: 1, TrialState.COMPLETE: 2}
    found.close()


def test_the_best_trial_so_far_follows_the_sweep_s_direction(ledger: Ledger, spec: SweepSpec) -> None:
    """Infinite values and failures do not count."""
    seen: list[tuple[int, float] | None] = []

    async def worker(coordinator: Coordinator, _: OneWorker) -> None:
        for number, score in enumerate([math.inf, 0.5, 0.25]):
            await coordinator.claim(claim(str(number)))
            await coordinator.finish(finish(str(number), score=score))
            best = coordinator.progress().best
            seen.append(None if best is None else (best.trial, best.value))

    coordinate(spec.model_copy(update={"direction": Direction.MINIMIZE}), ledger, worker)
    assert seen == [None, (1, 0.5), (2, 0.25)]


# --- handing out ---------------------------------------------------------------------------------------------

GPU_A, GPU_B = ("w", ("0",)), ("w", ("1",))


def test_trials_are_handed_out_in_their_order_and_the_urgent_ones_first() -> None:
    """Until none is left."""
    handout = Handout([0, 1])
    handout.add(2)
    handout.add(3, first=True)
    assert len(handout) == 4
    assert [handout.take(GPU_A) for _ in range(5)] == [3, 0, 1, 2, None]
    assert len(handout) == 0


def test_a_trial_that_must_be_alone_gets_its_gpu_when_all_others_have_ended_there() -> None:
    """Meanwhile that gets no other trial; other GPUs do; when it has ended, all goes on as before."""
    handout = Handout(range(6))
    assert [handout.take(GPU_A) for _ in range(2)] == [0, 1]
    handout.add(9, alone=True)
    handout.release(GPU_A, 0)
    assert handout.take(GPU_A) is None
    assert handout.take(GPU_B) == 2
    assert len(handout) == 4
    handout.release(GPU_A, 1)
    assert handout.take(GPU_A) == 9
    assert len(handout) == 3
    assert handout.take(GPU_A) is None
    assert handout.take(GPU_B) == 3
    handout.release(GPU_A, 9)
    assert [handout.take(GPU_A) for _ in range(3)] == [4, 5, None]


def test_two_trials_that_must_be_alone_get_a_gpu_each_or_one_after_the_other() -> None:
    """A trial that an earlier coordinator has handed out is beside them too."""
    handout = Handout()
    handout.occupy(GPU_A)
    for number in (1, 2, 3):
        handout.add(number, alone=True)
    assert handout.take(GPU_A) is None
    assert handout.take(GPU_B) == 2
    handout.release(GPU_A, 7)
    assert handout.take(GPU_A) == 1
    handout.release(GPU_B, 2)
    assert handout.take(GPU_B) == 3


def test_a_trial_that_waits_to_be_alone_on_a_worker_that_is_lost_waits_for_another() -> None:
    """One that ran there is its coordinator's to add again."""
    handout = Handout()
    handout.occupy(GPU_A)
    handout.add(1, alone=True)
    handout.add(2, alone=True)
    assert handout.take(GPU_A) is None
    assert handout.take(GPU_B) == 2
    handout.forget("w")
    assert len(handout) == 1
    assert handout.take(("v", ("0",))) == 1
    assert handout.take(GPU_A) is None
    handout.add(3)
    assert handout.take(GPU_A) == 3


def test_a_trial_that_is_cancelled_waits_no_more_and_keeps_no_gpu_from_others() -> None:
    """Wherever it waited; one that runs is not among them."""
    handout = Handout([0, 1])
    handout.occupy(GPU_A)
    for number in (2, 3):
        handout.add(number, alone=True)
    assert handout.take(GPU_A) is None
    assert handout.take(GPU_B) == 3
    assert handout.discard([1, 2, 3, 8]) == {1, 2}
    assert len(handout) == 1
    assert handout.take(GPU_B) is None
    assert handout.take(GPU_A) == 0


POLICY = {FailureKind.CRASH: 1, FailureKind.PREEMPTED: None, FailureKind.EXCEPTION: 0}


@pytest.mark.parametrize(
    ("kind", "past", "again"),
    [
        (FailureKind.CRASH, [], True),
        (FailureKind.CRASH, [FailureKind.CRASH], False),
        (FailureKind.CRASH, [FailureKind.PREEMPTED, FailureKind.EXCEPTION], True),
        (FailureKind.PREEMPTED, [FailureKind.PREEMPTED] * 1000, True),
        (FailureKind.EXCEPTION, [], False),
        (FailureKind.STALLED, [], False),
        (None, [], False),
    ],
)
def test_a_trial_is_tried_again_as_often_as_its_sweep_says_for_the_kind_of_its_failure(
    kind: FailureKind | None, past: list[FailureKind], again: bool
) -> None:
    """Failures of another kind do not count, and a kind that is not named has no retries."""
    assert retries.tries_again(POLICY, kind, past) is again


def test_only_failures_since_the_user_has_started_a_trial_again_count_for_its_retries(ledger: Ledger) -> None:
    """Successes never do."""
    for ordinal in range(2):
        ledger.start_attempt(attempt(0, f"a{ordinal}", ordinal=ordinal))
        ledger.finish_attempt(f"a{ordinal}", failed(FailureKind.CRASH), again=ordinal == 0)
    assert retries.past_failures(ledger.trial(0), ledger.attempts(0)) == [FailureKind.CRASH] * 2
    ledger.requeue([0])
    assert retries.past_failures(ledger.trial(0), ledger.attempts(0)) == []


# --- how busy the slots were ---------------------------------------------------------------------------------


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_meter_counts_slot_time_from_the_first_start_to_the_last_end() -> None:
    """What is before or after them is nobody's idleness."""
    clock = Clock()
    meter = Meter(clock)
    meter.set(slots=2, running=0)
    clock.now += 50
    assert (meter.busy(), meter.elapsed_s(), meter.seconds_left(4)) == (0.0, 0.0, None)
    meter.set(slots=2, running=2)
    clock.now += 10
    assert meter.busy() == 1.0
    meter.finished(10.0)
    meter.set(slots=2, running=1)
    clock.now += 10
    assert meter.busy() == pytest.approx(0.75)
    assert meter.seconds_left(4) == pytest.approx(20.0)
    meter.finished(20.0)
    meter.set(slots=2, running=0)
    clock.now += 1000
    assert meter.busy() == pytest.approx(0.75)
    assert meter.elapsed_s() == pytest.approx(20.0)
    assert meter.seconds_left(4) == pytest.approx(4 * 15 / 2)


def test_the_meter_counts_the_time_between_two_trials_as_idle() -> None:
    """Slots that wait for work are not busy."""
    clock = Clock()
    meter = Meter(clock)
    for running in (1, 0, 1, 0):
        meter.set(slots=1, running=running)
        clock.now += 10
    assert meter.busy() == pytest.approx(2 / 3)


# --- a trial's log -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("size", [0, 10, 100, 101, 5000])
def test_a_capped_log_keeps_the_head_and_the_tail(tmp_path: Path, chunk: int, size: int) -> None:
    """Everything up to its limit; of more, both ends and how much is missing."""
    data = bytes(range(65, 91)) * (size // 26 + 1)
    data = data[:size]
    log = CappedLog(tmp_path / "log", 100)
    for start in range(0, size, chunk):
        log.write(data[start : start + chunk])
    log.close()
    kept = (tmp_path / "log").read_bytes()
    if size <= 100:
        assert kept == data
        return
    head, rest = kept[:50], kept[50:]
    note = re.match(rb"\n\[repro-sweep: ([\d,]+) bytes left out \(sweep\.log_limit_mb\)\]\n", rest)
    dropped = 0 if note is None else int(note[1].replace(b",", b""))
    tail = rest if note is None else rest[note.end() :]
    assert head == data[:50]
    assert data.endswith(tail)
    assert 50 <= len(tail) < 50 + chunk
    assert dropped == size - len(head) - len(tail)


def test_a_capped_log_continues_a_file(tmp_path: Path) -> None:
    """The log of a second attempt stands behind the first one's."""
    for text in (b"first\n", b"second\n"):
        log = CappedLog(tmp_path / "log", 1000)
        log.write(text)
        log.close()
    assert (tmp_path / "log").read_bytes() == b"first\nsecond\n"


# --- the task ------------------------------------------------------------------------------------------------


def test_a_task_is_found_again_by_its_dotted_name() -> None:
    """And called so in the identity of its trials."""
    spec = task.from_dotted("json.dumps", "sweep.task")
    import json

    assert task.load(spec) is json.dumps
    assert spec.name == "json.dumps"


@pytest.mark.parametrize("dotted", ["train", "", ".train", "a..b", "a.b c", "a-b.c", "a.b()"])
def test_a_task_s_name_must_be_dotted(dotted: str) -> None:
    """The message says where and how."""
    with pytest.raises(
        TaskError, match=r"sweep\.task: .* is not a dotted name like package\.module\.function"
    ):
        task.from_dotted(dotted, "sweep.task")


def test_a_task_function_that_no_other_process_finds_is_refused() -> None:
    """A lambda, a nested function."""

    def nested(_: object) -> None:
        return None

    for function in (nested, lambda _: None):
        with pytest.raises(TaskError, match="top level"):
            task.from_function(function)


def test_a_function_of_a_module_is_found_again() -> None:
    """The function that Hydra hands to the sweeper."""
    spec = task.from_function(subprocess.list2cmdline)
    assert (spec.module, spec.qualname, spec.file) == ("subprocess", "list2cmdline", None)
    assert task.load(spec) is subprocess.list2cmdline


@pytest.mark.parametrize(
    ("source", "name", "says"),
    [
        ("", "train", "has no 'train'"),
        ("train = 5", "train", "is a int, not a function"),
        ("def train(): pass", "train", r"one argument, the config; this one is train\(\)"),
        ("def train(cfg, more): pass", "train", "one argument"),
        ("def train(*, cfg): pass", "train", "one argument"),
        ("import nosuchmodule", "train", "ModuleNotFoundError: No module named 'nosuchmodule'"),
        ("raise ValueError('why')", "train", "ValueError: why"),
        ("raise SystemExit(3)", "train", "SystemExit: 3"),
        ("def train(cfg):\n  return (", "train", "SyntaxError"),
    ],
)
def test_a_task_that_cannot_be_called_is_refused_with_the_reason(
    tmp_path: Path, source: str, name: str, says: str
) -> None:
    """The import's own traceback's last line, where that failed."""
    file = tmp_path / "mytask.py"
    file.write_text(source)
    with pytest.raises(TaskError, match=says):
        task.load(TaskSpec(file=str(file), qualname=name, cwd=str(tmp_path)))


@pytest.mark.parametrize(
    "source",
    [
        "def train(cfg): return 1.0",
        "def train(cfg, more=2): return 1.0",
        "def train(*args): return 1.0",
        "class Train:\n  def __call__(self, cfg): return 1.0\ntrain = Train()",
        "import functools\ntrain = functools.partial(lambda a, cfg: 1.0, 0)",
        "import functools\ndef plain(cfg): return 1.0\n@functools.wraps(plain)\ndef train(cfg): return plain(cfg)",
        "import hydra\n@hydra.main(version_base=None)\ndef train(cfg): return 1.0",
    ],
)
def test_whatever_takes_one_argument_is_a_task(tmp_path: Path, source: str) -> None:
    """A function that ``hydra.main`` wraps is unwrapped."""
    (tmp_path / "mytask.py").write_text(source)
    function = task.load(TaskSpec(file=str(tmp_path / "mytask.py"), qualname="train", cwd=str(tmp_path)))
    assert function({}) == 1.0


# --- what user code sees -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1.0),
        (True, 1.0),
        (0.5, 0.5),
        (Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
        (np.array(2.0), 2.0),
        (np.array([[4.0]]), 4.0),
        (math.inf, math.inf),
    ],
)
def test_numbers_of_python_and_numpy_are_metrics(value: object, number: float) -> None:
    """And arrays with one element."""
    found = trial.as_number(value, "metric")
    assert (type(found), found) == (float, number)


@pytest.mark.parametrize("value", ["0.5", None, [1.0], {}, 1j, np.array([1.0, 2.0]), object(), int])
def test_what_is_no_number_is_refused_with_its_name(value: object) -> None:
    """The message says which metric, and what it was."""
    with pytest.raises(TypeError, match=f"metric 'score' must be a number, got {type(value).__name__}"):
        trial.as_number(value, "metric 'score'")


def test_outside_of_a_sweep_report_only_checks_its_arguments() -> None:
    """So that a task function also runs under plain Hydra."""
    repro_sweep.report(0, score=0.5, loss=np.float32(1))
    for step in ("one", 1.5, True, None):
        with pytest.raises(TypeError, match="step must be a whole number"):
            repro_sweep.report(step, score=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="report: metric 'score' must be a number"):
        repro_sweep.report(0, score="good")  # type: ignore[arg-type]


def test_outside_of_a_sweep_the_folders_lie_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no Hydra runs; they exist when they are returned."""
    monkeypatch.chdir(tmp_path)
    assert repro_sweep.artifact_dir() == tmp_path / "artifacts"
    assert repro_sweep.checkpoint_dir() == tmp_path / "checkpoints"
    assert (tmp_path / "artifacts").is_dir()
    assert (tmp_path / "checkpoints").is_dir()


# --- the code ------------------------------------------------------------------------------------------------


def test_equal_code_has_equal_fingerprints_wherever_it_lies_and_whatever_git_says(tmp_path: Path) -> None:
    """Only the project's Python files count: neither other files nor what was installed or put out there."""
    code = {"train.py": "x = 1", "models/net.py": "y = 2"}
    noise = {
        "data.csv": "1",
        ".hidden/a.py": "a",
        "multirun/b.py": "b",
        "env/pyvenv.cfg": "",
        "env/c.py": "c",
    }

    def folder(name: str, files: Mapping[str, str]) -> Path:
        for path, text in files.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path / name

    plain = code_fingerprint(folder("plain", code))
    assert len(plain) == 64
    assert code_fingerprint(folder("noisy", code | noise)) == plain
    assert code_fingerprint(folder("changed", code | {"models/net.py": "y = 3"})) != plain
    assert code_fingerprint(folder("moved", {"train.py": "y = 2", "models/net.py": "x = 1"})) != plain
    repository = folder("repository", code | {"env/c.py": "c", ".gitignore": "env/"})
    subprocess.run(["git", "init", "-q", repository], check=True)
    assert code_fingerprint(repository) == plain


def test_a_project_that_cannot_be_looked_through_has_no_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one whose data are a million folders."""
    (tmp_path / "train.py").write_text("x = 1")
    monkeypatch.setattr(source, "_PATIENCE_S", -1.0)
    assert code_fingerprint(tmp_path) == ""


# --- messages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, 0.1, -0.0])
def test_every_float_survives_the_wire(value: float) -> None:
    """JSON has no NaN of its own."""
    sent = protocol.Finish(
        worker="w", attempt="a", state=TrialState.COMPLETE, metrics={"m": value}, ended_at=0.0
    )
    received = protocol.Finish.model_validate_json(sent.model_dump_json()).metrics["m"]
    assert received == value or (math.isnan(value) and math.isnan(received))
    assert math.copysign(1, received) == math.copysign(1, value)


# --- names, imports, errors ----------------------------------------------------------------------------------


def test_the_public_names_are_few_and_all_there() -> None:
    """A new one is a decision."""
    assert repro_sweep.__all__ == [
        "ReproSweepError", "Reproduction", "Trial", "TrialInterrupted", "TrialPruned", "TrialState", "Verdict",
        "artifact_dir", "best_trial", "checkpoint_dir", "generator", "leaderboard", "pareto_front", "report", "seed",
        "trials", "worker_init_fn",
    ]  # fmt: skip
    assert dir(repro_sweep) == sorted(repro_sweep.__all__)
    for name in repro_sweep.__all__:
        assert getattr(repro_sweep, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        _ = repro_sweep.nosuch  # type: ignore[attr-defined]


HEAVY = (
    "torch",
    "mlflow",
    "ray",
    "optuna",
    "hydra",
    "omegaconf",
    "pandas",
    "numpy",
    "pydantic",
    "fastapi",
    "rich",
)


@pytest.mark.parametrize(
    ("program", "heavy"),
    [
        ("import repro_sweep", HEAVY),
        ("import sys, repro_sweep.cli.main as m\ntry: m.main(['--help'])\nexcept SystemExit: pass", HEAVY),
        (
            "from repro_sweep import report, TrialState",
            ("torch", "mlflow", "ray", "optuna", "hydra", "pandas"),
        ),
        (
            "import repro_sweep.worker.agent",
            ("torch", "mlflow", "ray", "optuna", "hydra", "pandas", "fastapi"),
        ),
        ("import repro_sweep.coordinator", ("torch", "mlflow", "ray", "optuna", "hydra", "pandas")),
        ("import repro_sweep.cli.run", ("torch", "mlflow", "ray", "optuna", "pandas", "submitit")),
    ],
)
def test_an_import_loads_nothing_heavy_that_it_does_not_need(program: str, heavy: tuple[str, ...]) -> None:
    """Start-up stays under 0.3 s."""
    shown = f"{program}\nimport sys\nprint('LOADED', *sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", shown],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env=environment(),
    )
    loaded = set(result.stdout.rpartition("LOADED")[2].split())
    assert loaded & set(heavy) == set()


def test_the_tree_of_errors_is_the_one_that_is_drawn() -> None:
    """In the module's docstring."""
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if not line.startswith("    "):
            continue
        stem = line[4:].lstrip("│├└─ ")
        depth = (len(line[4:]) - len(stem)) // 4
        name = stem.split()[0]
        path = [*path[:depth], name]
        drawn[name] = path[depth - 1] if depth else "Exception"
    defined = {
        name: value.__base__.__name__
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert drawn == defined


def test_states_say_which_of_them_are_final() -> None:
    """A failed trial is finished, but not done: it may be run again."""
    assert {state for state in TrialState if state.is_finished()} == {
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
    }
    assert {state for state in TrialState if state.is_done()} == {TrialState.COMPLETE, TrialState.PRUNED}
