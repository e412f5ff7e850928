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
