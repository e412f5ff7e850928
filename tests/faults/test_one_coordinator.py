"""A sweep has one coordinator at a time, however many want to be it, and one that was replaced writes nothing."""

from __future__ import annotations

import random
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest
from chaos import TRACKER, Finished, Swarm, end_leftovers, kill
from contenders import outcomes
from helpers import Running, eventually
from tracking_helpers import add_trial, make_ledger

from repro_sweep.errors import LeaseLostError
from repro_sweep.lease import Lease
from repro_sweep.ledger import Ledger
from repro_sweep.states import TrialState

Size = Callable[[int, int], int]
LEASE_S = 3.0
LEASE = {"REPRO_SWEEP_LEASE_S": str(LEASE_S)}


@pytest.mark.parametrize("processes", [2, 8])
def test_of_processes_that_take_a_lease_at_the_same_instant_one_gets_it(
    tmp_path: Path, size: Size, figures: Callable[..., None], processes: int
) -> None:
    """Whether it was given back before or its holder has died; the others are told who has it."""
    rounds = size(100, 500) if processes == 2 else size(20, 200)
    make_ledger(tmp_path / "grid", "sqlite:///mlflow.db").close()
    epochs: dict[int, list[int]] = {}
    unclear = 0
    for number, _, epoch, refusal in outcomes(tmp_path / "grid", processes, rounds):
        if epoch is None:
            unclear += "is already running: process " not in refusal or "\n" in refusal
        else:
            epochs.setdefault(number, []).append(epoch)
    holders = Counter(len(epochs.get(number, ())) for number in range(rounds))
    figures(
        rounds=rounds,
        processes=processes,
        rounds_with_two_coordinators=sum(count for held, count in holders.items() if held > 1),
        rounds_with_none=holders[0],
        unclear_refusals=unclear,
    )
    assert holders == {1: rounds}
    assert unclear == 0
    assert [epochs[number] for number in range(rounds)] == [[number + 1] for number in range(rounds)]


def test_of_sweeps_started_twice_at_the_same_instant_one_runs(
    make_swarm: Callable[..., Swarm], rng: random.Random, size: Size, figures: Callable[..., None]
) -> None:
    """New sweeps, and ones whose coordinator has died; the other start says who runs it, and ends."""
    rounds = size(3, 100)
    counted: Counter[str] = Counter()
    swarm = make_swarm(4)
    swarm.hold("all")
    for number in range(rounds):
        name = f"round-{number // 2}"  # the second time its coordinator was killed
        processes = 8 if number == rounds - 1 else 2
        with ExitStack() as stack:
            started = [stack.enter_context(swarm.start(f"sweep.name={name}")) for _ in range(processes)]
            eventually(lambda started=started: _alive(started) <= 1, "all but one have ended", 240)
            counted["rounds with none"] += _alive(started) == 0
            [winner] = [each for each in started if each.process.poll() is None]
            for each in started:
                if each is not winner:
                    lines = each.stderr.splitlines()
                    clear = (
                        len(lines) == 1
                        and f"is already running: process {winner.process.pid} on " in lines[0]
                    )
                    counted["unclear refusals"] += not clear or each.process.returncode != 2
                    counted["refusals"] += 1
            if number % 2:
                winner.process.terminate()
                assert winner.wait() == 130, winner.stderr
            else:
                winner.process.kill()
                winner.wait()
            end_leftovers(swarm, TRACKER)
        counted["rounds"] += 1
    for pid in swarm.project.processes():  # the workers of killed coordinators go on
        kill(pid)
    ends = [each.what for each in swarm.executions if each.what == "end"]
    figures(**{key.replace(" ", "_"): value for key, value in counted.items()})
    assert counted["unclear refusals"] == 0
    assert counted["rounds with none"] == 0
    assert ends == []


