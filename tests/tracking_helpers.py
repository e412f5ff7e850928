"""What the tests of tracking and ranking share: ledgers made by hand, a real MLflow server, and a treacherous proxy."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers import await_health, free_port

from repro_sweep.lease import Lease
from repro_sweep.ledger import Ledger
from repro_sweep.records import Attempt, NewReport, NewTrial, Outcome
from repro_sweep.states import Direction, FailureKind, TrialState
from repro_sweep.sweep import Composition, Origin, Resources, SweepSpec, TaskSpec, Tracking
from repro_sweep.tracking.encoding import Curve, milliseconds, points_of
from repro_sweep.tracking.mlflow import MlflowTracker

CONFIG = """\
model:
  name: lstm
  hidden: 64
optimizer:
  name: Adam
  lr: 0.01
  betas:
  - 0.9
  - 0.999
tiny: 1.0e-05
nothing: null
shuffle: true
"""
START = 1_700_000_000.0

Points = set[tuple[str, int, int, str]]


def make_spec(directory: Path, uri: str, *, experiment: str = "experiment", **changes: Any) -> SweepSpec:
    """A sweep's record."""
    values: dict[str, Any] = {
        "sweep_id": uuid.uuid4().hex,
        "name": "grid",
        "directory": str(directory),
        "task": TaskSpec(module="sweeps.digits", qualname="train", cwd="/"),
        "composition": Composition(
            config_name="config", search_path=(), hydra_overrides=(), job_name="digits", version_base=None
        ),
        "resources": Resources(),
        "tracking": Tracking(uri=uri, experiment=experiment),
        "origin": Origin(user="ada", host="login", command="repro-sweep +sweep=grid", git_commit="c" * 40),
        "metric": "accuracy",
        "direction": Direction.MAXIMIZE,
        "executor_name": "local",
        "executor": {},
        "sampler": "grid",
        "max_failures": None,
        "log_limit_mb": 1.0,
        "created_at": START,
        "repeats": ("seed",),
    }
    return SweepSpec(**(values | changes))


def make_ledger(directory: Path, uri: str, **changes: Any) -> Ledger:
    """The ledger of a new sweep."""
    directory.mkdir(parents=True, exist_ok=True)
    return Ledger.create(directory, make_spec(directory, uri, **changes))


def next_coordinator(ledger: Ledger, lease: Lease | None = None) -> tuple[Ledger, Lease]:
    """The ledger of a sweep and its lease as its next coordinator has them; the one before has ended well."""
    if lease is not None:
        lease.release(ledger)
        ledger.commit()
        lease.drop()
    ledger.close()
    mine = Ledger.open(ledger.path.parent)
    return mine, Lease.acquire(mine, "grid")


def add_trial(
    ledger: Ledger,
    number: int,
    params: Mapping[str, object] | None = None,
    *,
    repeat: Mapping[str, object] | None = None,
    config: str = CONFIG,
    overrides: Sequence[str] | None = None,
) -> None:
    """A trial that waits, with its directory and log."""
    params = {"optimizer.lr": number / 10} if params is None else params
    repeat = {"seed": 0} if repeat is None else repeat
    words = [f"{key}={value}" for key, value in {**params, **repeat}.items()]
    trial = NewTrial(
        number=number,
        identity=f"{number:064x}",
        directory=f"trials/{number}",
        overrides=tuple(words if overrides is None else overrides),
        params=params,
        repeat=repeat,
        config=config,
    )
    ledger.add_trials([trial])
    folder = ledger.path.parent / "trials" / str(number)
    (folder / "artifacts").mkdir(parents=True)
    (folder / "trial.log").write_text(f"log of trial {number}\n")
    ledger.commit()


def start(ledger: Ledger, number: int, *, ordinal: int = 0, at: float = START, host: str = "node") -> str:
    """Start an attempt; returns its id."""
    attempt = f"{number}-{ordinal}"
    ledger.start_attempt(
        Attempt(
            id=attempt,
            trial=number,
            ordinal=ordinal,
            worker="worker",
            slot=0,
            host=host,
            state=TrialState.RUNNING,
            kind=None,
            message=None,
            metrics={},
            started_at=at,
            ended_at=None,
            code=ledger.spec.code,
        )
    )
    ledger.commit()
    return attempt


