"""``upload``: how fast short trials get into a team's server: MLflow with accounts before a PostgreSQL."""

from __future__ import annotations

import json
import re
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness, made, upload_clients
from benchmarks.harness import BenchmarkError
from benchmarks.report import OURS, Table, Target, number
from benchmarks.upload_clients import METRICS, PARAMS, STEPS
from repro_sweep.exchange import LOG_NAME, RECORD_NAME
from repro_sweep.ledger import Ledger
from repro_sweep.records import Attempt, NewReport, NewTrial, Outcome
from repro_sweep.states import Direction, TrialState

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from team_server import TeamServer, postgres, team_server

WORKERS = 4
"""Of the server: as many as MLflow has if it is not told."""
CACHED_S = 60
"""``auth_cache_ttl_seconds``, as MLflow proposes; without it, checking passwords is most of what is measured."""
_REQUEST = re.compile(r'"(?:GET|POST|PUT|PATCH|DELETE) (\S+) HTTP/1\.[01]"')
_ARTIFACT = re.compile(r"/mlflow-artifacts/|/get-artifact")
_LOG = "epoch 1 of 20: a line as trials print them\n" * 20
_RECORD = json.dumps({"version": 1, "packages": {f"package-{index}": "1.2.3" for index in range(100)}})


@dataclass(frozen=True, slots=True, kw_only=True)
class _System:
    key: str
    name: str
    trials: int
    quick: int
    note: str = ""


