"""``ranking``: reading back a sweep of 10,000 trials from a team's server that holds 100,000 runs.

The runs are written into the server's PostgreSQL directly: those of the sweep that is read with the tracker's own
tags, those of the others as copies of them. The sweep's table is then stored as a tracker stores it, and both systems
ask the same server, one after the other, each in a process of its own that has imported MLflow before.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import made
from benchmarks.harness import BenchmarkError
from benchmarks.report import Table, Target, number
from repro_sweep.records import Attempt, Trial
from repro_sweep.states import TrialState
from repro_sweep.sweep import SweepSpec, Tracking
from repro_sweep.tracking import encoding
from repro_sweep.tracking.sent import SWEEP, Sent
from repro_sweep.tracking.store import Store
from repro_sweep.tracking.upload import Place, SweepUpload, perform

if TYPE_CHECKING:
    import psycopg

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

_NAME = "grid"
_TRIALS, _SWEEPS = 10_000, 10
_SEEDS = 3
_STEPS = 5
_TURNS = 3
_CACHED_S = 3600
"""MLflow's server looks at a password several times for each request, 0.1 s of CPU each, unless it may remember it."""
_START_MS = 1_700_000_000_000
_RUN_COLUMNS = (
    "run_uuid, name, source_type, source_name, entry_point_name, user_id, status, start_time, end_time,"
    " source_version, lifecycle_stage, artifact_uri, experiment_id"
)
_OURS = """
import json, resource, sys, time
import mlflow, pandas
import repro_sweep
from repro_sweep import ranking

calls = {
    "best": lambda: repro_sweep.best_trial(NAME).number,
    "top": lambda: repro_sweep.leaderboard(NAME, top=100)["trials"].iloc[0][0],
    "all": lambda: repro_sweep.leaderboard(NAME)["trials"].iloc[0][0],
}
"""
_MLFLOW = """
import json, resource, sys, time
import mlflow, pandas

client = mlflow.MlflowClient()
experiments = [each.experiment_id for each in client.search_experiments()]
of_sweep = f"tags.`repro_sweep.sweep` = '{NAME}' and tags.`repro_sweep.kind` = 'trial'"
order = ["metrics.accuracy DESC"]
calls = {
    "best": lambda: int(client.search_runs(experiments, of_sweep, order_by=order, max_results=1)[0]
                        .data.tags["repro_sweep.trial"]),
    "top": lambda: int(client.search_runs(experiments, of_sweep, order_by=order, max_results=100)[0]
                       .data.tags["repro_sweep.trial"]),
    "all": lambda: int(mlflow.search_runs(experiments, of_sweep, order_by=order, max_results=100_000)
                       ["tags.repro_sweep.trial"].iloc[0]),
}
"""
_MEASURE = """
what = sys.argv[1]
times = []
for _ in range(TURNS):
    began = time.perf_counter()
    first = calls[what]()
    times.append(time.perf_counter() - began)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"times_s": times, "first": int(first), "peak_mb": peak}))
"""
_WHAT = {"best": "the best trial", "top": "the first 100", "all": "all as a DataFrame"}
_LIMITS_S = {"best": 0.5, "top": 1.0, "all": 10.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """A server with many runs, and how long it took to store the table of the sweep that is read."""

    environment: dict[str, str]
    runs: int
    trials: int
    table_s: float


def ranking(folder: Path, *, quick: bool) -> Table:
    """Seconds for the best trial, the first 100 points and all of them, and the same with MLflow alone."""
    trials, sweeps = (300, 3) if quick else (_TRIALS, _SWEEPS)
    with filled(folder, trials, sweeps) as server:
        grid = [["what", "repro-sweep", "its peak MB", "MLflow", "its peak MB"]]
        targets: list[Target] = []
        for what, text in _WHAT.items():
            ours, theirs = (_measure(each, what, server) for each in (_OURS, _MLFLOW))
            took_s = max(ours["times_s"])
            cells = (took_s, ours["peak_mb"], min(theirs["times_s"]), theirs["peak_mb"])
            grid.append([text, *map(number, cells)])
            limit_s = _LIMITS_S[what]
            targets.append(Target(what=f"{text} (the slowest call)", value=took_s, limit=limit_s, unit="s"))
            targets.append(
                Target(what=f"peak memory for {text}", value=ours["peak_mb"], limit=1000.0, unit="MB")
            )
    text = (
        f"A sweep of {trials:,} trials ({_SEEDS} seeds a point) among {server.runs:,} runs in one experiment, on"
        " `mlflow server` with accounts and PostgreSQL on this machine; the server remembers passwords"
        " (`auth_cache_ttl_seconds`), as it otherwise computes their hashes for every request."
        " Seconds a call, in a process that has imported"
        f" MLflow and pandas before: ours the slowest of {_TURNS} calls, MLflow the fastest. MLflow's best is the best"
        " single run; ours averages over seeds. It took the tracker"
        f" {number(server.table_s)} s to store the sweep's table at its end."
    )
    return Table(title="Ranking on a server", text=text, unit="s", rows=(), targets=targets, grid=grid)


def _measure(calls: str, what: str, server: Filled) -> dict[str, Any]:
    script = f"NAME = {_NAME!r}\nTURNS = {_TURNS}\n{calls}{_MEASURE}"
    done = subprocess.run(
        [sys.executable, "-c", script, what],
        check=False,
        env=os.environ | server.environment,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise BenchmarkError(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def filled(folder: Path, trials: int, sweeps: int) -> Iterator[Filled]:
    """A real server on a real PostgreSQL with ``sweeps`` sweeps of ``trials`` trials each in one experiment."""
    import psycopg
    from team_server import postgres, team_server

    with postgres() as database, team_server(folder / "server", database, cached_s=_CACHED_S) as server:
        os.environ.update(server.environment())
        uri = server.uri
        spec = _spec(folder, uri)
        store = Store(uri)
        experiment = store.experiment(spec.tracking.experiment)
        parent = store.create_run(experiment, encoding.sweep_tags(spec), started_ms=_START_MS)
        found = database.execute("SELECT datname FROM pg_database WHERE datname ~ '^t[0-9a-f]{8}$'")
        name = found.splitlines()[0]
        with psycopg.connect(database.uri(name).replace("+psycopg", ""), autocommit=True) as connection:
            _write(connection, spec, int(experiment), parent.run_id, trials)
            connection.execute(
                "CREATE TEMP TABLE originals AS SELECT run_uuid FROM runs WHERE run_uuid = %s OR run_uuid IN"
                " (SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId' AND value = %s)",
                (parent.run_id, parent.run_id),
            )
            for copy in range(1, sweeps):
                _copy(connection, copy)
            connection.execute("ANALYZE")
        took_s = _seal(store, spec, experiment, parent.run_id, parent.artifact_uri, trials)
        yield Filled(
            environment=server.environment(), runs=sweeps * (trials + 1), trials=trials, table_s=took_s
        )


def _spec(folder: Path, uri: str) -> SweepSpec:
    return made.record(
        folder / "sweep", sweep_id=uuid.uuid4().hex, name=_NAME, metric="accuracy", repeats=("seed",),
        tracking=Tracking(uri=uri, experiment="study"), created_at=_START_MS / 1000,
    )  # fmt: skip


def _trial(number: int, chance: random.Random) -> tuple[Trial, Attempt]:
    point, seed = divmod(number, _SEEDS)
    params: dict[str, object] = {
        "optimizer": ("SGD", "Adam")[point % 2], "optimizer.lr": 10 ** -(1 + point % 4000 / 1000),
        "model": f"lstm{point % 7}", "model.hidden": 2 ** (point % 9), "augment": bool(point % 3),
    }  # fmt: skip
    overrides = tuple(f"{key}={value}" for key, value in {**params, "seed": seed}.items())
    accuracy = chance.random()
    began_s = _START_MS / 1000 + number
    attempt = Attempt(
        id=f"{number}-0", trial=number, ordinal=0, worker="w", slot=0, host="node1", state=TrialState.COMPLETE,
        kind=None, message=None, metrics={"accuracy": accuracy, "loss": 1 - accuracy}, started_at=began_s,
        ended_at=began_s + 60,
    )  # fmt: skip
    trial = Trial(
        number=number, identity=f"{number:064x}", directory=f"trials/{number}", overrides=overrides, params=params,
        repeat={"seed": seed}, config="", state=TrialState.COMPLETE, attempt=attempt.id, change=1,
        point=f"{point:064x}",
    )  # fmt: skip
    return trial, attempt


def _write(
    connection: psycopg.Connection[Any], spec: SweepSpec, experiment: int, parent: str, trials: int
) -> None:
    """The runs of the sweep that is read, as the tracker leaves them."""
    chance = random.Random(0)
    runs: list[tuple[object, ...]] = []
    rows: dict[str, list[tuple[object, ...]]] = {
        "tags": [],
        "params": [],
        "latest_metrics": [],
        "metrics": [],
    }
    for number_ in range(trials):
        run_id = uuid.uuid4().hex
        trial, attempt = _trial(number_, chance)
        began_ms = _START_MS + number_ * 1000
        runs.append((
            run_id, encoding.run_name(trial), "LOCAL", "", "", "ada", "FINISHED", began_ms, began_ms + 60_000, "",
            "active", f"mlflow-artifacts:/{experiment}/{run_id}/artifacts", experiment,
        ))  # fmt: skip
        tags = encoding.fixed_tags(spec, trial, parent) | encoding.state_tags(trial, [attempt])
        rows["tags"] += [(key, value, run_id) for key, value in tags.items() if value]
        params = {**trial.params, **trial.repeat, "epochs": 20, "batch_size": 32}
        rows["params"] += [(key, str(value), run_id) for key, value in params.items()]
        for key, value in attempt.metrics.items():
            latest = (key, value, began_ms + 60_000, _STEPS - 1, False, run_id)
            rows["latest_metrics"].append(latest)
            rows["metrics"] += [
                (key, value, began_ms + step, step, False, run_id) for step in range(_STEPS - 1)
            ]
            rows["metrics"].append(latest)
    metrics = "key, value, timestamp, step, is_nan, run_uuid"
    columns = {
        "tags": "key, value, run_uuid", "params": "key, value, run_uuid", "latest_metrics": metrics, "metrics": metrics,
    }  # fmt: skip
    _load(connection, "runs", _RUN_COLUMNS, runs)
    for table, lines in rows.items():
        _load(connection, table, columns[table], lines)


def _load(
    connection: psycopg.Connection[Any], table: str, columns: str, rows: Iterable[tuple[object, ...]]
) -> None:
    with connection.cursor() as cursor, cursor.copy(f"COPY {table} ({columns}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)


def _copy(connection: psycopg.Connection[Any], copy: int) -> None:
    """Another sweep like the one that is there, under another name, with runs and a parent of its own."""
    renamed = f"md5(run_uuid || '{copy}')"
    mine = "run_uuid IN (SELECT run_uuid FROM originals)"
    value = (
        f"CASE WHEN key = 'mlflow.parentRunId' THEN md5(value || '{copy}')"
        f" WHEN key = 'repro_sweep.sweep' THEN value || '_{copy}'"
        f" WHEN key = 'repro_sweep.sweep_id' THEN md5(value || '{copy}') ELSE value END"
    )
    others = _RUN_COLUMNS.removeprefix("run_uuid, ")
    rest = {
        "tags": ("key", value), "params": ("key", "value"), "latest_metrics": ("key, timestamp, step, is_nan", "value"),
        "metrics": ("key, timestamp, step, is_nan", "value"),
    }  # fmt: skip
    connection.execute(
        f"INSERT INTO runs (run_uuid, {others}) SELECT {renamed}, {others} FROM runs WHERE {mine}"
    )
    for table, (same, changed) in rest.items():
        connection.execute(
            f"INSERT INTO {table} (run_uuid, {same}, value) SELECT {renamed}, {same}, {changed} FROM {table}"
            f" WHERE {mine}"
        )


def _seal(
    store: Store, spec: SweepSpec, experiment: str, parent: str, artifact_uri: str, trials: int
) -> float:
    """Close the sweep's run as its tracker does; returns the seconds that this has taken."""
    counts = dict.fromkeys(TrialState, 0) | {TrialState.COMPLETE: trials}
    sent = Sent(trial=SWEEP, run_id=parent, artifact_uri=artifact_uri)
    place = Place(experiment=experiment, parent_run=parent)
    upload = SweepUpload(store, spec, counts, sent, place=place, closing=True, suspects=[], cleared=set())
    began = time.perf_counter()
    [error] = perform(store, [upload])
    if error is not None:
        raise BenchmarkError(f"the sweep's run cannot be closed: {error!r}")
    return time.perf_counter() - began
