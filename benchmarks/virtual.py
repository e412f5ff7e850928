"""Searches whose trials take no real time: slots are simulated, in the time of an event loop that never waits.

What asks, and when, is the product's own: the coordinator's half of a search (``searching``), the other half
(``suggesting``), the space and the sampler. Simulated are the trials, the slots, the ledger and what lies between the
processes. Nothing here takes part in what is measured elsewhere.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import selectors
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import optuna

from repro_sweep.asking import Asked
from repro_sweep.config.space import Space
from repro_sweep.points import Point
from repro_sweep.records import NewTrial
from repro_sweep.search.study import OptunaSearch
from repro_sweep.searching import Searching
from repro_sweep.states import Direction, StepKind, TrialState
from repro_sweep.suggesting import Suggester
from repro_sweep.sweep import (
    Budget,
    Chosen,
    Composition,
    Origin,
    Resources,
    SearchSpec,
    SpaceSpec,
    SweepSpec,
    TaskSpec,
    Tracking,
)

_T = TypeVar("_T")
_METRIC = "value"

Evaluate = Callable[[Mapping[str, Any]], float]
"""The value of a point, by its params."""


class StuckError(Exception):
    """Everything waits, and nothing is left that could end it."""


def ours(
    params: Mapping[str, object],
    evaluate: Evaluate,
    durations_s: Sequence[float],
    *,
    slots: int,
    seed: int,
    options: Mapping[str, object],
) -> list[float]:
    """Search with TPE as a sweep does; returns the values of the trials in the order of their ends.

    Args:
        params: as in ``sweep.params``.
        evaluate: is made smaller.
        durations_s: of each trial, by its number; there are as many trials.
        slots: so many run at once.
        seed: of the search.
        options: of the sampler.
    """
    spec = _spec(params, len(durations_s), seed, options)
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(_Sweep(spec, evaluate, durations_s, slots).run())
    finally:
        loop.close()


def asked_and_told(
    study: optuna.Study,
    suggest: Callable[[optuna.Trial], Mapping[str, Any]],
    evaluate: Evaluate,
    durations_s: Sequence[float],
    *,
    slots: int,
) -> list[float]:
    """The same slots under Optuna's own ``ask`` and ``tell``: a slot asks when it is free, and not before."""
    running: list[tuple[float, int, optuna.Trial, float]] = []
    values: list[float] = []
    now = 0.0
    for number, duration_s in enumerate(durations_s):
        if number >= slots:
            now = _tell_next(study, running, values)
        trial = study.ask()
        heapq.heappush(running, (now + duration_s, number, trial, evaluate(suggest(trial))))
    while running:
        _tell_next(study, running, values)
    return values


