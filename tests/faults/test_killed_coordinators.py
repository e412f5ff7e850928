"""Whenever a coordinator dies, the next start completes the sweep: nothing is lost, and no trial is executed twice."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable

from chaos import AGENT, SLOTS, TRACKER, Finished, Swarm, end_leftovers, kill, kill_coordinators, wait_at_most
from helpers import Running, eventually

from repro_sweep.failpoints import COORDINATOR, ENVIRONMENT

Size = Callable[[int, int], int]


def test_a_coordinator_killed_at_random_instants(
    make_swarm: Callable[..., Swarm],
    undisturbed: Callable[[int], Finished],
    rng: random.Random,
    size: Size,
    figures: Callable[..., None],
) -> None:
    """Its workers outlive it, so each trial is executed exactly once."""
    trials, kills = size(60, 500), size(8, 100)
    pause_s = 0.03
    expected = undisturbed(trials)
    swarm = make_swarm(trials, pause_s=pause_s)
    swarm.hold(str(trials - 1))
    kill_coordinators(swarm, kills, rng, pause_s=pause_s, start_s=1.5)
    swarm.release()
    with swarm.start() as command:
        assert command.wait(600) == 0, command.stderr
    verdict = swarm.verdict(expected)
    figures(kills=kills, **verdict.counted)
    assert verdict.wrong == {}, verdict.remarks
    assert verdict.executions == trials, "a trial was executed again though its worker was alive"


EARLY = ("lease.before_take", "lease.taken", "record.before_commit", "record.committed", "lease.announced")
LATE = ("sweep.over", "lease.before_release")
KEPT = ("spool.read", "spool.recorded")
WHEN_A_WORKER_LEAVES = ("finish.received", "finish.answering")
WHEN_A_WORKER_STARTS = ("workers.before_start", "workers.started")
ONCE = (*EARLY, *KEPT, *WHEN_A_WORKER_STARTS)


def test_a_coordinator_killed_wherever_it_writes_or_answers(
    make_swarm: Callable[..., Swarm],
    undisturbed: Callable[[int], Finished],
    size: Size,
    figures: Callable[..., None],
) -> None:
    """One sweep dies at all its failpoints, one after the other."""
    trials, counts = size(60, 240), range(1, size(2, 6))
    expected = undisturbed(trials)
    swarm = make_swarm(trials, pause_s=0.07)  # reports are sent each quarter of a second
    last = (*KEPT, *WHEN_A_WORKER_LEAVES)
    between = [name for name in COORDINATOR if name not in (*last, *LATE)] + list(last)
    deaths, stopped = 0, 0
    for count in counts:
        for name in between:
            if count > 1 and (name.startswith(("lease.", "register.")) or name in ONCE):
                continue  # passed once a start
            stopped += _prepare(swarm, name)
            with swarm.start(**{ENVIRONMENT: f"{name}:{count}"}) as command:
                if name in WHEN_A_WORKER_LEAVES:
                    for _ in range(count):  # each of its slots may send a message
                        stopped += _let_a_worker_leave(swarm, command)
                        if wait_at_most(2.0, lambda: command.process.poll() is not None):
                            break
                assert command.wait() == -signal.SIGKILL, f"{name}:{count} is not reached\n{command.stderr}"
            deaths += 1
            end_leftovers(swarm, TRACKER)  # it would go on importing MLflow for seconds
            assert swarm.count("end") < trials, "too few trials to die everywhere"
    for name in LATE:
        with swarm.start(**{ENVIRONMENT: name}) as command:
            assert command.wait(300) == -signal.SIGKILL, f"{name} is not reached\n{command.stderr}"
        deaths += 1
    with swarm.start() as command:
        assert command.wait(300) == 0, command.stderr
    verdict = swarm.verdict(expected)
    figures(failpoints=len(COORDINATOR), kills=deaths, **verdict.counted)
    assert verdict.wrong == {}, verdict.remarks
    assert verdict.executions <= trials + stopped, "a trial was executed again though its worker was alive"


def _prepare(swarm: Swarm, name: str) -> int:
    """Let there be a kept result, or no worker; returns how many executions that cuts off."""
    if name in KEPT:
        swarm.hold("all")
        with swarm.start() as command:
            command.until(lambda: len(swarm.trial_pids()) == SLOTS, "trials run")
            command.process.kill()
        swarm.release()
        eventually(
            lambda: len(swarm.kept_results()) == SLOTS and not swarm.trial_pids(), "both results are kept"
        )
        end_leftovers(swarm, AGENT)  # it would deliver them itself
    elif name in WHEN_A_WORKER_STARTS:
        end_leftovers(swarm, AGENT)
        return swarm.count("start") - swarm.count("end")
    return 0


def _let_a_worker_leave(swarm: Swarm, command: Running) -> int:
    command.until(lambda: len(swarm.trial_pids()) == SLOTS, "trials run")
    for pid in swarm.pids(AGENT):
        kill(pid, signal.SIGTERM)
    return SLOTS
