"""``coordinator``: how many trials a second a coordinator hands out and takes back, with a thousand workers at once."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import BenchmarkError, stop
from benchmarks.report import Table, Target, number
from benchmarks.spans import quantile

_ROOT = Path(__file__).parents[1]
_TRIALS = 60_000
_SHORT = 20_000
_WORKERS = 1_000
_CROWDS = 2
_TRIAL_S = 1.0
_EMPTY = 30_000
_COMMITS_S = 0.5
_GROWTH_MB = 8.0
"""What the coordinator's memory may grow by from a tenth of the trials to the last one."""
_HOST = "benchmarks.coordinator_host"
_CROWD = "benchmarks.crowd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What came of one run: times of claims in seconds, the coordinator's memory in MB by the share of trials over.

    ``commits`` is how many SQLite made a second on the same disk, just before.
    """

    trials: int
    seconds: float
    messages: int
    claim_s: Sequence[float]
    memory_mb: dict[str, float]
    cpu_s: float
    commits: float

    @property
    def rate(self) -> float:
        """Trials a second that were claimed and finished, from the crowd's start to its end."""
        return self.trials / self.seconds

    @property
    def growth_mb(self) -> float:
        """By how much memory has grown since a tenth of the trials was over."""
        return max(0.0, max(self.memory_mb.values()) - self.memory_mb["0.1"])


def load(folder: Path, *, quick: bool) -> Table:
    """Trials a second, what a claim takes, and the coordinator's memory; over the Unix socket and over TCP."""
    trials, short, workers = (3_000, 1_000, 100) if quick else (_TRIALS, _SHORT, _WORKERS)
    unix = crowd(folder / "unix", trials=trials, workers=workers)
    tcp = crowd(folder / "tcp", trials=trials, workers=workers, tcp=True)
    apart = crowd(folder / "apart", trials=short, workers=workers, apart=True)
    paced = crowd(folder / "paced", trials=short, workers=workers, tcp=True, trial_s=_TRIAL_S)
    ceiling = empty(folder / "empty", workers, 1_000 if quick else _EMPTY)
    slowest = min((unix, tcp, apart), key=lambda each: each.rate)
    return Table(
        title=f"coordinator: {workers:,} workers at once",
        text=(
            f"A coordinator with its ledger, in a process of its own, and {workers:,} simulated workers in"
            f" {_CROWDS} more, all on this machine. Each worker registers, claims a trial, says that it is complete"
            " together with its next claim, as real workers do, and says once a second that it lives. Trials take no"
            " time, so that each worker's next claim is always there: what a claim takes is then the number of workers"
            f" by the rate. With trials of {_TRIAL_S:g} s in the mean it is what a free slot waits. Every trial was"
            " handed out once and ended once, by the ledger and by what the workers got. Memory is what the"
            " coordinator's process holds (RSS) when so many of its trials are over. The last column is how many"
            " commits of one row SQLite makes a second, one after the other, on the same disk just before the run:"
            " what a coordinator could do at most that commits each message by itself."
        ),
        unit="",
        rows=(),
        grid=(
            (
                "", "trials", "trials a second", "messages a second", "claim, median ms", "claim, p99 ms",
                "CPU ms a trial", "MB at 10%", "MB at 50%", "MB at 100%", "commits a second",
            ),
            _line("Unix socket", unix),
            _line("TCP with token", tcp),
            _line("Unix socket, results apart from claims", apart),
            _line(f"TCP with token, trials of {_TRIAL_S:g} s", paced),
            ("ceiling: empty messages, nothing done", "", "", number(ceiling), "", "", "", "", "", "", ""),
        ),
        targets=[
            Target(
                what=f"a trial claimed and finished, by the slowest way ({number(slowest.rate)} a second)",
                value=1000 / slowest.rate, limit=1.0, unit="ms",
            ),
            Target(
                what="memory gained from 10% of the trials to the end",
                value=max(unix.growth_mb, tcp.growth_mb), limit=_GROWTH_MB, unit="MB",
            ),
        ],
    )  # fmt: skip


def _line(what: str, run: Load) -> tuple[str, ...]:
    return (
        what,
        f"{run.trials:,}",
        number(run.rate),
        number(run.messages / run.seconds),
        number(1000 * quantile(run.claim_s, 0.5)),
        number(1000 * quantile(run.claim_s, 0.99)),
        number(1000 * run.cpu_s / run.trials),
        *(number(run.memory_mb[share]) for share in ("0.1", "0.5", "1.0")),
        number(run.commits),
    )


