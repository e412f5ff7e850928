"""What the tests share: small projects on disk, and the real command line run in them."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import Self
from urllib.parse import urlsplit

from repro_sweep.ledger import Ledger
from repro_sweep.records import Attempt, NewTrial, Outcome, Trial
from repro_sweep.states import Direction, FailureKind, TrialState
from repro_sweep.sweep import Composition, Limits, Origin, Resources, SweepSpec, TaskSpec, Tracking

CONSOLE_SCRIPT = Path(sys.executable).with_name("repro-sweep")
TIMEOUT_S = 300.0
MARK = "REPRO_SWEEP_TEST_MARK"
_POLL_S = 0.01
_READY_S = 120.0
_FOREIGN = (
    "MLFLOW_", "OMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "VECLIB_", "CUDA_", "REPRO_SWEEP_", "HYDRA_",
)  # fmt: skip


MakeProject = Callable[..., "Project"]


def environment(extra: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """The environment for a command: this one's without what would change a sweep; None takes a variable out."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
    clean |= {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""}
    for key, value in (extra or {}).items():
        if value is None:
            clean.pop(key, None)
        else:
            clean[key] = value
    return clean


def run(
    *arguments: str | Path,
    cwd: Path,
    env: Mapping[str, str | None] | None = None,
    timeout: float = TIMEOUT_S,
    python: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run ``repro-sweep`` in ``cwd`` to its end, or Python where ``python`` is set."""
    command = [sys.executable, *arguments] if python else [CONSOLE_SCRIPT, *quickly(arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment(env), timeout=timeout, capture_output=True, text=True
    )


def quickly(arguments: Sequence[str | Path]) -> list[str | Path]:
    """The arguments of ``repro-sweep``; a sweep draws no report unless it is asked to: many a test takes no longer."""
    words = list(map(str, arguments))
    runs = bool(words) and re.fullmatch(r"\+sweep=\w+", words[0]) is not None
    asked = any("sweep.report" in word for word in words)
    if not runs or asked:
        return list(arguments)
    return [arguments[0], "sweep.report=false", *arguments[1:]]  # Hydra's own options come after overrides


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def eventually(condition: Callable[[], object], what: str, timeout_s: float = 120.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(_POLL_S)


def await_health(process: subprocess.Popen[bytes], uri: str, log: Path) -> None:
    """Wait until an MLflow server answers."""
    where = urlsplit(uri)
    assert where.hostname is not None
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        connection = http.client.HTTPConnection(where.hostname, where.port, timeout=2)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
            connection.request("GET", "/health")
            with connection.getresponse() as response:
                if response.status == 200:
                    return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def write(folder: Path, files: Mapping[str, str]) -> Path:
    """Write files by their path below a folder, which is returned."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@dataclass
class Project:
    """A folder with a ``conf/`` and a task, and what ran in it."""

    root: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def write(self, files: Mapping[str, str]) -> None:
        """Write files by their path below the project's folder; their indentation does not matter."""
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dedent(text), encoding="utf-8")

    def run(
        self, *arguments: str, env: Mapping[str, str | None] | None = None, python: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run ``repro-sweep`` (or Python) here to its end."""
        return run(*arguments, cwd=self.root, env={MARK: self.mark, **(env or {})}, python=python)

    def start(self, *arguments: str, env: Mapping[str, str | None] | None = None) -> Running:
        """Start ``repro-sweep`` here."""
        return Running(self, arguments, environment({MARK: self.mark, **(env or {})}))

    def files(self) -> dict[str, int]:
        """All files and folders with the time of their last change."""
        return {str(path.relative_to(self.root)): path.stat().st_mtime_ns for path in self.root.rglob("*")}

    def sweep(self, name: str) -> Sweep:
        """What the ledger of a sweep says."""
        return Sweep.read(self.root / "multirun" / name)

    def processes(self) -> dict[int, str]:
        """The command lines of all processes that a command run here has left."""
        found = {}
        needle = f"{MARK}={self.mark}".encode()
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                if needle in (folder / "environ").read_bytes().split(b"\0"):
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                    found[int(folder.name)] = b" ".join(words).decode(errors="replace")
            except OSError:
                continue
        return found

    def until_all_have_ended(self) -> None:
        """Wait until nothing runs; a tracker that imports MLflow sees only then that its coordinator is gone."""
        eventually(lambda: not self.processes(), "all processes have ended")

    def processes_of(self, module: str) -> dict[int, str]:
        """Those of :meth:`processes` that run a module of ours and were not forked from another of them."""
        found = {pid: line for pid, line in self.processes().items() if f"-m {module}" in line}
        return {pid: line for pid, line in found.items() if _parent(pid) not in found}


@dataclass(frozen=True)
class Sweep:
    """A sweep's ledger at one time."""

    directory: Path
    trials: tuple[Trial, ...]
    attempts: tuple[Attempt, ...]

    @classmethod
    def read(cls, directory: Path) -> Sweep:
        """Read the ledger in a sweep's folder."""
        ledger = Ledger.open(directory, readonly=True)
        try:
            trials = sorted(ledger.trials(), key=lambda trial: trial.number)
            return cls(directory, tuple(trials), tuple(ledger.attempts()))
        finally:
            ledger.close()

    def states(self) -> Counter[TrialState]:
        """How many trials are in each state."""
        return Counter(trial.state for trial in self.trials)

    def by(self, key: str) -> dict[object, Trial]:
        """The trials by the value of one of their swept keys."""
        return {trial.params[key]: trial for trial in self.trials}

    def last_attempt(self, trial: Trial) -> Attempt:
        """The latest attempt of a trial."""
        return [attempt for attempt in self.attempts if attempt.trial == trial.number][-1]

    def folder(self, trial: Trial) -> Path:
        """The folder of a trial."""
        return self.directory / trial.directory


class Running:
    """A command that has not ended; what it prints goes to files."""

    def __init__(self, project: Project, arguments: tuple[str, ...], env: dict[str, str]) -> None:
        self._err = project.root / f"stderr-{uuid.uuid4().hex[:8]}"
        with self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [CONSOLE_SCRIPT, *quickly(arguments)], cwd=project.root, env=env, stdout=subprocess.DEVNULL, stderr=err,
                start_new_session=True,
            )  # fmt: skip

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return self._err.read_text()

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until a condition holds; the command must not end before."""

        def holds() -> bool:
            done = bool(condition())
            assert done or self.process.poll() is None, f"ended before: {what}\n{self.stderr}"
            return done

        eventually(holds, what)

    def interrupt(self, then: str) -> None:
        """Send Ctrl-C's signal and wait until the command says ``then``."""
        self.process.send_signal(signal.SIGINT)
        self.until(lambda: then in self.stderr, f"it says '{then}'")

    def wait(self, timeout: float = TIMEOUT_S) -> int:
        """Wait for its end; returns the exit status."""
        return self.process.wait(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def a_spec(directory: Path, **changes: object) -> SweepSpec:
    """The record of a sweep that nobody will run."""
    spec = SweepSpec(
        sweep_id="id", name="unit", directory=str(directory), task=TaskSpec(module="m", qualname="f", cwd="/"),
        composition=Composition(
            config_name="config", search_path=(), hydra_overrides=(), job_name="m", version_base="1.3"
        ),
        resources=Resources(), tracking=Tracking(uri="sqlite:////tmp/mlflow.db", experiment="unit"),
        origin=Origin(user="u", host="h", command="c"), metric="score", direction=Direction.MAXIMIZE,
        executor_name="local", executor={}, sampler="grid", max_failures=None, log_limit_mb=1.0, created_at=0.0,
        limits=Limits(retries={FailureKind.NODE_LOST: 10}),
    )  # fmt: skip
    return spec.model_copy(update=changes)


def a_ledger(directory: Path, spec: SweepSpec | None = None) -> Ledger:
    """A ledger with three waiting trials."""
    made = Ledger.create(directory, spec or a_spec(directory))
    made.add_trials(new_trial(number) for number in range(3))
    made.commit()
    return made


def new_trial(number: int) -> NewTrial:
    """A trial to record."""
    return NewTrial(
        number=number, identity=f"identity-{number}", directory=f"trials/{number}", overrides=(f"x={number}",),
        params={"x": number}, repeat={"seed": 0}, config=f"x: {number}\n",
    )  # fmt: skip


def attempt(number: int, ident: str = "a", *, ordinal: int = 0) -> Attempt:
    """A started attempt of a trial."""
    return Attempt(
        id=ident, trial=number, ordinal=ordinal, worker="w", slot=0, host="h", state=TrialState.RUNNING, kind=None,
        message=None, metrics={}, started_at=1.0, ended_at=None,
    )  # fmt: skip


def complete(**metrics: float) -> Outcome:
    """A good end."""
    return Outcome(state=TrialState.COMPLETE, metrics=metrics, ended_at=2.0)


def failed(kind: FailureKind = FailureKind.EXCEPTION) -> Outcome:
    """A bad end."""
    return Outcome(state=TrialState.FAIL, kind=kind, message="why", metrics={}, ended_at=2.0)


def kill_all(processes: Mapping[int, str]) -> None:
    """Kill what a test has left behind."""
    for pid in processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def projects(folder: Path, store: Path | None) -> Iterator[Callable[..., Project]]:
    """Makes projects, each with a copy of an empty MLflow store; kills what they leave behind at the end."""
    made: list[Project] = []

    def make(files: Mapping[str, str], *, name: str = "project") -> Project:
        project = Project(folder / name)
        project.root.mkdir()
        project.write(files)
        if store is not None:
            shutil.copy(store, project.root / "mlflow.db")
        made.append(project)
        return project

    yield make
    for project in made:
        kill_all(project.processes())


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