def report(ledger: Ledger, number: int, attempt: str, steps: range, *, at: float = START) -> None:
    """Report two metrics at some steps, a second apart."""
    found = ledger.attempt(attempt)
    assert found is not None
    reports = [
        NewReport(
            seq=seq,
            step=step,
            time=at + step,
            metrics={"accuracy": number + step / 1000, "loss": 1.0 / (step + 1)},
        )
        for seq, step in enumerate(steps, found.reports)
    ]
    assert ledger.add_reports(attempt, reports)
    ledger.commit()


def end(
    ledger: Ledger,
    number: int,
    attempt: str,
    metrics: Mapping[str, float] | None = None,
    *,
    state: TrialState = TrialState.COMPLETE,
    kind: FailureKind | None = None,
    message: str | None = None,
    at: float = START + 100,
    again: bool = False,
    cancelled: bool = False,
) -> None:
    """End an attempt."""
    outcome = Outcome(state=state, kind=kind, message=message, metrics=metrics or {}, ended_at=at)
    assert ledger.finish_attempt(attempt, outcome, again=again, cancelled=cancelled)
    ledger.commit()


def run_trial(ledger: Ledger, number: int, metrics: Mapping[str, float], *, steps: int = 3) -> None:
    """A trial from start to its end."""
    attempt = start(ledger, number)
    report(ledger, number, attempt, range(steps))
    end(ledger, number, attempt, metrics)


def drain(directory: Path, *, timeout_s: float = 60.0) -> None:
    """Upload everything, in this process."""
    woken = threading.Event()
    tracker = MlflowTracker(directory, wake=woken.set)
    deadline = time.monotonic() + timeout_s
    try:
        tracker.finish()
        while not tracker.progress.done:
            assert time.monotonic() < deadline, tracker.progress
            woken.wait(tracker.sync())
            woken.clear()
    finally:
        tracker.close()


def runs_of(uri: str, *, sweep: bool = False, sweep_id: str | None = None) -> list[Any]:
    """All runs of sweeps, or of trials, in a store or of one sweep, by trial number."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    kind = "sweep" if sweep else "trial"
    condition = f"tags.`repro_sweep.kind` = '{kind}'"
    if sweep_id is not None:
        condition += f" and tags.`repro_sweep.sweep_id` = '{sweep_id}'"
    found = client.search_runs(experiments, condition, max_results=5000)
    return sorted(found, key=lambda run: int(run.data.tags.get("repro_sweep.trial", 0)))


def points_in(uri: str, run: Any) -> list[tuple[str, int, int, str]]:
    """All points of a run, duplicates and all."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    return [
        (each.key, each.timestamp, each.step, repr(each.value))
        for key in run.data.metrics
        for each in client.get_metric_history(run.info.run_id, key)
    ]


def points_of_ledger(ledger: Ledger, number: int) -> Points:
    """All points that a finished trial's run must have."""
    curve = Curve()
    points: Points = set()
    for each in ledger.reports(trial=number):
        reported = points_of(each.metrics, step=each.step, at=each.time)
        curve.add(reported)
        points |= {(point.key, point.at_ms, point.step, repr(point.value)) for point in reported}
    latest = ledger.attempts(number)[-1]
    for point in curve.final(latest.metrics, latest.ended_at):
        assert point.at_ms >= milliseconds(latest.ended_at or 0)
        points.add((point.key, point.at_ms, point.step, repr(point.value)))
    return points


