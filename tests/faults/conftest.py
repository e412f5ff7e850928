"""What all fault tests share: the two forms of the suite, and the figures that each test counts."""

from __future__ import annotations

import os
import platform
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import pytest
from chaos import Finished, Swarm, swarms

_T = TypeVar("_T")
_BEGIN = "<!-- figures: begin -->"
_END = "<!-- figures: end -->"
_FIGURE = "figure"
_NOLOAD = "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"  # MLflow's own use of SQLAlchemy


def pytest_addoption(parser: pytest.Parser) -> None:
    """The long form, and where its figures go."""
    group = parser.getgroup("faults", "the fault suite (tests/faults)")
    group.addoption(
        "--long",
        action="store_true",
        default=False,
        help="hundreds of kills; takes three quarters of an hour",
    )
    group.addoption("--figures", type=Path, help="write the table of figures into this document")
    group.addoption("--fault-seed", type=int, default=20261123, help="of all random instants")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long form's tests may take long."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(_NOLOAD))
            if config.getoption("long", False):
                item.add_marker(pytest.mark.timeout(7200))


class Figures:
    """What a test has counted: ``figures(kills=100, lost=0)``; shown at the end, in the order of the calls."""

    def __init__(self, request: pytest.FixtureRequest, name: str) -> None:
        self._properties = request.node.user_properties
        self._name = name

    def __call__(self, **counted: float | str) -> None:
        """Add figures; ``_`` in a name is a space."""
        for key, value in counted.items():
            self._properties.append((_FIGURE, (self._name, key.replace("_", " "), value)))


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """Takes the figures of a test."""
    return Figures(request, request.node.name.removeprefix("test_").replace("_", " "))


@pytest.fixture
def size(request: pytest.FixtureRequest) -> Callable[[_T, _T], _T]:
    """``size(short, long)``: the one of the form that runs."""
    long = request.config.getoption("long", False)
    return lambda short, longer: longer if long else short


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random instants that are the same in each run."""
    seed = f"{request.config.getoption('fault_seed', 20261123)} {request.node.name}"
    print(f"seed of the random instants: {seed!r}")
    return random.Random(seed)


@pytest.fixture
def make_swarm(tmp_path: Path, empty_store: Path) -> Iterator[Callable[..., Swarm]]:
    """Makes sweeps of trials that leave a trace of each execution."""
    yield from swarms(tmp_path, empty_store)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Callable[[int], Finished]:
    """What an undisturbed sweep of so many trials ends with; run once a session."""
    known: dict[int, Finished] = {}

    def result(trials: int) -> Finished:
        if trials not in known:
            for swarm in _one_swarm(tmp_path_factory.mktemp("undisturbed"), empty_store, trials):
                command = swarm.start()
                assert command.wait(600) == 0, command.stderr
                known[trials] = swarm.finished()
        return known[trials]

    return result


def _one_swarm(folder: Path, store: Path, trials: int) -> Iterator[Swarm]:
    for make in swarms(folder, store):
        yield make(trials)


# --- the table -----------------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the figures, and write them into the document."""
    rows = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                found = [value for key, value in report.user_properties if key == _FIGURE]
                rows += [(*each, report.outcome) for each in found]
    if not rows:
        return
    text = "\n".join([*_HEAD, *_lines(rows).values()])
    terminalreporter.section("figures of the fault suite")
    terminalreporter.write_line(text)
    document: Path | None = config.getoption("figures", None)
    if document is not None:
        _write(document, rows, long=bool(config.getoption("long", False)))
        terminalreporter.write_line(f"written to {document}")


_HEAD = ("| what was done | counted | result | date, commit, machine |", "| --- | --- | --- | --- |")


def _lines(rows: list[tuple[str, str, object, str]]) -> dict[str, str]:
    """The line of each test, by its name."""
    run = f"{datetime.now(UTC):%Y-%m-%d}, {_commit()}, {_machine()}"
    tests: dict[str, tuple[list[str], str]] = {}
    for test, name, value, outcome in rows:
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        tests.setdefault(test, ([], outcome))[0].append(f"{shown} {name}")
    return {
        test: f"| {test} | {', '.join(counted)} | {outcome} | {run} |"
        for test, (counted, outcome) in tests.items()
    }


def _write(document: Path, rows: list[tuple[str, str, object, str]], *, long: bool) -> None:
    """Replace the lines of the tests that ran; a test that did not run keeps its own."""
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    old, end, after = rest.partition(_END)
    if not begin or not end:
        raise pytest.UsageError(f"{document}: it has no lines {_BEGIN} and {_END}")
    known = {
        line.split(" | ")[0].removeprefix("| "): line for line in old.splitlines() if line.startswith("| ")
    }
    rows_before = {test: line for test, line in known.items() if test not in ("what was done", "---")}
    lines = rows_before | _lines(rows)
    facts = [
        f"- Python: {platform.python_version()} ({platform.python_implementation()})",
        f"- command: `{shlex.join(['python', '-m', 'pytest', *sys.argv[1:]])}` ({'long' if long else 'short'} form)",
    ]
    block = "\n".join([_BEGIN, "", *facts, "", *_HEAD, *(lines[test] for test in sorted(lines)), "", _END])
    document.write_text(before + block + after, encoding="utf-8")


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    models = [
        line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model = models[0] if models else platform.machine()
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}"


def _commit() -> str:
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"