def crowd(
    folder: Path, *, trials: int, workers: int, tcp: bool = False, apart: bool = False, trial_s: float = 0.0
) -> Load:
    """Have a crowd work off a sweep.

    Args:
        folder: for the sweep; it is made.
        trials: how many there are.
        workers: how many work at once, with a slot each.
        tcp: they come over TCP with the token.
        apart: each result is a message of its own.
        trial_s: how long a trial takes in the mean.

    Raises:
        BenchmarkError: not every trial was handed out once and ended once.
    """
    folder.mkdir(parents=True)
    commits = commits_a_second(folder / "commits.db", _COMMITS_S)
    options = [f"--trials={trials}", f"--workers={workers}"]
    with _host(folder, options) as (process, address):
        target = address["tcp"][0] if tcp else address["socket"]
        work = [f"--target={target}", f"--token={address['token'] if tcp else ''}", f"--trial-s={trial_s}"]
        tallies = _run_crowds(folder, [*work, *(["--apart"] if apart else [])], workers)
        figures = _line_of(process, folder)
        if process.wait(60) != 0:
            raise _failed(folder, "the coordinator did not end well")
    _check(folder, tallies, trials)
    return Load(
        trials=trials,
        seconds=max(tally["ended"] for tally in tallies) - min(tally["began"] for tally in tallies),
        messages=sum(tally["messages"] for tally in tallies),
        claim_s=[seconds for tally in tallies for seconds in tally["claim_s"]],
        memory_mb=figures["memory_mb"],
        cpu_s=figures["cpu_s"],
        commits=commits,
    )


def empty(folder: Path, connections: int, requests: int) -> float:
    """How many messages a second the server answers that have nothing done about them."""
    folder.mkdir(parents=True)
    with _host(folder, []) as (process, address):
        work = [f"--target={address['socket']}", f"--empty={requests // _CROWDS}"]
        tallies = _run_crowds(folder, work, connections)
        assert process.stdin is not None
        process.stdin.close()
        _line_of(process, folder)
    seconds = max(tally["ended"] for tally in tallies) - min(tally["began"] for tally in tallies)
    return float(sum(tally["messages"] for tally in tallies) / seconds)


def commits_a_second(path: Path, seconds: float) -> float:
    """How often SQLite commits one row to this disk, as durably as the ledger."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = wal")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, text TEXT)")
        count, began = 0, time.perf_counter()
        while time.perf_counter() < began + seconds:
            db.execute("INSERT INTO rows (text) VALUES (?)", ("x" * 100,))
            db.commit()
            count += 1
        return count / (time.perf_counter() - began)


def _run_crowds(folder: Path, options: Sequence[str], workers: int) -> list[dict[str, Any]]:
    """Let crowds begin together; returns their tallies."""
    share = workers // _CROWDS
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(_started(folder, _CROWD, [*options, f"--first={index * share}", f"--workers={share}"]))
            for index in range(_CROWDS)
        ]  # fmt: skip
        for process in processes:
            _line_of(process, folder)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return [_line_of(process, folder) for process in processes]


@contextlib.contextmanager
def _host(folder: Path, options: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    options = [f"--directory={folder}", "--host=127.0.0.1", *options]
    with _started(folder, _HOST, options) as process:
        yield process, _line_of(process, folder)


@contextlib.contextmanager
def _started(folder: Path, module: str, options: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    env = {**os.environ, "PYTHONPATH": str(_ROOT)}
    with (folder / "output.txt").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *options], cwd=folder, env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, start_new_session=True,
        )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            stop(process)  # type: ignore[arg-type]


def _line_of(process: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise _failed(folder, f"it ended with status {process.wait(60)}")
    found: dict[str, Any] = json.loads(line)
    return found


def _check(folder: Path, tallies: Sequence[dict[str, Any]], trials: int) -> None:
    """Every trial was handed out once and ended once: by what the workers got, and by the ledger."""
    wrong = [error for tally in tallies for error in tally["errors"]]
    if wrong or any(tally["refused"] for tally in tallies):
        raise _failed(folder, f"a worker had an error: {wrong[:3]}")
    given = [trial for tally in tallies for trial in tally["trials"]]
    if sorted(given) != list(range(trials)):
        raise _failed(
            folder, f"{trials} trials were handed out {len(given)} times, {len(set(given))} of them"
        )
    with contextlib.closing(sqlite3.connect(f"{(folder / 'ledger.db').as_uri()}?mode=ro", uri=True)) as db:
        ended = db.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'").fetchone()[0]
        attempts = db.execute(
            "SELECT count(*), count(DISTINCT trial) FROM attempts WHERE state = 'COMPLETE'"
        ).fetchone()
        begun = db.execute("SELECT count(*) FROM attempts").fetchone()[0]
    if (ended, *attempts, begun) != (trials, trials, trials, trials):
        raise _failed(
            folder, f"the ledger has {ended} complete trials, {begun} attempts, {attempts} complete"
        )


def _failed(folder: Path, why: str) -> BenchmarkError:
    said = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
    return BenchmarkError(f"{folder}: {why}\n{said[-3000:]}")
