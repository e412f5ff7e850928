"""A crowd of workers at one coordinator: each trial once, memory that does not grow, and nobody woken for nothing."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from pathlib import Path

import pytest
from helpers import a_ledger, a_spec

from benchmarks import coordinator_load
from benchmarks.harness import BenchmarkError
from repro_sweep import protocol
from repro_sweep.coordinator import Coordinator
from repro_sweep.ledger import Ledger
from repro_sweep.states import TrialState
from repro_sweep.waiters import Waiters


def claim(
    attempt: str, *, worker: str = "w", slot: int = 0, finished: protocol.Finish | None = None
) -> protocol.Claim:
    """A claim."""
    return protocol.Claim(worker=worker, slot=slot, attempt=attempt, wait_s=30.0, finished=finished)


def finish(attempt: str) -> protocol.Finish:
    """A good end."""
    return protocol.Finish(
        worker="w", attempt=attempt, state=TrialState.COMPLETE, metrics={"score": 1.0}, ended_at=2.0
    )


@pytest.mark.parametrize(("tcp", "apart"), [(False, False), (True, True)])
def test_two_hundred_workers_get_each_of_3000_trials_once_and_end_it_once(
    tcp: bool, apart: bool, tmp_path: Path
) -> None:
    """And what the coordinator holds does not grow with the trials that are done."""
    folder = tmp_path / "sweep"
    run = coordinator_load.crowd(folder, trials=3000, workers=200, tcp=tcp, apart=apart)
    assert len(run.claim_s) == 3000
    assert run.growth_mb < 8.0
    ledger = Ledger.open(folder, readonly=True)
    attempts = ledger.attempts()
    assert ledger.counts()[TrialState.COMPLETE] == 3000
    ledger.close()
    assert Counter(attempt.trial for attempt in attempts) == dict.fromkeys(range(3000), 1)
    assert {attempt.state for attempt in attempts} == {TrialState.COMPLETE}
    assert len({attempt.worker for attempt in attempts}) == 200


@pytest.mark.parametrize(
    ("given", "refused", "why"),
    [
        ([0, 1, 2], 0, "the ledger has 0 complete trials"),
        ([0, 1, 1], 0, "3 trials were handed out 3 times, 2 of them"),
        ([0, 1], 0, "3 trials were handed out 2 times"),
        ([0, 1, 2], 1, "a worker had an error"),
    ],
)
def test_a_trial_that_is_lost_or_doubled_is_no_result(
    given: list[int], refused: int, why: str, tmp_path: Path
) -> None:
    a_ledger(tmp_path).close()
    (tmp_path / "output.txt").touch()
    with pytest.raises(BenchmarkError, match=why):
        coordinator_load._check(tmp_path, [{"trials": given, "errors": [], "refused": refused}], 3)


def test_neither_a_trial_nor_the_taking_of_a_result_is_told_before_it_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = a_spec(tmp_path)
    ledger = a_ledger(tmp_path, spec)
    commit, go_on, committing = ledger.commit, threading.Event(), threading.Event()

    def slow_commit() -> None:
        committing.set()
        assert go_on.wait(60)
        commit()

    async def scenario() -> None:
        coordinator = Coordinator(spec, ledger, None)
        await coordinator.register(protocol.Register(worker="w", host="h", pid=1, slots=2))
        first = (await coordinator.claim(claim("a"))).assignment
        assert first is not None
        monkeypatch.setattr(ledger, "commit", slow_commit)
        both = asyncio.create_task(coordinator.claim(claim("b", finished=finish("a"))))
        await asyncio.to_thread(committing.wait, 60)
        result = asyncio.create_task(coordinator.finish(finish("a")))
        again = asyncio.create_task(coordinator.claim(claim("b")))
        await asyncio.sleep(0.1)
        assert not any(each.done() for each in (both, result, again))
        seen = Ledger.open(tmp_path, readonly=True)
        assert seen.counts()[TrialState.COMPLETE] == 0
        go_on.set()
        second = (await both).assignment
        assert second is not None
        assert (await again).assignment == second
        assert not (await result).refused
        assert (seen.counts()[TrialState.COMPLETE], len(seen.attempts())) == (1, 2)
        seen.close()
        await coordinator.close()

    asyncio.run(scenario())


def test_claims_that_wait_are_woken_one_for_each_trial_in_their_order() -> None:
    async def scenario() -> list[str]:
        waiters, woken = Waiters(), list[str]()

        async def wait(message: protocol.Claim) -> None:
            await waiters.wait(message, 60.0)
            woken.append(message.attempt)

        claims = [claim(name, worker=worker) for name, worker in ("au", "bv", "cv", "bv", "dv")]
        tasks = [asyncio.create_task(wait(each)) for each in claims]
        await asyncio.sleep(0)
        waiters.wake(2, lambda each: each.worker == "v")  # nobody hears of worker u any more
        await asyncio.sleep(0.01)
        assert sorted(woken) == ["b", "b", "c"]  # a claim that was repeated has one answer
        assert len(waiters) == 2
        waiters.wake_all()
        await asyncio.gather(*tasks)
        assert len(waiters) == 0
        return woken[3:]

    assert asyncio.run(scenario()) == ["a", "d"]


def test_a_claim_waits_no_longer_than_it_wants_and_leaves_nothing_behind() -> None:
    async def scenario() -> int:
        waiters = Waiters()
        await waiters.wait(claim("a"), 0.01)
        given_up = asyncio.create_task(waiters.wait(claim("b"), 60.0))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        return len(waiters)

    assert asyncio.run(scenario()) == 0


def test_ends_of_trials_wake_no_claim_for_which_there_is_none_and_the_last_one_wakes_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand slots that wait for the last thousand trials would look a million times."""
    spec = a_spec(tmp_path)
    ledger = a_ledger(tmp_path, spec)
    looks = Counter[str]()
    wait = Waiters.wait

    async def counted(self: Waiters, message: protocol.Claim, timeout_s: float) -> None:
        looks[message.attempt] += 1
        await wait(self, message, 60.0)  # instead of once a second

    monkeypatch.setattr(Waiters, "wait", counted)

    async def scenario() -> None:
        coordinator = Coordinator(spec, ledger, None)
        await coordinator.register(protocol.Register(worker="w", host="h", pid=1, slots=4))
        for name in "abc":
            await coordinator.claim(claim(name))
        idle = asyncio.create_task(coordinator.claim(claim("idle", slot=3)))
        for name in "abc":
            await coordinator.finish(finish(name))
            assert looks == {"idle": 1}
        assert await idle == protocol.Claimed(over=True)
        await coordinator.close()

    asyncio.run(scenario())
