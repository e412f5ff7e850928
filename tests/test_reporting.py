"""What MLflow shows of a sweep as a whole: its report while it runs and at its end, and its run's description."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_report import fill, put, searched
from tracking_helpers import add_trial, drain, end, make_ledger, make_spec, run_trial, runs_of, start

from repro_sweep.cli import reporting
from repro_sweep.ledger import Ledger
from repro_sweep.reporting import FILE_NAME
from repro_sweep.standings import ranked_rows
from repro_sweep.states import FailureKind, TrialState
from repro_sweep.sweep import SweepSpec
from repro_sweep.tracking import description
from repro_sweep.tracking import mlflow as tracking
from repro_sweep.tracking.description import NOTE_LIMIT, OWN_LIMIT, TAG, Board, renewed, text_of
from repro_sweep.tracking.mlflow import MlflowTracker

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"  # MLflow's own use of SQLAlchemy
)


@pytest.fixture
def uri(tmp_path: Path, empty_store: Path) -> str:
    """An embedded store of one test's own."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def ledger(tmp_path: Path, uri: str) -> Iterator[Ledger]:
    """The ledger of a grid."""
    made = make_ledger(tmp_path / "multirun" / "grid", uri)
    yield made
    made.close()


def note_in(uri: str) -> str | None:
    """The description of the only sweep in a store."""
    (run,) = runs_of(uri, sweep=True)
    found: str | None = run.data.tags.get(TAG)
    return found


def rows_in(uri: str) -> list[str]:
    """The rows of its table below the head, without what only spaces them."""
    lines = [line for line in (note_in(uri) or "").splitlines() if line.startswith("|")]
    return [line.replace("&emsp;", "").replace("\xa0", " ") for line in lines[2:]]


def write_note(uri: str, text: str) -> None:
    """Edit it, as a user does."""
    import mlflow

    (run,) = runs_of(uri, sweep=True)
    mlflow.MlflowClient(uri).set_tag(run.info.run_id, TAG, text)


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def settle(tracker: MlflowTracker, clock: Clock, seconds: float) -> None:
    """Let a tracker work for so long by its clock."""
    for _ in range(round(seconds)):
        clock.now += 1
        tracker.sync()
        deadline = time.monotonic() + 30
        while any(not job.future.done() for job in tracker._jobs.values()):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        tracker.sync()


# --- the record ------------------------------------------------------------------------------------------------


def test_a_record_of_an_earlier_version_says_in_its_search_whether_there_is_a_report(tmp_path: Path) -> None:
    old = json.loads(make_spec(tmp_path, "sqlite:////x", search=searched()).model_dump_json())
    del old["report"]
    assert SweepSpec.model_validate_json(json.dumps(old)).report is True
    old["search"]["report"] = False
    spec = SweepSpec.model_validate_json(json.dumps(old))
    assert spec.report is False
    assert SweepSpec.model_validate_json(spec.model_dump_json()) == spec


# --- the report while a sweep runs -----------------------------------------------------------------------------


