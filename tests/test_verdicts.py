"""Verdicts on running trials, as the coordinator passes them on from a pruner that may be slow or broken."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from helpers import a_ledger, a_spec
from test_units import OneWorker, claim, finish

from repro_sweep import protocol
from repro_sweep.asking import AskingProcess
from repro_sweep.coordinator import Coordinator
from repro_sweep.errors import SweepError
from repro_sweep.sweep import Chosen

MEDIAN = Chosen(name="median")


class Asker(AskingProcess):
    """A pruner that says of each report what the test wants, when it wants."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.say = asyncio.Event()
        self.heard: list[int] = []
        self.error: SweepError | None = None

    async def report(self, number: int, step: int, value: float) -> bool:
        self.heard.append(step)
        await self.say.wait()
        if self.error is not None:
            raise self.error
        return value < 0


class Warned(Coordinator):
    """Keeps what it would tell the user."""

    warnings: list[str]

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def coordinate(folder: Path, worker: Callable[[Warned, Asker], Coroutine[Any, Any, None]]) -> list[str]:
    """Run a grid that is pruned while ``worker`` reports; returns what the user is told."""
    spec = a_spec(folder, pruner=MEDIAN)
    warnings: list[str] = []

    async def scenario() -> None:
        asker = Asker(folder)
        coordinator = Warned(spec, a_ledger(folder, spec), None, None, asker)
        coordinator.warnings = warnings
        running = asyncio.create_task(coordinator.run(OneWorker()))
        await coordinator.register(protocol.Register(worker="w", host="h", pid=1, slots=1))
        await worker(coordinator, asker)
        coordinator.stop()
        await coordinator.heartbeat(protocol.Heartbeat(worker="w", leaving=True))
        await running
        await coordinator.close()

    asyncio.run(scenario())
    return warnings


def report(step: int, **metrics: float) -> protocol.Reports:
    """What attempt a reports at a step."""
    one = protocol.Report(attempt="a", seq=step, step=step, time=1.0, metrics=metrics)
    return protocol.Reports(worker="w", reports=(one,))


def test_a_verdict_in_time_answers_its_report(tmp_path: Path) -> None:
    async def worker(coordinator: Warned, asker: Asker) -> None:
        asker.say.set()
        await coordinator.claim(claim("a"))
        assert (await coordinator.report(report(0, score=1.0))).prune == ()
        assert (await coordinator.report(report(1, score=-1.0))).prune == ("a",)

    assert coordinate(tmp_path, worker) == []


def test_a_late_verdict_is_told_with_the_next_report_and_makes_only_one_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repro_sweep.verdicts._PATIENCE_S", 0.3)
    monkeypatch.setattr("repro_sweep.verdicts._OVERDUE_S", 0.0)
    waited: list[float] = []

    async def worker(coordinator: Warned, asker: Asker) -> None:
        await coordinator.claim(claim("a"))
        loop = asyncio.get_running_loop()
        for step in range(3):
            began = loop.time()
            assert (await coordinator.report(report(step, score=-1.0))).prune == ()
            waited.append(loop.time() - began)
        asker.say.set()
        await asyncio.sleep(0)
        assert (await coordinator.report(report(3, loss=1.0))).prune == ("a",)
        assert asker.heard == [0, 1, 2]

    assert coordinate(tmp_path, worker) == []
    assert waited[0] >= 0.3 > max(waited[1:])


def test_a_pruner_that_fails_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    async def worker(coordinator: Warned, asker: Asker) -> None:
        asker.error = SweepError("the pruner broke")
        asker.say.set()
        await coordinator.claim(claim("a"))
        for step in range(2):
            assert (await coordinator.report(report(step, score=-1.0))).prune == ()

    assert coordinate(tmp_path, worker) == ["nothing is pruned any more: the pruner broke"]


@pytest.mark.parametrize("metric", ["score", "scroe"])
def test_a_pruner_whose_metric_is_never_reported_is_said_once(tmp_path: Path, metric: str) -> None:
    async def worker(coordinator: Warned, asker: Asker) -> None:
        asker.say.set()
        for attempt in ("a", "b"):
            await coordinator.claim(claim(attempt))
            one = protocol.Report(attempt=attempt, seq=0, step=0, time=1.0, metrics={metric: 1.0})
            await coordinator.report(protocol.Reports(worker="w", reports=(one,)))
            await coordinator.finish(finish(attempt))

    said = (
        "sweep/pruner=median: trial 0 has ended and never reported 'score' (repro_sweep.report),"
        " without which nothing is pruned"
    )
    assert coordinate(tmp_path, worker) == ([] if metric == "score" else [said])


@pytest.mark.parametrize(
    "program",
    ["print('{\"id\": 0, \"ste', end='')", "print('no message')"],
    ids=["dies in the middle of a message", "says what is no message"],
)
def test_a_process_that_speaks_nonsense_fails_the_search_and_lets_nobody_wait(
    tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nonsense.py").write_text(f"import sys\nprint({json.dumps({'ready': 0})!r})\n{program}\n")
    monkeypatch.setattr("repro_sweep.asking._MODULE", "nonsense")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def scenario() -> None:
        asker = AskingProcess(tmp_path)
        await asker.start()
        try:
            with pytest.raises(SweepError, match=r"sweep/sampler: its process (died|failed)"):
                await asyncio.wait_for(asker.ask(0, new=True), 30)
        finally:
            await asker.kill()

    asyncio.run(scenario())
