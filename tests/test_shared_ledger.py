"""A ledger that several machines use: no write-ahead log, readers that never stop its coordinator, and its lease."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import a_ledger, a_spec, attempt, environment, new_trial

from repro_sweep import lease as lease_module
from repro_sweep.errors import LedgerError, SweepError, UnwritableError
from repro_sweep.lease import Lease, holder_of
from repro_sweep.ledger import Ledger
from repro_sweep.states import TrialState


@pytest.fixture
def shared(tmp_path: Path) -> Ledger:
    """A shared ledger with three waiting trials."""
    made = Ledger.create(tmp_path, a_spec(tmp_path), shared=True)
    made.add_trials(new_trial(number) for number in range(3))
    made.commit()
    return made


def files(ledger: Ledger) -> set[str]:
    """The files that the ledger has on disk, without an empty journal."""
    found = {path for path in ledger.path.parent.glob("ledger.db*") if path.stat().st_size}
    return {path.name for path in found}


def test_a_shared_ledger_has_no_write_ahead_log_and_one_of_a_single_machine_has(
    shared: Ledger, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The log needs memory that machines do not share."""
    assert files(shared) == {"ledger.db"}
    single = a_ledger(tmp_path_factory.mktemp("single"))
    assert files(single) >= {"ledger.db", "ledger.db-wal"}
    single.close()
    shared.close()


def test_a_sweep_may_move_from_one_machine_to_several_and_back_unless_somebody_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost by it."""
    monkeypatch.setattr("repro_sweep.ledger._SHARE_S", 0.3)
    ledger = a_ledger(tmp_path)
    reader = Ledger.open(tmp_path, readonly=True)
    with pytest.raises(
        LedgerError, match=r"another process reads it, .* moves to several machines; end that"
    ):
        ledger.share(True)
    reader.close()
    ledger.share(True)
    assert files(ledger) == {"ledger.db"}
    ledger.start_attempt(attempt(0))
    ledger.commit()
    ledger.share(False)
    ledger.close()
    again = Ledger.open(tmp_path)
    assert again.counts()[TrialState.RUNNING] == 1
    again.close()


def test_what_is_read_for_long_does_not_stop_the_writer_of_a_shared_ledger(shared: Ledger) -> None:
    """It is a copy, and stays as it was."""
    reader = Ledger.open(shared.path.parent, readonly=True)
    with reader.snapshot() as frozen:
        began = time.monotonic()
        shared.start_attempt(attempt(0))
        shared.commit()
        assert time.monotonic() - began < 5
        assert frozen.counts()[TrialState.WAITING] == 3
        assert reader.counts()[TrialState.WAITING] == 2
    reader.close()
    shared.close()


def test_a_reader_that_is_stopped_in_the_middle_makes_the_writer_wait_and_try_again(
    shared: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a full disk does: nothing is handed out meanwhile, and nothing is lost."""
    monkeypatch.setattr("repro_sweep.ledger._BUSY_MS", 100)
    reader = sqlite3.connect(shared.path)
    cursor = reader.execute("SELECT number FROM trials")
    assert cursor.fetchone() == (0,)
    shared.begin_change()
    shared.start_attempt(attempt(0))
    with pytest.raises(UnwritableError, match="somebody reads it and does not end"):
        shared.commit()
    shared.rollback()
    cursor.close()
    reader.close()
    shared.begin_change()
    shared.start_attempt(attempt(0))
    shared.commit()
    assert shared.trial(0).state is TrialState.RUNNING
    shared.close()


