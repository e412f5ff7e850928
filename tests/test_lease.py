"""Who may write a sweep's ledger, and what stands in it then: the lease, its fence, and each change exactly once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import a_ledger, attempt, complete, environment, failed

from repro_sweep import journal as journal_module
from repro_sweep import lease as lease_module
from repro_sweep.errors import LeaseLostError, LedgerError, SweepError, UnwritableError
from repro_sweep.journal import Journal
from repro_sweep.lease import ADDRESS_NAME, Lease, address_of, holder_of, is_held
from repro_sweep.ledger import Ledger
from repro_sweep.records import NewReport, Reused
from repro_sweep.states import FailureKind, TrialState

# --- the lease -----------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger with three waiting trials."""
    made = a_ledger(tmp_path)
    yield made
    made.close()


@contextmanager
def another(ledger: Ledger) -> Iterator[Ledger]:
    """The same ledger, opened once more."""
    opened = Ledger.open(ledger.path.parent)
    yield opened
    opened.close()


def give_back(lease: Lease, ledger: Ledger) -> None:
    """Release a lease as a coordinator does."""
    lease.release(ledger)
    ledger.commit()
    lease.drop()


def set_lease(ledger: Ledger, **changes: object) -> None:
    """Change what stands in the ledger about its holder."""
    with another(ledger) as writer:
        record = json.loads(writer.meta("lease") or "{}")
        writer.set_meta("lease", json.dumps({**record, **changes}))
        writer.commit()


PROGRAM = """
import sys
from pathlib import Path
from repro_sweep import lease
from repro_sweep.errors import ReproSweepError
from repro_sweep.ledger import Ledger

def say(word):
    print(word, flush=True)

ledger = Ledger.open(Path(sys.argv[1]))
if sys.argv[2:] == ["without locks"]:
    lease._lock = lambda fd: False
"""
HOLD = """
lease.Lease.acquire(ledger, "unit")
say("held")
sys.stdin.readline()
try:
    ledger.set_meta("late", "yes")
    ledger.commit()
    say("written")
except ReproSweepError as error:
    say(type(error).__name__)
"""
HOLD_THE_LEDGER = """
lease.Lease.acquire(ledger, "unit")
say("held")
assert ledger.begin(1.0)
say("inside")
sys.stdin.readline()
"""
RACE = """
say("ready")
sys.stdin.readline()
try:
    lease.Lease.acquire(ledger, "unit")
    say("held")
except ReproSweepError as error:
    say(error)
sys.stdin.readline()
"""