def test_a_coordinator_that_was_replaced_while_it_was_stopped_writes_nothing(
    make_swarm: Callable[..., Swarm],
    undisturbed: Callable[[int], Finished],
    rng: random.Random,
    size: Size,
    figures: Callable[..., None],
) -> None:
    """Its successor takes its workers over; it ends with one line when it goes on."""
    rounds, trials = size(1, 10), 60
    expected = undisturbed(trials)
    counted: Counter[str] = Counter()
    for number in range(rounds):
        swarm = make_swarm(trials, pause_s=0.03, name=f"round-{number}")
        with swarm.start(**LEASE) as first:
            threshold = rng.randrange(1, trials // 2)
            first.until(partial(_ended, swarm, threshold), "some trials end")
            _stop_between_commits(first, swarm)
            trackers = swarm.pids(TRACKER)
            before_pid = first.process.pid
            with _eventually_started(swarm, trackers) as second:
                assert second.wait(300) == 0, second.stderr
            before = _dump(swarm.directory / "ledger.db")
            first.process.send_signal(signal.SIGCONT)
            code = first.wait(60)
            said = [line for line in first.stderr.splitlines() if "trials" not in line and "done" not in line]
            after = _dump(swarm.directory / "ledger.db")
        verdict = swarm.verdict(expected)
        counted["rounds"] += 1
        counted["ledgers_changed"] += before != after
        counted["ended_otherwise"] += code != 2 or len(said) != 1 or "was taken over by " not in said[0]
        counted.update(verdict.wrong)
        assert before_pid == first.process.pid
        assert before == after
        assert code == 2, first.stderr
        assert len(said) == 1, first.stderr
        assert "was taken over by " in said[0]
        assert verdict.wrong == {}, verdict.remarks
        assert verdict.executions == trials, "a trial was executed again though its worker was alive"
    figures(**counted)


def test_a_ledger_fenced_at_an_older_epoch_refuses_a_commit(tmp_path: Path) -> None:
    """And its file stays as it was."""
    directory = tmp_path / "grid"
    old = make_ledger(directory, "sqlite:///mlflow.db")
    add_trial(old, 0)
    first = Lease.acquire(old, "grid")
    first.drop()
    new = Ledger.open(directory)
    second = Lease.acquire(new, "grid")
    assert second.holder.epoch == first.holder.epoch + 1

    old.cancel([0])
    before = _dump(directory / "ledger.db")
    with pytest.raises(LeaseLostError, match="another coordinator"):
        old.commit()
    assert _dump(directory / "ledger.db") == before
    new.cancel([0])
    new.commit()
    assert dict(new.states()) == {0: TrialState.FAIL}
    second.drop()
    old.close()
    new.close()


def _ended(swarm: Swarm, trials: int) -> bool:
    return swarm.count("end") >= trials


def _decided(swarm: Swarm, epoch: int, command: Running) -> bool:
    return swarm.epoch > epoch or command.process.poll() is not None


def _alive(commands: list[Running]) -> int:
    return sum(each.process.poll() is None for each in commands)


def _dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        return list(db.iterdump())


def _stop_between_commits(command: Running, swarm: Swarm) -> None:
    """Stop a coordinator, but not while it holds the lock of its ledger: then its successor would kill it."""
    with closing(sqlite3.connect(swarm.directory / "ledger.db", timeout=0, isolation_level=None)) as db:
        while True:
            command.process.send_signal(signal.SIGSTOP)
            eventually(lambda: _state(command.process.pid) == "T", "it has stopped")
            try:
                db.execute("BEGIN IMMEDIATE")
                db.execute("ROLLBACK")
                return
            except sqlite3.OperationalError:
                command.process.send_signal(signal.SIGCONT)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _eventually_started(swarm: Swarm, trackers: list[int]) -> Running:
    """Start the sweep again and again until the lease of the one that is stopped has ended."""
    for pid in trackers:
        kill(pid)
    while True:
        second = swarm.start(**LEASE)
        eventually(partial(_decided, swarm, swarm.epoch, second), "it runs or is refused")
        if second.process.poll() is None:
            return second
        assert second.process.returncode == 2, second.stderr
        assert "is already running: process" in second.stderr
