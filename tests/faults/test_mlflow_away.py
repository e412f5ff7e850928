"""MLflow may be slow, broken or away: no trial waits for it, and in the end it has every point once."""

from __future__ import annotations

import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from chaos import STEPS, Finished, Swarm, wait_at_most
from helpers import eventually, free_port
from tracking_helpers import mlflow_server, proxy_before, shared_server

from repro_sweep.states import TrialState

Size = Callable[[float, float], float]
_PATIENCE_S = 1800.0


def test_a_server_that_loses_replies_refuses_requests_and_goes_away_gets_every_point_once(
    make_swarm: Callable[..., Swarm],
    undisturbed: Callable[[int], Finished],
    rng: random.Random,
    size: Size,
    figures: Callable[..., None],
    pytestconfig: pytest.Config,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Every tenth reply is lost after the work was done, every twentieth request refused, and then all of them are."""
    trials, outage_s, pause_s = int(size(30, 300)), size(3, 360), size(0.08, 0.8)
    server = shared_server(pytestconfig, tmp_path_factory)
    counted: Counter[str] = Counter()
    lock = threading.Lock()
    out = threading.Event()
    kinds = ("replies lost", "answered 429 or 500", "refused in the outage")

    def spoil(_method: str, _path: str) -> int | str | None:
        with lock:
            number = rng.random()
            counted["requests"] += 1
            if out.is_set():
                counted["refused in the outage"] += 1
                return 503
            if number < 0.10:
                counted["replies lost"] += 1
                return "drop"
            if number < 0.15:
                counted["answered 429 or 500"] += 1
                return 429 if number < 0.125 else 500
            return None

    with proxy_before(server) as proxy:
        proxy.spoil = spoil
        swarm = make_swarm(trials, f"sweep.tracking.uri={proxy.uri}", pause_s=pause_s, sweep="spoilt")
        with swarm.start() as command:
            eventually(lambda: swarm.count("end") >= trials // 4, "some trials end", timeout_s=_PATIENCE_S)
            swarm.hold("all")  # trials may be faster than the tracker's start
            eventually(lambda: counted["requests"] > 0, "the server is asked", timeout_s=_PATIENCE_S)
            swarm.release()
            began = time.time()
            out.set()
            assert not wait_at_most(outage_s, lambda: command.process.poll() is not None), command.stderr
            ended = time.time()
            eventually(
                lambda: counted["refused in the outage"] > 0, "it is asked in vain", timeout_s=_PATIENCE_S
            )
            out.clear()
            eventually(partial(_all_complete, swarm), "all trials end", timeout_s=_PATIENCE_S)
            eventually(
                lambda: all(counted[each] for each in kinds) or command.process.poll() is not None,
                "the server was as bad as it is to be",
                timeout_s=_PATIENCE_S,
            )
            if not wait_at_most(size(8, 900), lambda: command.process.poll() is not None):
                command.process.send_signal(signal.SIGINT)
            assert command.wait(60) in {0, 130}, command.stderr
        proxy.spoil = lambda _method, _path: None
        lacked = "MLflow lacks" in command.stdout
        with swarm.command("sync", str(swarm.directory)) as sync:
            assert sync.wait(300) == 0, sync.stderr
    attempts = swarm.sweep.attempts
    during = [each.ended_at - each.started_at for each in attempts if began < each.started_at < ended]
    around = [each.ended_at - each.started_at for each in attempts if not began < each.started_at < ended]
    verdict = swarm.verdict(undisturbed(trials), uri=server)
    figures(
        **{key.replace(" ", "_"): value for key, value in counted.items()},
        outage_s=outage_s,
        ends_with_something_left_for_sync=int(lacked),
        failed_trials=sum(each.state is TrialState.FAIL for each in attempts),
        **{"s a trial (median) in the outage": statistics.median(during)},
        **{"s a trial (median) outside of it": statistics.median(around)},
        **verdict.counted,
    )
    assert all(counted[each] > 0 for each in kinds), counted
    assert verdict.wrong == {}, verdict.remarks
    assert verdict.executions == verdict.attempts == trials
    assert len(during) >= min(10, outage_s / (STEPS * pause_s))
    assert statistics.median(during) < 2 * statistics.median(around) + 0.5, "MLflow is on the trials' path"


def test_a_server_that_is_down_at_the_start_and_at_the_end_gets_everything_in_the_end(
    make_swarm: Callable[..., Swarm],
    undisturbed: Callable[[int], Finished],
    size: Size,
    figures: Callable[..., None],
    tmp_path: Path,
) -> None:
    """The summary says what MLflow lacks; ``repro-sweep sync`` brings it there."""
    port = free_port()
    trials = int(size(30, 60))
    swarm = make_swarm(trials, f"sweep.tracking.uri=http://127.0.0.1:{port}", pause_s=0.02, sweep="away")
    with ExitStack() as stack, swarm.start() as command:
        command.until(lambda: swarm.count("end") >= trials // 3, "trials run without a server")
        swarm.hold("all")
        server = stack.enter_context(mlflow_server(tmp_path / "server", port))
        command.until(lambda: _runs(server), "the server gets what there is")
        stack.close()
        swarm.release()
        eventually(
            lambda: swarm.sweep.states()[TrialState.COMPLETE] == trials, "all trials end without a server"
        )
        if size(1, 0):
            command.until(lambda: "MLflow" in command.stderr.splitlines()[-1], "it waits for MLflow")
            command.process.send_signal(signal.SIGINT)
        code = command.wait(300)
    said = command.stdout
    with mlflow_server(tmp_path / "server", port) as server:
        with swarm.command("sync", str(swarm.directory)) as sync:
            synced = sync.wait(300)
        verdict = swarm.verdict(undisturbed(trials), uri=server)
    figures(outages=2, **verdict.counted)
    assert code == (130 if size(1, 0) else 0), command.stderr
    assert "MLflow lacks" in said
    assert f"(http://127.0.0.1:{port}" in said
    assert synced == 0, sync.stderr
    assert verdict.wrong == {}, verdict.remarks
    assert verdict.executions == trials


def _all_complete(swarm: Swarm) -> bool:
    return swarm.sweep.states()[TrialState.COMPLETE] == swarm.trials


def _runs(uri: str) -> int:
    from tracking_helpers import runs_of

    return len(runs_of(uri))