@contextmanager
def process(ledger: Ledger, program: str, *arguments: str, says: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that uses the ledger; it has said ``says``, and is killed at the end."""
    command = [sys.executable, "-c", PROGRAM + program, str(ledger.path.parent), *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as started:
        try:
            assert line_of(started) == says
            yield started
        finally:
            started.kill()


def line_of(started: subprocess.Popen[str]) -> str:
    """The next thing that it says."""
    assert started.stdout is not None
    return started.stdout.readline().rstrip()


def go_on(started: subprocess.Popen[str]) -> None:
    """Let it go on."""
    assert started.stdin is not None
    started.stdin.write("\n")
    started.stdin.flush()


def test_a_lease_is_held_by_one_at_a_time_and_the_refusal_names_the_holder(ledger: Ledger) -> None:
    """Its process, its host, since when; and what can be done."""
    lease = Lease.acquire(ledger, "unit")
    refusal = (
        rf"sweep 'unit' is already running: process {os.getpid()} on \S+ since \d{{4}}-\S+ \S+ UTC; watch it"
    )
    with another(ledger) as other:
        with pytest.raises(SweepError, match=refusal):
            Lease.acquire(other, "unit")
        give_back(lease, ledger)
        give_back(Lease.acquire(other, "unit"), other)


def test_the_epoch_of_a_lease_only_grows(ledger: Ledger) -> None:
    """Also over one that was given back."""
    epochs = []
    for _ in range(3):
        with another(ledger) as held:
            lease = Lease.acquire(held, "unit")
            epochs.append(lease.holder.epoch)
            give_back(lease, held)
    assert epochs == [1, 2, 3]
    assert holder_of(ledger) is None


def test_a_coordinator_announces_itself_to_its_user_only_and_takes_that_back(ledger: Ledger) -> None:
    """But not what its successor has announced meanwhile."""
    lease = Lease.acquire(ledger, "unit")
    lease.announce("/socket")
    file = ledger.path.parent / ADDRESS_NAME
    assert file.stat().st_mode & 0o777 == 0o600
    found = address_of(ledger.path.parent)
    assert found is not None
    assert (found.epoch, found.socket) == (1, "/socket")
    file.write_text(json.dumps({"epoch": 2, "socket": "/other"}))
    give_back(lease, ledger)
    assert file.exists()
    file.write_text("{")
    assert address_of(ledger.path.parent) is None


def test_a_lease_ends_at_once_with_its_holder_s_death(ledger: Ledger) -> None:
    """However fresh it was."""
    with process(ledger, HOLD, says="held") as holder:
        with pytest.raises(SweepError, match=f"already running: process {holder.pid} on"):
            Lease.acquire(ledger, "unit")
        holder.kill()
        holder.wait(60)
        began = time.monotonic()
        lease = Lease.acquire(ledger, "unit")
        assert time.monotonic() - began < lease_module.LEASE_S / 3
    assert lease.holder.epoch == 2
    give_back(lease, ledger)


def test_a_holder_that_is_stopped_loses_its_lease_when_it_has_not_renewed_it_and_then_writes_nothing(
    ledger: Ledger,
) -> None:
    """Not before, as it may only be slow."""
    with process(ledger, HOLD, says="held") as holder:
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(SweepError, match="already running"):
            Lease.acquire(ledger, "unit")
        set_lease(ledger, renewed=time.time() - lease_module.LEASE_S - 1)
        lease = Lease.acquire(ledger, "unit")
        assert lease.holder.epoch == 2
        holder.send_signal(signal.SIGCONT)
        go_on(holder)
        assert line_of(holder) == "LeaseLostError"
    assert ledger.meta("late") is None
    found = holder_of(ledger)
    assert found is not None
    assert found.pid == os.getpid()
    give_back(lease, ledger)


def test_a_holder_that_was_stopped_within_a_commit_is_killed_when_its_lease_has_ended(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the ledger's lock, so that nobody else could ever write."""
    monkeypatch.setattr(lease_module, "_WAIT_S", 0.2)
    program = HOLD_THE_LEDGER.replace(
        'say("held")',
        'say("held")\nimport json\nrecord = json.loads(ledger.meta("lease"))\n'
        'ledger.set_meta("lease", json.dumps(record | {"renewed": 0.0}))\nledger.commit()',
    )
    with process(ledger, program, says="held") as holder:
        assert line_of(holder) == "inside"
        holder.send_signal(signal.SIGSTOP)
        lease = Lease.acquire(ledger, "unit")
        assert holder.wait(60) == -signal.SIGKILL
    assert lease.holder.epoch == 2
    give_back(lease, ledger)


def test_a_ledger_that_somebody_else_has_locked_is_refused_after_a_while(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has no lease is not killed."""
    monkeypatch.setattr(lease_module, "_WAIT_S", 0.2)
    with another(ledger) as other:
        assert other.begin(0.0)
        with pytest.raises(
            SweepError, match="sweep 'unit': its ledger is locked by another process; end that"
        ):
            Lease.acquire(ledger, "unit")
        other.rollback()
    give_back(Lease.acquire(ledger, "unit"), ledger)


ELSEWHERE = {"host": "elsewhere", "pid": 1, "started": 1, "since": 0.0, "epoch": 7, "locked": False}


def test_a_holder_on_another_machine_is_refused_while_its_lease_is_fresh(ledger: Ledger) -> None:
    """Nothing here can tell whether it lives."""
    set_lease(ledger, **ELSEWHERE, renewed=time.time())
    with pytest.raises(SweepError, match="already running: process 1 on elsewhere since"):
        Lease.acquire(ledger, "unit")


def test_a_holder_on_another_machine_whose_clock_differs_is_seen_to_renew(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its stamp alone it would be long dead."""
    monkeypatch.setattr(lease_module, "LEASE_S", 600.0)
    set_lease(ledger, **ELSEWHERE, renewed=1.0)
    done = threading.Event()

    def renew() -> None:
        stamp = 1.0
        while not done.wait(0.05):
            stamp += 1.0
            set_lease(ledger, renewed=stamp)

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with pytest.raises(SweepError, match="already running: process 1 on elsewhere"):
            Lease.acquire(ledger, "unit")
    finally:
        done.set()
        renewing.join()


def test_a_holder_on_another_machine_that_does_not_renew_is_waited_for_as_long_as_a_lease_lasts(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the lease is taken."""
    monkeypatch.setattr(lease_module, "LEASE_S", 0.6)
    set_lease(ledger, **ELSEWHERE, renewed=1.0)
    with another(ledger) as writer:
        writer.set_meta("epoch", "7")
        writer.commit()
    began = time.monotonic()
    lease = Lease.acquire(ledger, "unit")
    assert time.monotonic() - began >= 0.6
    assert lease.holder.epoch == 8
    give_back(lease, ledger)


def test_a_lock_that_can_be_had_says_nothing_of_a_holder_on_another_machine(ledger: Ledger) -> None:
    """File systems exist whose locks other machines do not see: only its renewals count."""
    set_lease(ledger, **{**ELSEWHERE, "locked": True}, renewed=time.time())
    with pytest.raises(SweepError, match="already running: process 1 on elsewhere"):
        Lease.acquire(ledger, "unit")


def test_a_holder_that_cannot_be_seen_is_alive_while_its_lock_is_held(ledger: Ledger) -> None:
    """Such as one in another container that has the same name."""
    with process(ledger, HOLD, says="held"):
        set_lease(ledger, pid=1, started=1, renewed=time.time(), locked=True)
        with pytest.raises(SweepError, match="already running: process 1 on"):
            Lease.acquire(ledger, "unit")


@pytest.mark.parametrize("locks", ["with locks", "without locks"])
def test_of_those_that_take_a_dead_holder_s_lease_at_once_one_gets_it(ledger: Ledger, locks: str) -> None:
    """The others are told who it is; also where the file system has no locks."""
    with process(ledger, HOLD, locks, says="held") as dead:
        pass
    assert dead.wait(60) != 0
    with (
        process(ledger, RACE, locks, says="ready") as one,
        process(ledger, RACE, locks, says="ready") as two,
        process(ledger, RACE, locks, says="ready") as three,
    ):
        racing = (one, two, three)
        for each in racing:
            go_on(each)
        said = {each.pid: line_of(each) for each in racing}
        [winner] = [pid for pid, text in said.items() if text == "held"]
        for pid, text in said.items():
            assert pid == winner or f"already running: process {winner} on" in text
        found = holder_of(ledger)
        assert found is not None
        assert (found.pid, found.epoch) == (winner, 2)


def test_whether_a_lease_is_held_can_be_told_without_taking_it(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its lock where it has one, else by its last renewal."""
    folder = ledger.path.parent
    lease = Lease.acquire(ledger, "unit")
    assert lease.holder.locked
    assert is_held(folder, lease.holder)
    lease.drop()
    assert not is_held(folder, lease.holder)
    monkeypatch.setattr(lease_module, "_lock", lambda _: False)
    monkeypatch.setattr(lease_module, "_TAKING_S", 0.1)
    with another(ledger) as other:
        other.set_meta("lease", "")
        other.commit()
        unlocked = Lease.acquire(other, "unit")
    assert not unlocked.holder.locked
    assert is_held(folder, unlocked.holder)
    monkeypatch.setattr(lease_module, "LEASE_S", -1.0)
    assert not is_held(folder, unlocked.holder)
    unlocked.drop()


def test_renewing_a_lease_moves_its_stamp_and_takes_the_lock_when_that_is_free(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which makes the next takeover immediate again."""
    real = lease_module._lock
    monkeypatch.setattr(lease_module, "_lock", lambda _: False)
    monkeypatch.setattr(lease_module, "_TAKING_S", 0.1)
    lease = Lease.acquire(ledger, "unit")
    first = holder_of(ledger)
    monkeypatch.setattr(lease_module, "_lock", real)
    lease.renew(ledger)
    ledger.commit()
    second = holder_of(ledger)
    assert first is not None
    assert second is not None
    assert (first.locked, second.locked) == (False, True)
    assert second.renewed > first.renewed
    assert second.since == first.since
    give_back(lease, ledger)


# --- what a ledger takes -------------------------------------------------------------------------------------


def test_a_ledger_that_has_another_coordinator_takes_nothing_from_the_old_one(ledger: Ledger) -> None:
    """Which can still read, and whose reading is no mistake."""
    ledger.set_meta("epoch", "1")
    ledger.commit()
    ledger.fence(1)
    ledger.start_attempt(attempt(0))
    ledger.commit()
    with another(ledger) as newer:
        newer.set_meta("epoch", "2")
        newer.commit()
        newer.fence(2)
        assert ledger.trial(0).attempt == "a"
        ledger.commit()
        ledger.start_attempt(attempt(1, "b"))
        with pytest.raises(LeaseLostError):
            ledger.commit()
        assert [each.id for each in newer.attempts()] == ["a"]
        newer.finish_attempt("a", complete(score=1.0))
        newer.commit()
        assert newer.trial(0).state is TrialState.COMPLETE


def reports(*numbers: int, score: float = 0.0) -> list[NewReport]:
    """Reports of these numbers; each one's step is its number."""
    return [
        NewReport(seq=number, step=number, time=float(number), metrics={"score": score + number})
        for number in numbers
    ]


def test_a_report_is_recorded_once_and_in_its_order_however_often_it_comes(ledger: Ledger) -> None:
    """A number that is left out is that of a process that died before it could send its report."""
    ledger.start_attempt(attempt(0))
    for numbers in ([0, 1], [0, 1], [1, 2], [4], [2, 4], []):
        assert ledger.add_reports("a", reports(*numbers))
    ledger.commit()
    assert [report.step for report in ledger.reports()] == [0, 1, 2, 4]
    assert ledger.attempts(0)[0].reports == 5


def test_a_report_that_comes_after_the_end_is_refused_unless_it_is_known(ledger: Ledger) -> None:
    """So is one of an attempt that nobody has started."""
    ledger.start_attempt(attempt(0))
    ledger.add_reports("a", reports(0, 1))
    ledger.finish_attempt("a", complete(score=1.0))
    assert ledger.add_reports("a", reports(0, 1))
    assert not ledger.add_reports("a", reports(1, 2))
    assert not ledger.add_reports("unknown", reports(0))
    assert [report.step for report in ledger.reports()] == [0, 1]


def test_steps_that_a_later_attempt_repeats_with_equal_metrics_are_kept_once(ledger: Ledger) -> None:
    """Other metrics, or other steps, are news."""
    ledger.start_attempt(attempt(0))
    ledger.add_reports("a", reports(0, 1, 2))
    ledger.finish_attempt("a", failed(FailureKind.NODE_LOST), again=True)
    ledger.start_attempt(attempt(0, "b", ordinal=1))
    again = [
        NewReport(seq=0, step=1, time=9.0, metrics={"score": 1.0}),
        NewReport(seq=1, step=2, time=9.0, metrics={"score": 2.5}),
        NewReport(seq=2, step=2, time=9.0, metrics={"score": 2.5}),
        NewReport(seq=3, step=3, time=9.0, metrics={"score": 3.0}),
    ]
    assert ledger.add_reports("b", again[:2])
    assert ledger.add_reports("b", again)
    ledger.commit()
    kept = [(report.attempt, report.step, report.metrics["score"]) for report in ledger.reports()]
    assert kept == [("a", 0, 0), ("a", 1, 1), ("a", 2, 2), ("b", 2, 2.5), ("b", 2, 2.5), ("b", 3, 3)]
    assert [each.reports for each in ledger.attempts(0)] == [3, 4]


def test_a_trial_that_does_not_wait_cannot_be_started(ledger: Ledger) -> None:
    """Whatever the mistake, no trial runs twice."""
    ledger.start_attempt(attempt(0))
    ledger.commit()
    with pytest.raises(LedgerError, match="trial 0 does not wait"):
        ledger.start_attempt(attempt(0, "b", ordinal=1))
    ledger.rollback()
    assert [each.id for each in ledger.attempts()] == ["a"]


def test_an_attempt_ends_once(ledger: Ledger) -> None:
    """What comes later changes nothing, neither in it nor in its trial."""
    ledger.start_attempt(attempt(0))
    assert ledger.finish_attempt("a", failed(), again=True)
    assert not ledger.finish_attempt("a", complete(score=1.0))
    assert not ledger.finish_attempt("unknown", complete(score=1.0))
    [ended] = ledger.attempts()
    assert (ended.state, ended.kind, ended.metrics) == (TrialState.FAIL, FailureKind.EXCEPTION, {})
    assert ledger.trial(0).state is TrialState.WAITING
    for _ in range(2):
        ledger.note("a", "it came too late")
    assert ledger.attempts()[0].message == "why; it came too late"


def test_a_failed_trial_that_is_started_again_has_all_its_retries_again(ledger: Ledger) -> None:
    """A complete one is left as it is."""
    for number, outcome in enumerate([failed(), complete(score=1.0)]):
        ledger.start_attempt(attempt(number, f"a{number}"))
        ledger.finish_attempt(f"a{number}", outcome)
    ledger.requeue([0, 1, 2])
    assert [state for _, state in ledger.states()] == [
        TrialState.WAITING,
        TrialState.COMPLETE,
        TrialState.WAITING,
    ]
    assert [ledger.trial(number).retries_from for number in range(2)] == [1, 0]


def test_a_cancelled_trial_ends_at_once_or_with_its_attempt_and_can_be_started_again(ledger: Ledger) -> None:
    """What is complete cannot be cancelled."""
    for number in (0, 2):
        ledger.start_attempt(attempt(number, f"a{number}"))
    ledger.finish_attempt("a2", complete(score=1.0))
    ledger.cancel([0, 1, 2])
    assert [state for _, state in ledger.states()] == [
        TrialState.RUNNING,
        TrialState.FAIL,
        TrialState.COMPLETE,
    ]
    assert ledger.cancelled == {0, 1}
    ledger.finish_attempt("a0", failed(FailureKind.CANCELLED), cancelled=True)
    assert ledger.cancelled == {0, 1}
    ledger.requeue([0, 1, 2])
    assert ledger.cancelled == frozenset()
    assert ledger.counts()[TrialState.WAITING] == 2


def test_a_result_of_another_sweep_is_taken_for_a_waiting_trial_only(ledger: Ledger) -> None:
    """With where it comes from."""
    found = Reused(
        run_id="run", origin="sweep 'old', trial 3", host="there", metrics={"score": 0.5}, started_at=1.0, ended_at=2.0
    )  # fmt: skip
    ledger.reuse(1, found, "code")
    ledger.commit()
    trial, [taken] = ledger.trial(1), ledger.attempts(1)
    assert (trial.state, trial.reused) == (TrialState.COMPLETE, "run")
    assert (taken.host, taken.metrics, taken.ended_at) == ("there", {"score": 0.5}, 2.0)
    assert taken.message == "reused from sweep 'old', trial 3"
    with pytest.raises(LedgerError, match="trial 1 does not wait"):
        ledger.reuse(1, found, "code")


# --- a full disk ---------------------------------------------------------------------------------------------


def fill(ledger: Ledger, *, pages: int = 0) -> None:
    """Let the ledger's file grow no more, or again: SQLite sees a full disk."""
    ledger._db.execute(f"PRAGMA max_page_count = {pages or 1_000_000}")


def test_what_a_full_disk_does_not_take_is_committed_when_there_is_room_again(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile nothing is answered, and the reason can be shown."""
    monkeypatch.setattr(journal_module, "_RETRY_S", 0.01)
    fill(ledger, pages=1)

    room = threading.Event()

    def change(to: Ledger) -> None:
        if room.is_set():
            fill(to)
        to.set_meta("key", "x" * 9000)

    async def scenario() -> tuple[str | None, list[bool]]:
        journal = Journal(ledger)
        writes = [asyncio.create_task(journal.write(change)) for _ in range(3)]
        while journal.trouble is None:  # noqa: ASYNC110  (it has no event)
            await asyncio.sleep(0.01)
        trouble, done = journal.trouble, [write.done() for write in writes]
        room.set()
        await asyncio.gather(*writes)
        assert journal.trouble is None
        await journal.close()
        return trouble, done

    trouble, done = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert trouble is not None
    assert "full" in trouble
    assert done == [False] * 3
    found = Ledger.open(ledger.path.parent, readonly=True)
    assert found.meta("key") == "x" * 9000
    found.close()


def test_a_journal_that_is_closed_while_the_disk_is_full_gives_up_what_is_pending(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for it hears of it; what was committed before stays."""
    monkeypatch.setattr(journal_module, "_RETRY_S", 0.01)

    async def scenario() -> object:
        journal = Journal(ledger)
        await journal.write(lambda to: to.set_meta("before", "yes"))
        await journal.write(lambda to: fill(to, pages=1))
        pending = asyncio.create_task(journal.write(lambda to: to.set_meta("after", "x" * 9000)))
        while journal.trouble is None:  # noqa: ASYNC110  (it has no event)
            await asyncio.sleep(0.01)
        await journal.close(last=lambda to: to.set_meta("last", "x" * 9000))
        return (await asyncio.gather(pending, return_exceptions=True))[0]

    assert isinstance(asyncio.run(asyncio.wait_for(scenario(), 60)), UnwritableError)
    found = Ledger.open(ledger.path.parent, readonly=True)
    assert [found.meta(key) for key in ("before", "after", "last")] == ["yes", None, None]
    found.close()