KILLED_WITHIN_A_COMMIT = """
import os, signal, sys
from pathlib import Path
from repro_sweep.ledger import Ledger
ledger = Ledger.open(Path(sys.argv[1]))
ledger._db.execute("PRAGMA cache_size = 1")
for number in range(500):
    ledger.set_meta(f"key-{number}", "x" * 2000)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_has_half_written_is_undone_by_whoever_reads_next(shared: Ledger) -> None:
    """Also by one who had the ledger open before, and may only read."""
    folder = shared.path.parent
    shared.close()
    reader = Ledger.open(folder, readonly=True)
    assert reader.counts()[TrialState.WAITING] == 3
    for find in (lambda: reader, lambda: Ledger.open(folder, readonly=True)):
        subprocess.run(
            [sys.executable, "-c", KILLED_WITHIN_A_COMMIT, str(folder)], env=environment(), timeout=300
        )
        assert (folder / "ledger.db-journal").stat().st_size > 0
        found = find()
        assert found.meta("key-0") is None
        assert found.counts()[TrialState.WAITING] == 3
        found.close()


ELSEWHERE = {"host": "elsewhere", "pid": 1, "started": 1, "since": 0.0, "epoch": 7, "locked": True}


def hold_elsewhere(ledger: Ledger) -> None:
    """Let somebody on another machine hold the lease, who has just renewed it."""
    holder = lease_module.Holder(**ELSEWHERE, renewed=time.time())  # type: ignore[arg-type]
    record = {name: getattr(holder, name) for name in (*ELSEWHERE, "renewed")}
    ledger.set_meta("lease", lease_module.json.dumps(record))
    ledger.set_meta("epoch", "7")
    ledger.commit()


def test_a_patient_successor_takes_the_lease_of_one_on_another_machine_as_soon_as_it_has_surely_ended(
    shared: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fresh it is: it is watched for as long as a lease lasts."""
    monkeypatch.setattr(lease_module, "LEASE_S", 0.6)
    hold_elsewhere(shared)
    began = time.monotonic()
    lease = Lease.acquire(shared, "unit", patient=True)
    assert 0.6 <= time.monotonic() - began < 10
    assert lease.holder.epoch == 8
    lease.drop()
    shared.close()


def test_a_patient_successor_is_refused_by_one_that_lives_and_begins_at_once_when_the_lease_is_given_back(
    shared: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the command does that submits it."""
    monkeypatch.setattr(lease_module, "LEASE_S", 20.0)
    hold_elsewhere(shared)

    def later(value: str) -> threading.Thread:
        def write() -> None:
            time.sleep(0.3)
            writer = Ledger.open(shared.path.parent)
            writer.set_meta("lease", value)
            writer.commit()
            writer.close()

        thread = threading.Thread(target=write)
        thread.start()
        return thread

    holder = holder_of(shared)
    assert holder is not None
    renewed = {**ELSEWHERE, "renewed": holder.renewed + 1}
    thread = later(lease_module.json.dumps(renewed))
    with pytest.raises(SweepError, match="already running: process 1 on elsewhere"):
        Lease.acquire(shared, "unit", patient=True)
    thread.join()
    thread = later("")
    began = time.monotonic()
    lease = Lease.acquire(shared, "unit", patient=True)
    assert time.monotonic() - began < 10
    thread.join()
    lease.drop()
    shared.close()


KEEPER = """
import sys
from repro_sweep.cli import keeper
keeper._PAUSE_S = 0.01
sys.exit(keeper.Keeper([sys.executable, "-c", sys.argv[1]], {"LOG": sys.argv[2]}).run())
"""
CHILD = """
import os, signal
with open(os.environ["LOG"], "a") as log:
    print(os.environ["REPRO_SWEEP_KEPT"], file=log)
if len(open(os.environ["LOG"]).readlines()) < LIVES:
    os.kill(os.getpid(), signal.SIGKILL)
raise SystemExit(CODE)
"""


@pytest.mark.parametrize(
    ("lives", "code", "times", "status"), [(1, 3, 1, 3), (3, 0, 3, 0), (99, 0, 6, 1), (1, 130, 1, 130)]
)
def test_a_killed_coordinator_is_started_again_some_times_and_one_that_has_ended_is_not(
    tmp_path: Path, lives: int, code: int, times: int, status: int
) -> None:
    """The second knows that it is not the first."""
    log = tmp_path / "log"
    child = CHILD.replace("LIVES", str(lives)).replace("CODE", str(code))
    done = subprocess.run(
        [sys.executable, "-c", KEEPER, child, str(log)], env=environment(), timeout=300, capture_output=True
    )
    assert done.returncode == status, done.stderr
    assert log.read_text().split() == ["first"] + ["again"] * (times - 1)