def assert_equal_to_ledger(ledger: Ledger, uri: str) -> None:
    """One run for each trial, and in each exactly the points of the ledger."""
    runs = runs_of(uri)
    assert [int(run.data.tags["repro_sweep.trial"]) for run in runs] == [
        number for number, _ in ledger.states()
    ]
    assert len(runs_of(uri, sweep=True)) == 1
    for run in runs:
        number = int(run.data.tags["repro_sweep.trial"])
        points = points_in(uri, run)
        assert len(points) == len(set(points))
        assert set(points) == points_of_ledger(ledger, number)
        assert run.data.tags["repro_sweep.state"] == ledger.trial(number).state
        assert run.info.status == "FINISHED"


_SERVER = pytest.StashKey[str]()


def shared_server(config: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a real MLflow server that is started once and stopped after the last test of all modules."""
    if _SERVER not in config.stash:
        stack = contextlib.ExitStack()
        config.add_cleanup(stack.close)
        config.stash[_SERVER] = stack.enter_context(
            mlflow_server(tmp_path_factory.mktemp("server"), free_port())
        )
    return config.stash[_SERVER]


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """A real MLflow server with a SQLite store and proxied artifacts; yields its URI when it answers."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    uri = f"http://127.0.0.1:{port}"
    # without the processes for jobs of its own that no test asks for
    extra = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | extra, stdout=log, stderr=log, start_new_session=True
        )
    try:
        await_health(process, uri, folder / "server.log")
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: the server and its one worker
        process.wait()


@dataclass
class Proxy:
    """Stands before a server and may spoil its replies.

    ``spoil`` is given the method and the path of each request and returns None (all well), a status to answer with
    without asking the server, ``"drop"``: the server does what it was asked, and its reply is lost, or ``"late"``: the
    reply is an error, and yet the server will do what it was asked a second later. ``failures`` are the requests that
    the server itself has answered with an error, or not at all.
    """

    port: int
    spoil: Callable[[str, str], int | str | None] = lambda _method, _path: None
    seen: list[tuple[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    connections: int = 0
    late: int = 0
    spoilt_late: int = 0
    uri: str = ""


def _body_of(request: BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    body = b""
    while size := int(request.rfile.readline().partition(b";")[0], 16):
        body += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return body


def _passed_on(
    proxy: Proxy, target: str, request: tuple[str, str, bytes, dict[str, str]]
) -> tuple[int, dict[str, str], bytes]:
    """What the server answers; that it failed is noted."""
    try:
        with contextlib.closing(http.client.HTTPConnection(target, timeout=30)) as connection:
            connection.request(*request)
            with connection.getresponse() as response:
                status, headers, content = response.status, dict(response.getheaders()), response.read()
    except (OSError, http.client.HTTPException) as error:
        proxy.failures.append(f"{request[0]} {request[1]}: {error}")
        raise
    if status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
        proxy.failures.append(f"{request[0]} {request[1]}: {status} {content[:200]!r}")
    return status, headers, content


@contextlib.contextmanager
def proxy_before(server: str) -> Iterator[Proxy]:
    """A proxy before a server, on a port of its own."""
    proxy = Proxy(port=0)
    target = server.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            proxy.connections += 1
            super().setup()

        def _handle(self) -> None:
            body = _body_of(self)
            proxy.seen.append((self.command, self.path))
            verdict = proxy.spoil(self.command, self.path)
            if isinstance(verdict, int):
                self._reply(verdict, {}, b"{}")
                return
            if verdict == "late":
                proxy.spoilt_late += 1
                self._reply(503, {}, b"{}")
                time.sleep(1.0)
            headers = {
                key: value
                for key, value in self.headers.items()
                if key.lower() not in {"host", "transfer-encoding", "content-length"}
            }
            headers["Host"] = target
            status, found, content = _passed_on(proxy, target, (self.command, self.path, body, headers))
            if verdict == "late":
                proxy.late += 1
            elif verdict == "drop":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self._reply(status, found, content)

        def _reply(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
            self.send_response(status)
            for key, value in headers.items():
                if key.lower() not in {"content-length", "transfer-encoding", "connection", "date", "server"}:
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815  (http.server's names)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    proxy.port = listener.server_address[1]
    proxy.uri = f"http://127.0.0.1:{proxy.port}"
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
