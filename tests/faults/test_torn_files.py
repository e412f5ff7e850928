"""Files that a crash has cut: what was acknowledged is there, and what was not is there whole or not at all."""

from __future__ import annotations

import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from chaos import AGENT, SLOTS, STEPS, TRACKER, Finished, Swarm, end_leftovers
from helpers import eventually
from tracking_helpers import make_ledger

from repro_sweep import spool
from repro_sweep.ledger import FILE_NAME, Ledger
from repro_sweep.records import Attempt, NewReport, NewTrial, Outcome
from repro_sweep.states import FailureKind, TrialState

_WAL_HEADER = 32
_FRAME_HEADER = 24
_PAGE = 4096
_FRAME = _FRAME_HEADER + _PAGE


def test_a_ledger_cut_anywhere_in_its_last_transaction_has_all_earlier_ones(
    tmp_path: Path, size: Callable[[int, int], int], figures: Callable[..., None]
) -> None:
    """The last one is there whole, or not at all."""
    ledger = make_ledger(tmp_path / "sweep", "sqlite:///mlflow.db")
    for number in range(20):
        _change(ledger, 2 * number, 2)
        ledger.commit()
    wal = ledger.path.with_name(f"{FILE_NAME}-wal")
    acknowledged, begin = _dump(ledger.path), wal.stat().st_size
    _change(ledger, 40, 40)
    ledger.commit()
    whole, end = _dump(ledger.path), wal.stat().st_size
    assert (end - begin) % _FRAME == 0
    assert (begin - _WAL_HEADER) % _FRAME == 0
    frames = (end - begin) // _FRAME
    assert frames >= 5

    offsets = sorted(
        {0, 1, _FRAME_HEADER - 1, _FRAME_HEADER, _FRAME // 2, _FRAME - 1, *size((), range(0, _FRAME, 64))}
    )
    cuts = [begin + frame * _FRAME + offset for frame in range(frames) for offset in offsets] + [end]
    lost = broken = halves = 0
    for cut in cuts:
        for rest in (b"", b"\0" * min(_FRAME, end - cut)):  # the file was made longer, but not what is in it
            found = _opened(ledger.path, wal.read_bytes()[:cut] + rest, tmp_path / "cut")
            broken += found is None
            lost += found is not None and not set(acknowledged) <= set(found) | set(_changing(acknowledged))
            halves += found is not None and found not in (acknowledged, whole)
            if cut < end:
                assert found == acknowledged, cut
    assert found == whole
    figures(
        frames=frames, cuts=2 * len(cuts), broken=broken, acknowledged_lost=lost, half_transactions=halves
    )
    assert (broken, lost, halves) == (0, 0, 0)
    ledger.close()


def test_a_torn_result_is_left_alone_and_torn_reports_are_taken_up_to_the_tear(
    make_swarm: Callable[..., Swarm], undisturbed: Callable[[int], Finished], figures: Callable[..., None]
) -> None:
    """The trial of the torn result is run again; that of a whole one is not."""
    swarm = make_swarm(60, pause_s=0.03)
    with swarm.start() as command:
        command.until(lambda: swarm.count("end") >= 4, "some trials end")
        swarm.hold("all")
        command.until(
            lambda: len(swarm.trial_pids()) == SLOTS and not _moving(swarm), "trials wait at their end"
        )
        command.process.kill()
        assert command.wait() == -signal.SIGKILL
    swarm.release()
    eventually(lambda: len(swarm.kept_results()) == SLOTS and not swarm.trial_pids(), "all results are kept")
    end_leftovers(swarm, AGENT)
    end_leftovers(swarm, TRACKER)

    torn, whole = swarm.kept_results()
    reports = next(swarm.directory.glob(f"trials/*/reports-{torn.stem}.jsonl"))
    lines = reports.read_bytes().splitlines(keepends=True)
    assert len(lines) == STEPS
    reports.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    late = torn.read_bytes()
    torn.write_bytes(late[: len(late) // 2])
    before = swarm.sweep
    already = {attempt.id: attempt.reports for attempt in before.attempts}

    with swarm.start() as command:
        assert command.wait(300) == 0, command.stderr
    verdict = swarm.verdict(undisturbed(60))
    attempts = {attempt.id: attempt for attempt in swarm.sweep.attempts}
    figures(torn_results=1, torn_reports=1, **verdict.counted)
    assert verdict.wrong == {}, verdict.remarks
    assert attempts[whole.stem].state is TrialState.COMPLETE
    assert attempts[torn.stem].kind is FailureKind.NODE_LOST
    assert attempts[torn.stem].reports == max(already[torn.stem], STEPS - 1)
    assert verdict.executions == 61
    assert swarm.kept_results() == [torn]

    torn.write_bytes(late)  # a result of an attempt that was given up since
    with swarm.start() as command:
        assert command.wait(300) == 0, command.stderr
    verdict = swarm.verdict(undisturbed(60))
    [refused] = [attempt for attempt in swarm.sweep.attempts if attempt.id == torn.stem]
    assert verdict.wrong == {}, verdict.remarks
    assert refused.kind is FailureKind.NODE_LOST
    assert "came too late and was refused" in (refused.message or "")
    assert swarm.kept_results() == []


def test_a_torn_result_among_whole_ones_is_the_only_one_that_is_passed_over(tmp_path: Path) -> None:
    """Wherever it is cut."""
    from repro_sweep import protocol

    finish = [
        protocol.Finish(worker="worker", attempt=f"attempt-{number}", state=TrialState.COMPLETE, ended_at=1.0)
        for number in range(3)
    ]
    for each in finish:
        spool.keep_result(tmp_path, each)
    path = tmp_path / "workers/worker/results/attempt-1.json"
    text = path.read_bytes()
    for cut in range(len(text)):
        path.write_bytes(text[:cut])
        assert list(spool.results(tmp_path)) == [finish[0], finish[2]]
        assert spool.result_of(tmp_path, "worker", "attempt-1") is None
    path.write_bytes(text)
    assert list(spool.results(tmp_path)) == finish


def _change(ledger: Ledger, first: int, count: int) -> None:
    """New trials, each with an attempt that has reported and ended."""
    for number in range(first, first + count):
        trial = NewTrial(
            number=number, identity=f"{number:064x}", directory=f"trials/{number}", overrides=(f"x={number}",),
            params={"x": number}, repeat={}, config="x: 1\n" * 100,
        )  # fmt: skip
        ledger.add_trials([trial])
        attempt = Attempt(
            id=f"attempt-{number}", trial=number, ordinal=0, worker="worker", slot=0, host="node",
            state=TrialState.RUNNING, kind=None, message=None, metrics={}, started_at=1.0, ended_at=None,
        )  # fmt: skip
        ledger.start_attempt(attempt)
        ledger.add_reports(
            attempt.id,
            [NewReport(seq=step, step=step, time=2.0, metrics={"score": step / 7}) for step in range(5)],
        )
        ledger.finish_attempt(
            attempt.id, Outcome(state=TrialState.COMPLETE, metrics={"score": number / 3}, ended_at=3.0)
        )


def _opened(path: Path, wal: bytes, folder: Path) -> list[str] | None:
    """What is in a copy of the ledger with this write-ahead log, None where it is broken."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(path, folder / FILE_NAME)
    (folder / f"{FILE_NAME}-wal").write_bytes(wal)
    ledger = Ledger.open(folder)
    try:
        for trial in ledger.trials():
            assert [attempt.state for attempt in ledger.attempts(trial.number)] == [trial.state]
    finally:
        ledger.close()
    with closing(sqlite3.connect(folder / FILE_NAME)) as db:
        sound = db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return list(db.iterdump()) if sound else None


def _dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        return list(db.iterdump())


def _changing(lines: list[str]) -> list[str]:
    return [line for line in lines if "sqlite_sequence" in line]


def _moving(swarm: Swarm) -> bool:
    """Whether some running trial has not written all of its reports."""
    written = [
        len(path.read_bytes().splitlines()) for path in swarm.directory.glob("trials/*/reports-*.jsonl")
    ]
    return sorted(written)[-SLOTS:] != [STEPS] * SLOTS
