"""What all benchmarks share: a project to run, the systems to run it with, and honest stamps.

Every task writes ``time.time()`` at its first and last statement into one file, whatever system runs it; the makespan
of all systems is taken from there. For us the ledger's figure, from handing out to the recorded end, is kept too: it
is the stricter one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.spans import Span

_ROOT = Path(__file__).parents[1]
TIMEOUT_S = 900.0
_POLL_S = 0.25
_TASK = '''\
"""A benchmark's task: it notes its own start and end."""

import time
{imports}


def train(cfg):
    started = time.time()
    {body}
    with open({stamps!r}, "a") as file:
        file.write(f"{{started}} {{time.time()}}\\n")
    return {{"value": float({value})}}
'''
_APP = """\
from pathlib import Path

import hydra
from task import train

hydra.main(version_base="1.3", config_path=str(Path(__file__).with_name("conf")), config_name="config")(train)()
"""
# 25 values in four groups: the size of a small study's config
_CONF = {
    "config": "defaults: [data: digits, model: lstm, optimizer: adam, trainer: short, _self_]\nx: 0\ny: 0\nseed: 0\n",
    "data/digits": "{name: digits, validation_fraction: 0.2, test_fraction: 0.2, split_seed: 0, augment: [shift]}",
    "model/lstm": "{name: lstm, bidirectional: false, hidden_size: 64, layers: 2, dropout: 0.1, init: {name: xavier}}",
    "optimizer/adam": "{name: adam, lr: 0.01, beta1: 0.9, beta2: 0.999, weight_decay: 0.0, amsgrad: false}",
    "trainer/short": "{epochs: 20, batch_size: 32, clip: 1.0, patience: 5}",
}
_SWEEP = """\
defaults: [base_sweep, sampler: {sampler}, executor: local, _self_]
name: bench
task: task.train
metric: value
params: {params}
"""
_STORE = """
import sys
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
SqlAlchemyStore(*sys.argv[1:])
"""


class BenchmarkError(Exception):
    """Something did not run as it must for its figures to mean anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """First start to last end of ``trials`` trials, by the tasks' own stamps, and by our ledger where it is ours."""

    trials: int
    makespan_s: float
    ledger_s: float = 0.0
    first_start_s: float = 0.0
    """From the command's start to the first trial's."""
    after_s: float = 0.0
    """From the last trial's end to the command's."""
    peak_rss_mb: float = 0.0
    """Of the command's own process."""
    tracked: int = 0
    """Trials that the embedded MLflow store has at the end."""

    @property
    def command_s(self) -> float:
        """From the command's start to its end."""
        return self.first_start_s + (self.ledger_s or self.makespan_s) + self.after_s

    @property
    def per_trial_ms(self) -> float:
        """Milliseconds a trial."""
        return self.makespan_s / self.trials * 1000


class Project:
    """A Hydra application in a folder of its own, which runs under our front door and under plain Hydra."""

    def __init__(
        self,
        folder: Path,
        *,
        params: str = "{}",
        imports: str = "",
        body: str = "pass",
        value: str = "cfg.x",
        sampler: str = "grid",
        conf: str = "",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self._stamps = folder / "stamps.txt"
        files = {f"conf/{name}.yaml": text for name, text in _CONF.items()}
        files["conf/config.yaml"] += conf
        files["conf/sweep/bench.yaml"] = _SWEEP.format(params=params, sampler=sampler)
        files["task.py"] = _TASK.format(imports=imports, body=body, value=value, stamps=str(self._stamps))
        files["app.py"] = _APP
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        self._env = dict(env or {})
        self._ledger = folder / "multirun/bench/ledger.db"

    def make_store(self) -> None:
        """Make the MLflow store, as `mlflow ui` and a project's first sweep do: that takes seconds."""
        command = [sys.executable, "-W", "ignore", "-c", _STORE, "sqlite:///mlflow.db", "mlartifacts"]
        run(command, self.folder)

    def peer(
        self,
        command: Sequence[str],
        trials: int,
        python: str | Path = sys.executable,
    ) -> Times:
        """Run another system's command here with its Python; it runs ``trials`` trials of the task."""
        self._stamps.unlink(missing_ok=True)
        began = time.time()
        own = (
            {"PYTHONPATH": ""} if str(python) != sys.executable else {}
        )  # an environment with nothing of ours
        with started([str(python), *command], self.folder, self._env | own) as process:
            _wait(process, self.folder)
        ended = time.time()
        spans = self.stamps(trials)
        return Times(
            trials=trials,
            makespan_s=_makespan(spans),
            first_start_s=min(span.started_s for span in spans) - began,
            after_s=ended - max(span.ended_s for span in spans),
        )

    def sweep(
        self,
        trials: int,
        *overrides: str,
        upload: bool = True,
        only_start: bool = False,
        stamped: int | None = None,
        watch: Callable[[int, int], None] | None = None,
    ) -> Times:
        """Run the sweep through our front door.

        Args:
            trials: how many there are; all must be COMPLETE at the end.
            overrides: of the command line, behind ``+sweep=bench``.
            upload: wait until MLflow has everything; else interrupt that.
            only_start: interrupt as soon as a trial has started.
            stamped: how many run this time, where some have before.
            watch: called with the command's process and the number of trials that are over, while it runs.
        """
        self._stamps.unlink(missing_ok=True)
        began, peak = time.time(), 0.0
        with started([*front_door(), "+sweep=bench", *overrides], self.folder, self._env) as process:
            while process.poll() is None:
                if time.time() - began > TIMEOUT_S:
                    raise self._failed("not over in time")
                peak = max(peak, memory_mb(process.pid, "VmHWM"))
                begun, over = self._look()
                if watch is not None:
                    watch(process.pid, over)
                if begun and (only_start or (over == trials and not upload)):
                    process.send_signal(signal.SIGINT)  # the first drains, later ones stop
                    time.sleep(2.0)
                time.sleep(_POLL_S)
        ended = time.time()
        first, last, held, complete = self._recorded()
        if held != trials or complete < (1 if only_start else trials):
            raise self._failed(
                f"{complete} of {held} trials complete, {trials} wanted, status {process.returncode}"
            )
        return Times(
            trials=trials,
            makespan_s=0.0 if only_start else _makespan(self.stamps(stamped or trials)),
            ledger_s=last - first,
            first_start_s=first - began,
            after_s=ended - last,
            peak_rss_mb=peak,
            tracked=self._tracked(),
        )

    def _look(self) -> tuple[int, int]:
        """How many attempts have started, and how many trials are over."""
        try:
            with contextlib.closing(_read_only(self._ledger)) as db:
                started = db.execute("SELECT count(*) FROM attempts").fetchone()[0]
                over = db.execute(
                    "SELECT count(*) FROM trials WHERE state NOT IN ('WAITING', 'RUNNING')"
                ).fetchone()[0]
                return int(started), int(over)
        except sqlite3.OperationalError:
            return 0, 0  # not there yet

    def _recorded(self) -> tuple[float, float, int, int]:
        """First start, last end, how many trials there are, how many attempts are complete."""
        try:
            with contextlib.closing(_read_only(self._ledger)) as db:
                first, last = db.execute("SELECT min(started_at), max(ended_at) FROM attempts").fetchone()
                held = db.execute("SELECT count(*) FROM trials").fetchone()[0]
                complete = db.execute("SELECT count(*) FROM attempts WHERE state = 'COMPLETE'").fetchone()[0]
        except sqlite3.OperationalError as error:
            raise self._failed(str(error)) from error
        return float(first or 0), float(last or 0), int(held), int(complete)

    def _tracked(self) -> int:
        try:
            with contextlib.closing(_read_only(self.folder / "mlflow.db")) as db:
                return max(
                    0, db.execute("SELECT count(*) FROM runs").fetchone()[0] - 1
                )  # all but the sweep's own
        except sqlite3.OperationalError:
            return 0

    def stamps(self, trials: int) -> list[Span]:
        """When each trial of the last run began and ended, by the tasks' own stamps."""
        lines = self._stamps.read_text(encoding="utf-8").splitlines() if self._stamps.exists() else []
        if len(lines) != trials:
            raise self._failed(f"{len(lines)} of {trials} trials left their stamps")
        pairs = [tuple(map(float, line.split())) for line in lines]
        return [Span(started_s=start, ended_s=end) for start, end in pairs]

    def ledger(self) -> list[Span]:
        """When each attempt was handed out, and when its end was recorded."""
        with contextlib.closing(_read_only(self._ledger)) as db:
            rows = db.execute("SELECT trial, worker, slot, started_at, ended_at FROM attempts").fetchall()
        return [
            Span(trial=trial, slot=f"{worker}/{slot}", started_s=start, ended_s=end)
            for trial, worker, slot, start, end in rows
        ]

    def _failed(self, why: str) -> BenchmarkError:
        return failed(self.folder, why)


def _makespan(spans: Sequence[Span]) -> float:
    return max(span.ended_s for span in spans) - min(span.started_s for span in spans)


def cache() -> Path:
    """Where what takes long to make is kept from run to run."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "repro-sweep-benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def copy_study(folder: Path) -> None:
    """Put the repository's reference study into a folder."""
    for name in ("conf", "sweeps"):
        shutil.copytree(_ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def ledger(folder: Path, sweep: str) -> contextlib.closing[sqlite3.Connection]:
    """The ledger of a sweep in a folder, to be read."""
    return contextlib.closing(_read_only(folder / "multirun" / sweep / "ledger.db"))


def outcome(db: sqlite3.Connection) -> tuple[dict[str, int], float]:
    """How many trials a ledger has in each state, and the seconds from the first hand-out to the last end."""
    states = dict(db.execute("SELECT state, count(*) FROM trials GROUP BY state").fetchall())
    first, last = db.execute("SELECT min(started_at), max(ended_at) FROM attempts").fetchone()
    return states, last - first


def front_door() -> list[str]:
    """The command that users run; its module where the package is not installed."""
    script = Path(sys.executable).with_name("repro-sweep")
    return [str(script)] if script.exists() else [sys.executable, "-m", "repro_sweep.cli.main"]


@contextlib.contextmanager
def started(
    command: Sequence[str], folder: Path, extra: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in a folder, its output in ``output.txt`` there; it ends with the block at the latest."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_TRACKING")}
    env |= {"DO_NOT_TRACK": "1", **extra}
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        stop(process)


def run(command: Sequence[str], folder: Path) -> None:
    """Run a command in a folder to its end, which must be a good one."""
    with started(command, folder, {}) as process:
        _wait(process, folder)


def _wait(process: subprocess.Popen[bytes], folder: Path) -> None:
    try:
        status = process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise failed(folder, "not over in time") from None
    if status != 0:
        raise failed(folder, f"status {status}")


def failed(folder: Path, why: str) -> BenchmarkError:
    """What the command that ran in a folder said last."""
    output = (folder / "output.txt").read_text(errors="replace")
    return BenchmarkError(f"{folder}: {why}\n{output[-3000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and what is left of its group."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def best_of(count: int, command: Sequence[str]) -> float:
    """The shortest of ``count`` runs of a command, in seconds."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - began)
    return min(times)


def _read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10.0)


def memory_mb(pid: int, figure: str = "VmRSS") -> float:
    """The memory of a process, as the kernel names it in ``status``; 0 where there is no such process."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{figure}:"):
                return int(line.split()[1]) / 1024
    return 0.0


def child(pid: int, what: str) -> int | None:
    """The child of a process whose command line contains ``what``."""
    for each in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for found in each.read_text(encoding="utf-8").split():
                if what.encode() in Path(f"/proc/{found}/cmdline").read_bytes():
                    return int(found)
    return None


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
