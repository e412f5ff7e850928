"""The project's own backends pass the suites that it ships for others'."""

from __future__ import annotations

from repro_sweep.config.space import Space
from repro_sweep.executors.base import Context, Executor
from repro_sweep.executors.local import LocalExecutor, Options
from repro_sweep.search.base import Searcher
from repro_sweep.search.grid import GridSearcher
from repro_sweep.sweep import SweepSpec
from repro_sweep.testing.executors import ExecutorConformance
from repro_sweep.testing.searchers import SearcherConformance


class TestLocalExecutor(ExecutorConformance):
    def create(self, spec: SweepSpec, socket: str) -> Executor:
        return LocalExecutor(Context(spec=spec, socket=socket), Options(slots=2))


class TestGrid(SearcherConformance):
    def create(self) -> Searcher:
        return GridSearcher(Space(params={"lr": "0.1,0.01", "model": "a,b"}))