def test_a_running_grid_has_a_report_before_it_ends(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(ledger, 8)
    put(ledger, 90, {"optimizer": "SGD", "lr": 0.5}, state=None)
    monkeypatch.setattr(reporting, "FIRST_S", 0.0)
    page = ledger.path.parent / FILE_NAME

    async def run() -> None:
        async with asyncio.timeout(120), reporting.refreshing(ledger):
            while not page.exists():  # noqa: ASYNC110  (a file)
                await asyncio.sleep(0.05)

    asyncio.run(run())
    assert "1 running" in page.read_text()


def test_a_report_is_drawn_again_only_when_there_is_news(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Path] = []
    looked = asyncio.Event()

    async def draw(directory: Path, _patience_s: float) -> reporting.Drawn:
        drawn.append(directory)
        return reporting.Drawn(problem=None, cost_s=0.0)

    class News(reporting._News):
        def look(self) -> bool:
            looked.set()
            return super().look()

    monkeypatch.setattr(reporting, "write_report", draw)
    monkeypatch.setattr(reporting, "_News", News)
    monkeypatch.setattr(reporting, "FIRST_S", 0.001)
    monkeypatch.setattr(reporting, "EVERY_S", 0.001)

    async def looks(times: int) -> int:
        for _ in range(times):
            looked.clear()
            async with asyncio.timeout(30):
                await looked.wait()
        await asyncio.sleep(0)
        return len(drawn)

    async def run() -> None:
        add_trial(ledger, 0)
        attempt = start(ledger, 0)
        async with reporting.refreshing(ledger):
            assert await looks(5) == 0  # nothing is complete
            end(ledger, 0, attempt, {"accuracy": 0.5})
            assert await looks(5) == 1
            run_trial_here()
            assert await looks(5) == 2

    def run_trial_here() -> None:
        add_trial(ledger, 1)
        run_trial(ledger, 1, {"accuracy": 0.6})

    asyncio.run(run())


def test_a_sweep_without_reports_has_none_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = make_ledger(tmp_path / "s", "sqlite:////x", report=False)
    monkeypatch.setattr(reporting, "_refresh", lambda _ledger: pytest.fail("it is drawn"))

    async def run() -> None:
        async with reporting.refreshing(ledger):
            await asyncio.sleep(0.01)

    asyncio.run(run())


def test_the_more_a_report_costs_the_rarer_it_is() -> None:
    assert reporting.pause_s(0.0) == reporting.EVERY_S
    assert reporting.pause_s(30.0) == 30.0 / reporting.SHARE > reporting.EVERY_S


# --- the description in MLflow ---------------------------------------------------------------------------------


def test_the_description_follows_a_running_sweep_and_has_the_report_at_its_end(
    ledger: Ledger, uri: str
) -> None:
    for number in range(4):
        add_trial(ledger, number)
    run_trial(ledger, 1, {"accuracy": 0.25})
    clock = Clock()
    tracker = MlflowTracker(ledger.path.parent, clock=clock)
    try:
        settle(tracker, clock, 10)
        first = note_in(uri) or ""
        assert "Maximize **accuracy**. 4 trials of 4 points: 3 waiting, 1 complete." in first
        assert rows_in(uri) == ["| 1 | 0.2500 | 1 | 0.1 | 1 |"]
        assert FILE_NAME not in first
        run_trial(ledger, 2, {"accuracy": 0.75})
        settle(tracker, clock, 10)
        second = note_in(uri) or ""
        assert rows_in(uri) == ["| 1 | 0.7500 | 1 | 0.2 | 2 |", "| 2 | 0.2500 | 1 | 0.1 | 1 |"]
        assert "2 waiting, 2 complete." in second
    finally:
        tracker.close()
    (ledger.path.parent / FILE_NAME).write_text("page")
    drain(ledger.path.parent)
    (run,) = runs_of(uri, sweep=True)
    place = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/artifacts/{FILE_NAME}?"
    assert f"[Report]({place}" in (note_in(uri) or "")


def test_what_a_user_writes_around_the_description_stays(ledger: Ledger, uri: str) -> None:
    add_trial(ledger, 0)
    run_trial(ledger, 0, {"accuracy": 0.5})
    drain(ledger.path.parent)
    write_note(uri, f"Mine, above.\r\n\r\n{note_in(uri)}\n\n| a | b |")
    add_trial(ledger, 1)
    run_trial(ledger, 1, {"accuracy": 0.625})
    drain(ledger.path.parent)
    note = note_in(uri) or ""
    assert note.startswith("Mine, above.\r\n\r\n<!-- repro-sweep ")
    assert note.endswith("<!-- /repro-sweep -->\n\n| a | b |")
    assert rows_in(uri)[0] == "| 1 | 0.6250 | 1 | 0.1 | 1 |"


@pytest.mark.parametrize(
    "edit",
    [
        lambda _note: "My own words.",
        lambda _note: "",
        lambda note: note.replace("0.5000", "0.5000, the baseline"),
    ],
    ids=["replaced", "emptied", "changed inside"],
)
def test_a_description_that_a_user_has_changed_is_left_alone(ledger: Ledger, uri: str, edit: Any) -> None:
    add_trial(ledger, 0)
    run_trial(ledger, 0, {"accuracy": 0.5})
    drain(ledger.path.parent)
    before = note_in(uri) or ""
    mine = edit(before)
    assert mine != before
    write_note(uri, mine)
    add_trial(ledger, 1)
    run_trial(ledger, 1, {"accuracy": 0.625})
    drain(ledger.path.parent)
    assert note_in(uri) == mine


def test_ranking_for_the_description_backs_off_with_what_it_costs(
    ledger: Ledger, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, looks, cpu = Clock(), [], [0.0]
    look = Board.look

    def costly(board: Board) -> description.Standing:
        looks.append(clock.now)
        cpu[0] += 1.0
        return look(board)

    monkeypatch.setattr(Board, "look", costly)
    monkeypatch.setattr(tracking.time, "thread_time", lambda: cpu[0])
    tracker = MlflowTracker(ledger.path.parent, clock=clock)
    try:
        for number in range(12):
            add_trial(ledger, number)
            run_trial(ledger, number, {"accuracy": number / 10})
            settle(tracker, clock, 10)
        seen = note_in(uri) or ""
        settle(tracker, clock, 50)
        assert [later - earlier >= 50 for earlier, later in pairwise(looks)] == [True] * 3
        assert "12 complete" not in seen
        assert "12 complete" in (note_in(uri) or "")  # and yet it catches up, though nothing more happens
        (run,) = runs_of(uri, sweep=True)
        assert run.data.tags["repro_sweep.counts"] == '{"COMPLETE":12}'
    finally:
        tracker.close()


# --- the text --------------------------------------------------------------------------------------------------


def test_a_board_reads_what_has_changed_and_ranks_as_the_ledger_does(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    entries_of = description.entries_of

    def spy(spec: SweepSpec, trials: Any, attempts: Any) -> Any:
        read.append(len(trials))
        return entries_of(spec, trials, attempts)

    monkeypatch.setattr(description, "entries_of", spy)
    board = Board(ledger)
    fill(ledger, 60)
    for expected in (120, None, 1):
        if expected == 1:
            add_trial(ledger, 500, {"lr": 1.0})
            attempt = start(ledger, 500)
            end(ledger, 500, attempt, state=TrialState.FAIL, kind=FailureKind.CRASH, again=True)
            end(ledger, 500, start(ledger, 500, ordinal=1), {"accuracy": 9.0})
        standing = board.look()
        rows = ranked_rows(ledger.spec, ledger.trials(), ledger.attempts())
        assert list(standing.rows) == rows[:10]
        assert standing.points == len(rows)
    assert read == [120, 1]


def test_names_and_values_cannot_break_the_table(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path / "s", "sqlite:////x", name="a`b\nc", metric="acc|uracy")
    for number, value in enumerate(
        ["a|b", "line\nbreak", "<script>x</script>", "[x](http://y)", "`*_@me:x:\\"]
    ):
        put(ledger, number, {f"key|{number % 2}": value}, {"acc|uracy": float(number)})
    text = text_of(ledger.spec, Board(ledger).look(), {"Report": "#/x"})
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in table] == [7] * 7  # six columns
    assert "<" not in text
    assert "](http" not in text
    assert "line\xa0break" in text
    assert "&#96;&#42;&#95;&#64;me&#58;x&#58;&#92;" in text


def test_the_description_stays_within_mlflows_limit_however_much_there_is_to_say(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path / "s", "sqlite:////x")
    for number in range(30):
        put(
            ledger,
            number,
            {f"{'k' * 300}{key}": f"|{'v' * 300}" for key in range(40)} | {"n": number},
            {"accuracy": number},
        )
    standing = Board(ledger).look()

    def text(limit: int) -> str:
        return text_of(ledger.spec, standing, {"Report": "#/x"}, limit)

    whole = renewed(None, text) or ""
    assert len(whole) <= OWN_LIMIT + 200
    assert "33 more parameters" in whole
    add = "x" * (NOTE_LIMIT - len(whole) - 10)
    put(ledger, 99, {"n": 99}, {"accuracy": 99.0})
    standing = Board(ledger).look()
    grown = renewed(whole + add, text)
    assert grown is not None
    assert len(grown) <= NOTE_LIMIT
    assert grown.endswith(add)
    assert renewed("x" * NOTE_LIMIT, text) is None
