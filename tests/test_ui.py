"""``repro-sweep ui``: MLflow's own pages, opened at a sweep, and what a browser shows of it there."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import CONSOLE_SCRIPT, environment, eventually, free_port
from test_report import fill
from tracking_helpers import drain, make_ledger, runs_of

from repro_sweep.cli import main as cli
from repro_sweep.cli import ui
from repro_sweep.reporting import FILE_NAME, write_report
from repro_sweep.states import Direction
from repro_sweep.tracking.pages import artifact_page, children_page, run_page

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"  # MLflow's own use of SQLAlchemy
)
CHROMIUM = Path("/usr/bin/chromium")
_TRIES = 4
"""The browser's clock runs ahead of a busy machine: it may give up before the server has answered."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> str:
    """A store with a finished grid and its report."""
    folder = tmp_path_factory.mktemp("ui")
    shutil.copy(empty_store, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    with contextlib.closing(make_ledger(folder / "multirun" / "grid", uri)) as ledger:
        fill(ledger, 12)
        write_report(ledger, ledger.path.parent)
    drain(folder / "multirun" / "grid")
    return uri


class Tables(HTMLParser):
    """The rows of all tables of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"} and self.rows:
            self.rows[-1].append("")
        self._cell = tag in {"td", "th"} or (self._cell and tag not in {"tr", "table"})

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in {"td", "th"}

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data


def seen(address: str, profile: Path, until: str) -> str:
    """The page as a browser has it when it has this text, which it gets from scripts and from the server."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}", "--virtual-time-budget=30000", "--window-size=1800,1200", "--dump-dom", address,
    ]  # fmt: skip
    for _ in range(_TRIES):
        page = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout
        if until in page:
            return page
    raise AssertionError(f"{until} is not in {page}")


@contextlib.contextmanager
def served(uri: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """The command on a local store, when it has printed its addresses."""
    command = [CONSOLE_SCRIPT, "ui", "grid", "--uri", uri, "--no-browser", *arguments]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline().split("  ") for _ in range(2)]
        yield process, {line[0].strip(): line[-1].strip() for line in lines}
    finally:
        process.terminate()  # not killed: it has a server to stop
        process.wait(60)
        process.stdout.close()


def children_of(pid: int) -> list[int]:
    """All processes below one."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in map(int, listed) for each in (child, *children_of(child))]


# --- the addresses ---------------------------------------------------------------------------------------------


def test_addresses_are_those_of_mlflows_pages_for_training() -> None:
    assert run_page("7", "ab") == "#/experiments/7/runs/ab?workflowType=machine_learning"
    assert artifact_page("7", "ab", "a b/c.html").startswith(
        "#/experiments/7/runs/ab/artifacts/a%20b/c.html?"
    )
    best = children_page("7", "ab", "val|acc", Direction.MAXIMIZE)
    assert "searchFilter=tags.%60mlflow.parentRunId%60%20%3D%20%27ab%27" in best
    assert re.search(r"orderByKey=metrics.%60val_acc-[0-9a-f]{8}%60&orderByAsc=false", best)
    assert "orderByAsc=true" in children_page("7", "ab", "loss", Direction.MINIMIZE)
    assert "orderByKey=tags.%60mlflow.runName%60" in children_page("7", "ab", None, Direction.MAXIMIZE)


# --- the command -----------------------------------------------------------------------------------------------


def test_an_unknown_sweep_is_one_line_with_what_was_meant(
    store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._dispatch("ui", ["ui", "gird", "--uri", store]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"repro-sweep: no sweep named 'gird' at {store}: did you mean grid?\n"


def test_a_port_that_is_taken_is_one_line_before_anything_starts(
    store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert cli._dispatch("ui", ["ui", "grid", "--uri", store, "--port", port, "--no-browser"]) == 2
    said = capsys.readouterr()
    assert f"--port {port}: Address already in use; without it, any free port is taken" in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("environ", "flags", "opened"),
    [({"DISPLAY": ":0"}, [], 1), ({"DISPLAY": ":0"}, ["--no-browser"], 0), ({}, [], 0)],
    ids=["a desktop", "not wanted", "a terminal alone"],
)
def test_a_browser_with_windows_is_opened_unless_it_is_not_wanted(
    store: str, environ: dict[str, str], flags: list[str], opened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ui.webbrowser, "open", found.append)
    ui._show("http://x:1", [("the sweep", "#/a"), ("its trials", "#/b")], browser=not flags)
    assert found == ["http://x:1/#/a"] * opened


@pytest.mark.slow
def test_a_browser_shows_the_leaderboard_in_the_description_and_in_the_report(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    (parent,) = runs_of(store, sweep=True)
    with served(store, "--port", str(port)) as (process, pages):
        address = f"http://127.0.0.1:{port}"
        page = run_page(parent.info.experiment_id, parent.info.run_id)
        assert pages["the sweep"] == f"{address}/{page}"
        # of a server, the addresses are all: nothing is started
        assert ui.main(["grid", "--uri", address, "--no-browser"]) == 0
        printed = capsys.readouterr().out.split()
        assert [word for word in printed if word.startswith("http")] == [
            pages["the sweep"],
            pages["its trials"],
        ]

        run = seen(pages["the sweep"], tmp_path / "a", FILE_NAME)
        rows = [[" ".join(cell.split()) for cell in row] for row in Tables(run).rows]
        assert ["#", "accuracy", "n", "optimizer", "lr", "momentum", "beta1", "trials"] in rows
        assert ["1", "0.6005 ± 0.0007", "2", "Adam", "0.01", "", "0.911", "22, 23"] in rows
        assert "writes this part" not in re.sub(r"<textarea.*?</textarea>", "", run, flags=re.DOTALL)
        link = re.search(rf'href="(#/[^"]*{FILE_NAME}[^"]*)"', run)
        assert link is not None
        seen(f"{address}/{link[1].replace('&amp;', '&')}", tmp_path / "a", 'class="mlflow-html-iframe"')
        below = children_of(process.pid)
        assert below
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), "the server is gone", 10)
    folder = Path(store.removeprefix("sqlite:///")).parent / "multirun" / "grid"
    report = seen((folder / FILE_NAME).as_uri(), tmp_path / "a", 'class="main-svg"')  # plotly has drawn
    assert Tables(report).rows[1] == [
        "1",
        "0.6005 ± 0.0007",
        "2",
        "2 COMPLETE",
        "22, 23",
        "Adam",
        "0.01",
        "",
        "0.911",
    ]
