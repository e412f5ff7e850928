"""What every executor must do, shown with real workers, a real coordinator and a task of one line."""

from __future__ import annotations

import asyncio
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from repro_sweep.config.identity import identity
from repro_sweep.coordinator import Coordinator
from repro_sweep.executors.base import Executor, WorkerState
from repro_sweep.lease import Lease
from repro_sweep.ledger import Ledger
from repro_sweep.records import NewTrial, now
from repro_sweep.server import Server
from repro_sweep.states import Direction, TrialState
from repro_sweep.sweep import Composition, Origin, Resources, SweepSpec, TaskSpec, Tracking

_TASK = "def train(cfg):\n    return float(cfg.x)\n"
_PATIENCE_S = 60.0


class ExecutorConformance(ABC):
    """Subclass it as ``class TestMine(ExecutorConformance)``."""

    host: ClassVar[str | None] = None
    """Where the coordinator listens for workers on other machines (see ``server.Server``); None: there are none."""

    @abstractmethod
    def create(self, spec: SweepSpec, socket: str) -> Executor:
        """A fresh executor for this sweep, whose coordinator listens at ``socket``."""

    def test_it_wants_no_worker_without_work_and_one_at_least_with_some(self, tmp_path: Path) -> None:
        executor = self.create(sweep(tmp_path), "")
        try:
            assert executor.wanted(0) == 0
            assert executor.wanted(1) >= 1
            assert executor.wanted(1000) >= executor.wanted(1)
            assert executor.describe()
        finally:
            executor.close(timeout_s=5.0)

    def test_its_workers_run_all_trials_and_then_end(self, tmp_path: Path) -> None:
        spec = sweep(tmp_path)
        ledger = Ledger.create(tmp_path, spec)
        ledger.add_trials(_trial(number) for number in range(8))
        ledger.commit()
        states: dict[str, WorkerState] = {}

        async def run() -> None:
            lease = Lease.acquire(ledger, spec.name)
            coordinator = Coordinator(spec, ledger, None, lease)
            server = Server(coordinator, self.host)
            await server.start()
            lease.announce(server.path, server.tcp, server.token)
            executor = self.create(spec, server.path)
            await coordinator.run(executor)
            states.update({worker: status.state for worker, status in executor.poll().items()})
            await server.stop()
            await coordinator.close()

        asyncio.run(run())
        recorded = Ledger.open(tmp_path, readonly=True)
        counts, attempts = recorded.counts(), recorded.attempts()
        recorded.close()
        assert counts[TrialState.COMPLETE] == 8
        found = {attempt.trial: attempt.metrics for attempt in attempts}
        assert found == {number: {"x": float(number)} for number in range(8)}
        assert len(attempts) == 8
        assert states
        assert set(states.values()) == {WorkerState.ENDED}

    def test_a_worker_that_is_stopped_ends_and_is_said_to_have_ended(self, tmp_path: Path) -> None:
        executor = self.create(sweep(tmp_path), str(tmp_path / "nobody.sock"))
        try:
            (worker,) = executor.start(1)
            assert executor.poll()[worker].state is WorkerState.ALIVE
            executor.stop([worker])
            assert _becomes(lambda: executor.poll()[worker].state is WorkerState.ENDED)
            assert executor.poll()[worker].detail
        finally:
            executor.close(timeout_s=5.0)

    def test_close_leaves_no_worker(self, tmp_path: Path) -> None:
        executor = self.create(sweep(tmp_path), str(tmp_path / "nobody.sock"))
        executor.start(1)
        executor.close(timeout_s=5.0)
        assert {status.state for status in executor.poll().values()} == {WorkerState.ENDED}

    def test_workers_that_an_earlier_coordinator_has_started_are_found_and_can_be_stopped(
        self, tmp_path: Path
    ) -> None:
        spec, nobody = sweep(tmp_path), str(tmp_path / "nobody.sock")
        earlier = self.create(spec, nobody)
        try:
            [one] = earlier.start(1)
            [other] = earlier.start(1)
            later = self.create(spec, nobody)
            assert _becomes(lambda: _alive(later) == {one, other})
            later.stop([one])
            assert _becomes(lambda: _alive(later) == {other})
            assert later.poll()[one].detail
            later.close(timeout_s=5.0)
            assert _alive(later) == set()
            assert _becomes(lambda: _alive(earlier) == set())
            last = self.create(spec, nobody)
            assert _becomes(lambda: _alive(last) == set())
            last.close(timeout_s=5.0)
        finally:
            earlier.close(timeout_s=5.0)


def sweep(directory: Path) -> SweepSpec:
    """The record of a small sweep in ``directory``, whose task returns its ``x``."""
    (directory / "conformance_task.py").write_text(_TASK)
    return SweepSpec(
        sweep_id="conformance",
        name="conformance",
        directory=str(directory),
        task=TaskSpec(
            module="conformance_task",
            qualname="train",
            cwd=str(directory),
            sys_path=(str(directory), *filter(None, sys.path)),
        ),
        composition=Composition(
            config_name=None,
            search_path=(("hydra", "pkg://hydra.conf"), ("schema", "structured://")),
            hydra_overrides=("hydra.mode=MULTIRUN",),
            job_name="conformance",
            version_base="1.3",
        ),
        resources=Resources(),
        tracking=Tracking(uri="sqlite:///:memory:", experiment="conformance"),
        origin=Origin.here("conformance", git_commit=None, git_dirty=None),
        metric="x",
        direction=Direction.MAXIMIZE,
        executor_name="local",
        executor={},
        sampler="grid",
        max_failures=None,
        log_limit_mb=1.0,
        created_at=now(),
    )


def _trial(number: int) -> NewTrial:
    return NewTrial(
        number=number,
        identity=identity("conformance_task.train", {"x": number}),
        directory=f"trials/{number}",
        overrides=(f"+x={number}",),
        params={"x": number},
        repeat={},
        config=f"x: {number}\n",
    )


def _alive(executor: Executor) -> set[str]:
    return {worker for worker, status in executor.poll().items() if status.state is WorkerState.ALIVE}


def _becomes(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
