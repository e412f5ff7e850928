"""Fixtures that several test modules use."""

from __future__ import annotations

import compileall
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import MakeProject, environment, projects

import repro_sweep

_MAKE_STORE = """
import sys
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
SqlAlchemyStore("sqlite:///" + sys.argv[1], sys.argv[2])
"""
_PACKAGE = Path(repro_sweep.__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """Compile the package once: the thousands of processes that the tests start are told to write nothing beside it."""
    if not hasattr(config, "workerinput"):  # not in each of xdist's workers
        compileall.compile_dir(_PACKAGE, quiet=2)


_CLUSTERS = ("test_slurm", "test_ray", "test_docker")
_LONG = (
    "test_killed", "test_mlflow_away", "test_full_disk", "test_searches", "test_reproduce", "test_export",
    "test_main_job", "test_team", "test_tracking", "test_reuse", "test_venv", "test_optuna_sweeper",
    "test_mlflow_inside", "test_pruned_trials", "test_retries", "test_link", "test_one_coordinator",
    "test_search_options", "test_testbed", "test_ui", "test_commands", "test_interrupt", "test_front_door",
    "test_benchmarks", "test_study_again", "test_digits",
)  # fmt: skip
"""Files with minutes of work begin first, so that no worker is left with one of them when the others have ended."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What begins first. Tests of clusters and containers, whose daemons have deadlines, may be run once more."""

    def rank(item: pytest.Item) -> int:
        return next(
            (order for order, name in enumerate(_LONG) if item.path.stem.startswith(name)), len(_LONG)
        )

    for item in items:
        if item.path.stem.startswith(_CLUSTERS):
            item.add_marker(pytest.mark.flaky(reruns=1))
    items.sort(key=rank)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store with nothing in it: making its tables takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("store")
    path = folder / "mlflow.db"
    command = [sys.executable, "-W", "ignore", "-c", _MAKE_STORE, str(path), str(folder / "mlartifacts")]
    subprocess.run(command, env=environment(), check=True, timeout=120, capture_output=True)
    return path


@pytest.fixture
def make_project(tmp_path: Path, empty_store: Path) -> Iterator[MakeProject]:
    """Makes small projects from ``{path: text}``."""
    yield from projects(tmp_path, empty_store)


@pytest.fixture(scope="module")
def make_shared_project(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[MakeProject]:
    """The same for projects that the tests of a module share."""
    yield from projects(tmp_path_factory.mktemp("projects"), empty_store)


@pytest.fixture
def make_bare_project(tmp_path: Path) -> Iterator[MakeProject]:
    """The same without an MLflow store."""
    yield from projects(tmp_path, None)