def _tell_next(
    study: optuna.Study, running: list[tuple[float, int, optuna.Trial, float]], values: list[float]
) -> float:
    now, _, trial, value = heapq.heappop(running)
    study.tell(trial, value)
    values.append(value)
    return now


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next thing that is due; the time is 0 s at first."""

    def __init__(self) -> None:
        self._skipping = _Skipping()
        super().__init__(self._skipping)

    def time(self) -> float:
        """Seconds since the loop was made, none of which has passed."""
        return self._skipping.now


class _Skipping(selectors.SelectSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise StuckError("nothing is left to happen")
        self.now += max(0.0, timeout)
        return super().select(0)


class _Sweep:
    """The coordinator, as far as a search sees it (``searching.Desk``), with its slots and trials."""

    def __init__(self, spec: SweepSpec, evaluate: Evaluate, durations_s: Sequence[float], slots: int) -> None:
        self._evaluate = evaluate
        self._durations_s = durations_s
        self._slots = slots
        self._ledger = _Memory()
        self._asker = _Asker(spec)
        self._search = Searching(spec, self._ledger, self._asker, self, self._write)
        self._waiting: deque[int] = deque()
        self._running: set[int] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._values: list[float] = []

    async def run(self) -> list[float]:
        """Run the search to its end."""
        await self._search.run()
        while self._ending:
            await asyncio.wait(self._ending)
        return self._values

    def free_slots(self) -> int:
        return self._slots - len(self._running) - len(self._waiting)

    def slot_count(self) -> int:
        return self._slots

    def may_ask(self) -> bool:
        return True

    def is_idle(self) -> bool:
        return not (self._running or self._waiting)

    def has_begun_all(self) -> bool:
        return not self._waiting

    def add_trials(self, numbers: Sequence[int]) -> None:
        self._waiting.extend(numbers)
        self._hand_out()

    def withdraw(self) -> list[int]:
        withdrawn = list(self._waiting)
        self._waiting.clear()
        return withdrawn

    async def _write(self, change: Callable[[Any], _T]) -> _T:
        return change(self._ledger)

    def _hand_out(self) -> None:
        while self._waiting and len(self._running) < self._slots:
            number = self._waiting.popleft()
            self._running.add(number)
            task = asyncio.get_running_loop().create_task(self._run(number))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _run(self, number: int) -> None:
        await asyncio.sleep(self._durations_s[number])
        value = self._evaluate(self._ledger.params[number])
        await self._search.settle()
        metrics = {_METRIC: value}
        step = self._ledger.add_step(StepKind.TELL, {"trial": number})
        self._search.told(step, number, TrialState.COMPLETE, metrics)
        self._values.append(value)
        self._running.discard(number)
        self._hand_out()
        self._search.wake()


class _Asker:
    """The process that has the sampler (``asking.AskingProcess``), without a process."""

    def __init__(self, spec: SweepSpec) -> None:
        assert spec.search is not None
        space = Space(params=spec.search.space.params, search=True)
        self._suggester = Suggester(spec, OptunaSearch(space, spec, pruner=None), None, _make)

    async def ask(self, number: int, *, new: bool) -> Asked:
        answer = self._suggester.ask(number, new=new)
        if answer.error is not None:
            raise AssertionError(answer.error)
        return Asked(steps=answer.steps, trials=answer.trials, again=answer.again, over=answer.over)

    def tell(self, seq: int, number: int, state: TrialState, metrics: Mapping[str, float]) -> None:
        self._suggester.tell(seq, number, state, metrics)


class _Memory:
    """What a search reads and writes of a ledger that is new."""

    def __init__(self) -> None:
        self.params: dict[int, Mapping[str, object]] = {}
        self.search_over: str | None = None
        self.withdrawn: list[int] = []
        self.search_hours = 0.0
        self._seq = 0

    def next_number(self) -> int:
        return 0

    def ended_before_search(self) -> dict[int, Any]:
        return {}

    def steps(self) -> list[Any]:
        return []

    def add_trials(self, trials: Sequence[NewTrial]) -> None:
        self.params |= {trial.number: trial.params for trial in trials}

    def add_step(self, kind: StepKind, data: Mapping[str, Any]) -> int:
        del kind, data
        self._seq += 1
        return self._seq

    def set_search_hours(self, hours: float) -> None:
        self.search_hours = hours

    def set_search_over(self, why: str | None) -> None:
        self.search_over = why

    def set_withdrawn(self, numbers: Sequence[int]) -> None:
        self.withdrawn = list(numbers)


def _make(point: Point, number: int) -> NewTrial:
    """A trial of a task that needs no config."""
    return NewTrial(
        number=number, identity=json.dumps(point.params, sort_keys=True), directory=f"trials/{number}",
        overrides=point.overrides, params=point.params, repeat=point.repeat, config="",
    )  # fmt: skip


def _spec(params: Mapping[str, object], trials: int, seed: int, options: Mapping[str, object]) -> SweepSpec:
    return SweepSpec(
        sweep_id="virtual", name="virtual", directory="/nowhere",
        task=TaskSpec(module="benchmarks", qualname="task", cwd="/"),
        composition=Composition(
            config_name=None, search_path=(), hydra_overrides=(), job_name="virtual", version_base="1.3"
        ),
        resources=Resources(), tracking=Tracking(uri="", experiment=""), origin=Origin(user="", host="", command=""),
        metric=_METRIC, direction=Direction.MINIMIZE, executor_name="local", executor={}, sampler="tpe",
        max_failures=None, log_limit_mb=1.0, created_at=0.0,
        search=SearchSpec(
            sampler=Chosen(name="tpe", options=dict(options)), seed=seed, space=SpaceSpec(params=dict(params)),
            budget=Budget(trials=trials),
        ),
    )  # fmt: skip
