"""The project's own backends pass the suites that it ships for others'."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from repro_sweep.config.space import Space
from repro_sweep.executors.base import Context, Executor
from repro_sweep.executors.local import LocalExecutor, Options
from repro_sweep.search.base import Search, Searcher
from repro_sweep.search.grid import GridSearcher
from repro_sweep.search.study import OptunaSearch
from repro_sweep.sweep import Budget, Chosen, SearchSpec, SpaceSpec, SweepSpec
from repro_sweep.testing.executors import ExecutorConformance
from repro_sweep.testing.searchers import SearchConformance, SearcherConformance
from tests.helpers import a_spec


class TestLocalExecutor(ExecutorConformance):
    def create(self, spec: SweepSpec, socket: str) -> Executor:
        return LocalExecutor(Context(spec=spec, socket=socket), Options(slots=2))


class TestGrid(SearcherConformance):
    def create(self) -> Searcher:
        return GridSearcher(Space(params={"lr": "0.1,0.01", "model": "a,b"}))


class TestTpe(SearchConformance):
    sampler: ClassVar[Chosen] = Chosen(name="tpe", options={"n_startup_trials": 3})
    params: ClassVar[dict[str, object]] = {
        "optimizer": {"SGD": {"momentum": "interval(0, 0.9)"}, "Adam": {"beta1": "interval(0.8, 0.99)"}},
        "lr": "tag(log, interval(1e-4, 1))",
        "layers": "range(1, 9)",
    }

    def create(self) -> Search:
        search = SearchSpec(sampler=self.sampler, seed=1, space=SpaceSpec(), budget=Budget())
        space = Space(params=self.params, repeats={"seed": "0,1"}, search=True)
        return OptunaSearch(space, a_spec(Path("/nowhere"), search=search), pruner=None)


class TestNsgaii(TestTpe):
    sampler = Chosen(name="nsgaii", options={"population_size": 4})


class TestBruteForce(TestTpe):
    sampler = Chosen(name="bruteforce")
    params: ClassVar[dict[str, object]] = {
        "optimizer": {"SGD": {"momentum": "0,0.5,0.9"}, "Adam": {}},
        "layers": "range(1, 9)",
    }