_SYSTEMS = (
    _System(key="tracker", name=OURS, trials=300, quick=8, note="its tracker; with log and record of each trial"),
    _System(key="mlflow_log_metrics", name="mlflow, log_metrics", trials=20, quick=2, note="a call for each step"),
    _System(key="mlflow_log_metric", name="mlflow, log_metric", trials=5, quick=1, note="a call for each value"),
    _System(key="mlflow_async", name="mlflow, log_metric, async", trials=10, quick=1, note="enable_async_logging()"),
    _System(key="ray_tune", name="Ray Tune's callback", trials=1, quick=1, note="with what Tune itself reports"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    system: _System
    trials: int
    seconds: float
    requests: int
    artifacts: int

    @property
    def rate(self) -> float:
        """Runs a second."""
        return self.trials / self.seconds

    def cells(self, ours: _Measured) -> tuple[str, ...]:
        name = f"**{OURS}**" if self.system.name == OURS else self.system.name
        besides, files = self.requests / self.trials, self.artifacts / self.trials
        return (
            name, number(self.rate), number(self.rate / ours.rate), number(besides), number(files),
            str(self.trials), self.system.note,
        )  # fmt: skip


def upload(folder: Path, *, quick: bool) -> Table:
    """Runs a second, each client in turn on one server, and the requests that a run costs."""
    with (
        postgres() as database,
        team_server(folder / "server", database, workers=WORKERS, cached_s=CACHED_S) as server,
    ):
        _measure(folder / "warm", server, _SYSTEMS[0], 2 * WORKERS)  # its workers load lazily
        measured = [
            _measure(folder / each.key, server, each, each.quick if quick else each.trials)
            for each in _SYSTEMS
        ]
    ours = measured[0]
    plain = next(each for each in measured if each.system.key == "mlflow_log_metric")
    header = ("system", "runs a second", f"/ {OURS}", "requests a run", "for artifacts", "runs", "remarks")
    return Table(
        title="upload: short trials into a team's server",
        text=f"Trials with {PARAMS} params, {len(METRICS)} metrics at {STEPS} steps and their config as an artifact,"
        f" into MLflow's server with accounts (`--app-name basic-auth`, {WORKERS} workers, a password is cached for"
        f" {CACHED_S} s, which spares those most that ask most) before PostgreSQL,"
        " on the machine of the clients. One process each, in turn;"
        " imports do not count. Requests are counted in the server's log, those for artifacts apart. That every run,"
        " param and point is there, once, was looked up in PostgreSQL.",
        unit="",
        rows=(),
        grid=(header, *(each.cells(ours) for each in measured)),
        targets=[
            Target(
                what="requests of a trial besides its artifacts (and what the sweep itself needs)",
                value=ours.requests / ours.trials, limit=3 + 10 / ours.trials, unit="",
            ),
            Target(
                what="a run, of a fifth of what `mlflow.log_metric` takes,",
                value=1000 / ours.rate, limit=1000 / plain.rate / 5, unit="ms",
            ),
        ],
    )  # fmt: skip


def _measure(folder: Path, server: TeamServer, system: _System, trials: int) -> _Measured:
    folder.mkdir()
    if system.key == "tracker":
        _ledger(folder, server.uri, trials)
    before = _requests(server)
    script = str(Path(upload_clients.__file__))
    command = [sys.executable, "-W", "ignore", script, system.key, str(trials), str(folder)]
    with harness.started(command, folder, server.environment()) as process:
        status = process.wait(harness.TIMEOUT_S)
    if status != 0:
        raise harness.failed(folder, f"status {status}")
    said = (folder / "output.txt").read_text(encoding="utf-8").splitlines()
    seconds = next(json.loads(line)["seconds"] for line in reversed(said) if line.startswith('{"seconds"'))
    _check(server, folder.name, trials)
    after = _requests(server)
    return _Measured(
        system=system,
        trials=trials,
        seconds=seconds,
        requests=after[0] - before[0],
        artifacts=after[1] - before[1],
    )


def _requests(server: TeamServer) -> tuple[int, int]:
    """How many requests the server has answered: besides those for artifacts, and for them."""
    paths = _REQUEST.findall(server.log.read_text(encoding="utf-8", errors="replace"))
    artifacts = sum(_ARTIFACT.search(path) is not None for path in paths)
    return len(paths) - artifacts, artifacts


def _check(server: TeamServer, experiment: str, trials: int) -> None:
    """That the server has every run, ended well, and of each all params and all points, once, and a config."""
    runs = f"""
        SELECT run_uuid FROM runs JOIN experiments USING (experiment_id) WHERE experiments.name = '{experiment}'
        AND status = 'FINISHED' AND NOT EXISTS (SELECT 1 FROM tags WHERE tags.run_uuid = runs.run_uuid
        AND tags.key = 'repro_sweep.kind' AND tags.value = 'sweep')"""
    names = ", ".join(f"'{name}'" for name in METRICS)
    counted = [
        int(server.postgres.execute(f"SELECT count(*) FROM ({query}) AS found", server.database))
        for query in (
            runs,
            f"SELECT 1 FROM params WHERE run_uuid IN ({runs}) AND key LIKE 'p_'",
            f"SELECT 1 FROM metrics WHERE run_uuid IN ({runs}) AND key IN ({names})",
            f"SELECT DISTINCT run_uuid, key, value FROM metrics WHERE run_uuid IN ({runs}) AND key IN ({names})",
        )
    ]
    points = STEPS * len(METRICS)
    expected = [trials, trials * PARAMS, trials * points, trials * points]
    if counted != expected:
        raise BenchmarkError(
            f"{experiment}: the server has {counted} runs, params, points, and {expected} were sent"
        )


def _ledger(folder: Path, uri: str, trials: int) -> None:
    """A sweep whose trials are over, as its coordinator leaves it."""
    now = time.time()
    spec = made.record(
        folder,
        uri=uri,
        sweep_id=uuid.uuid4().hex,
        metric=METRICS[0],
        direction=Direction.MINIMIZE,
        created_at=now,
    )
    ledger = Ledger.create(folder, spec)
    for each in range(trials):
        _add_trial(ledger, folder / f"trials/{each}", each, now)
    ledger.commit()
    ledger.close()


def _add_trial(ledger: Ledger, folder: Path, each: int, now: float) -> None:
    given = upload_clients.params(each)
    ledger.add_trials([
        NewTrial(
            number=each, identity=f"{each:064x}", directory=f"trials/{each}",
            overrides=tuple(f"{key}={value}" for key, value in given.items()),
            params=given, repeat={}, config=upload_clients.config(each),
        )
    ])  # fmt: skip
    folder.mkdir(parents=True)
    (folder / LOG_NAME).write_text(_LOG, encoding="utf-8")
    (folder / RECORD_NAME).write_text(_RECORD, encoding="utf-8")
    ledger.start_attempt(
        Attempt(
            id=f"{each}-0", trial=each, ordinal=0, worker="worker", slot=0, host="node", state=TrialState.RUNNING,
            kind=None, message=None, metrics={}, started_at=now, ended_at=None, code=ledger.spec.code,
        )
    )  # fmt: skip
    reports = [
        NewReport(seq=step, step=step, time=now + step, metrics=values)
        for step, values in upload_clients.curve(each)
    ]
    ledger.add_reports(f"{each}-0", reports)
    outcome = Outcome(
        state=TrialState.COMPLETE, kind=None, message=None, metrics=reports[-1].metrics, ended_at=now + STEPS
    )
    ledger.finish_attempt(f"{each}-0", outcome, again=False)
