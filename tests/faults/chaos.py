"""Sweeps whose every execution leaves a trace, and the checks that nothing was lost and nothing done twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from helpers import CONSOLE_SCRIPT, MARK, Project, Running, Sweep, environment, eventually, projects
from tracking_helpers import points_in, points_of_ledger, runs_of

from repro_sweep.lease import address_of
from repro_sweep.ledger import Ledger
from repro_sweep.ranking import rank
from repro_sweep.records import Attempt
from repro_sweep.states import TrialState

AGENT = "repro_sweep.worker.agent"
ZYGOTE = "repro_sweep.worker.zygote"
TRACKER = "repro_sweep.tracking.process"
STEPS = 4
SLOTS = 2
MAKE_SWEEP = (
    "+sweep=default",
    "sweep.task=tasks.train",
    "sweep.metric=score",
    f"sweep.executor.slots={SLOTS}",
)
_FILES = {
    "tasks.py": """
        import os
        import time
        from pathlib import Path
        import repro_sweep

        def train(cfg):
            mark(cfg.x, "start")
            print("x is", cfg.x)  # so that its log is not empty
            for step in range(4):
                time.sleep(cfg.pause)
                repro_sweep.report(step, score=value(cfg.x) / (step + 2), step=step)
            while Path("hold").exists() and Path("hold").read_text() in ("all", str(cfg.x)):
                time.sleep(0.01)
            mark(cfg.x, "end")
            return {"score": value(cfg.x)}

        def value(x):
            return x * 7919 % 1009 / 1009  # 1009 is a prime: no two trials are equal

        def mark(x, what):
            line = f"{x} {os.environ['REPRO_SWEEP_ATTEMPT']} {what} {time.time():.6f}\\n"
            fd = os.open("executions", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.write(fd, line.encode())
            os.close(fd)
    """,
}  # fmt: skip

Ranked = list[tuple[int, tuple[tuple[str, object], ...], float | None, int, tuple[int, ...]]]


@dataclass(frozen=True)
class Execution:
    """A line that a trial wrote: its ``x``, its attempt, ``start`` or ``end``, and when (seconds UTC)."""

    x: int
    attempt: str
    what: str
    at: float


@dataclass(frozen=True)
class Finished:
    """What a sweep has ended with, as far as it must not depend on what happened on the way."""

    ranking: Ranked
    points: dict[int, list[tuple[str, int, str]]]


@dataclass
class Verdict:
    """What was counted in a sweep that has ended; all but ``trials``, ``attempts`` and ``executions`` must be 0."""

    trials: int = 0
    attempts: int = 0
    executions: int = 0
    lost: int = 0
    completed_twice: int = 0
    executed_after_completion: int = 0
    executions_unknown_to_the_ledger: int = 0
    attempts_executed_twice: int = 0
    overlapping_executions: int = 0
    runs_too_many: int = 0
    points_missing: int = 0
    points_twice: int = 0
    steps_twice_or_missing: int = 0
    differing_ranks: int = 0
    left_behind: int = 0
    remarks: list[str] = field(default_factory=list)

    @property
    def counted(self) -> dict[str, int]:
        """All of it by name."""
        return {key: value for key, value in vars(self).items() if isinstance(value, int)}

    @property
    def wrong(self) -> dict[str, int]:
        """What should be 0 and is not."""
        fine = {"trials", "attempts", "executions"}
        return {key: value for key, value in self.counted.items() if value and key not in fine}


class Command(Running):
    """A command whose stdout is kept too."""

    def __init__(self, project: Project, arguments: Sequence[str], env: dict[str, str]) -> None:
        name = uuid.uuid4().hex[:8]
        self._out, self._err = project.root / f"stdout-{name}", project.root / f"stderr-{name}"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [CONSOLE_SCRIPT, *arguments], cwd=project.root, env=env, stdout=out, stderr=err,
                start_new_session=True,
            )  # fmt: skip

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._out.read_text()


class Swarm:
    """A sweep over ``x``; what its trials do can be followed in the file ``executions``."""

    def __init__(self, project: Project, trials: int, options: Sequence[str], name: str) -> None:
        self.project = project
        self.trials = trials
        self.name = name
        self.options = (*MAKE_SWEEP, f"x=range({trials})", f"sweep.name={name}", *options)
        self.directory = project.root / "multirun" / name
        self.uri = f"sqlite:///{project.root}/mlflow.db"

    # --- what happens ----------------------------------------------------------------------------------------

    def start(self, *more: str, resume: bool = False, **env: str) -> Command:
        """Start the sweep, or go on with it."""
        if resume and self.started:
            return self.command("resume", str(self.directory), **env)
        return self.command(*self.options, *more, **env)

    def command(self, *arguments: str, **env: str) -> Command:
        """Start any command of ours."""
        return Command(self.project, arguments, environment({MARK: self.project.mark, **env}))

    def hold(self, what: str) -> None:
        """From now on ``all`` trials, or the one with this ``x``, do not end."""
        partial = self.project.root / ".hold"
        partial.write_text(what)
        partial.replace(self.project.root / "hold")

    def release(self) -> None:
        """Let all trials end."""
        (self.project.root / "hold").unlink(missing_ok=True)

    @property
    def started(self) -> bool:
        """Whether there is a ledger with trials."""
        return (self.directory / "ledger.db").exists() and bool(self.sweep.trials)

    @property
    def sweep(self) -> Sweep:
        """What the ledger says now."""
        return Sweep.read(self.directory)

    @property
    def epoch(self) -> int:
        """Of the coordinator that has announced itself last."""
        address = address_of(self.directory)
        return 0 if address is None else address.epoch

    @property
    def executions(self) -> list[Execution]:
        """What the trials have written, in its order."""
        file = self.project.root / "executions"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        words = [line.split() for line in lines]
        return [Execution(int(x), attempt, what, float(at)) for x, attempt, what, at in words]

    def count(self, what: str) -> int:
        """How many trials have written ``start`` or ``end``."""
        return sum(each.what == what for each in self.executions)

    def kept_results(self) -> list[Path]:
        """Results that no coordinator has taken yet."""
        return sorted(self.directory.glob("workers/*/results/*.json"))

    def pids(self, module: str) -> list[int]:
        """Processes of a module."""
        return list(self.project.processes_of(module))

    def trial_pids(self) -> list[int]:
        """The processes of trials."""
        found = []
        for zygote in self.pids(ZYGOTE):
            try:
                children = Path(f"/proc/{zygote}/task/{zygote}/children").read_text()
            except OSError:
                continue
            found += [int(pid) for pid in children.split()]
        return found

    # --- what must be true in the end ------------------------------------------------------------------------

    def finished(self, uri: str | None = None) -> Finished:
        """Read the ranking, and the metrics of all trials without their times."""
        ledger = Ledger.open(self.directory, readonly=True)
        points = {}
        for trial in ledger.trials():
            number = int(str(trial.params["x"]))
            found = [
                (name, each.step, repr(value))
                for each in ledger.reports(trial=trial.number)
                for name, value in each.metrics.items()
            ]
            points[number] = sorted(found)
        ledger.close()
        rows = rank(self.name, uri=uri or self.uri).rows
        ranking = [
            (row.rank, tuple(sorted(row.params.items())), row.mean, row.n, tuple(row.trials)) for row in rows
        ]
        return Finished(ranking=ranking, points=points)

    def verdict(self, undisturbed: Finished, uri: str | None = None) -> Verdict:
        """Count what was lost, done twice, or came out differently."""
        verdict = Verdict()
        self._look_for_the_left_behind(verdict)
        ledger = Ledger.open(self.directory, readonly=True)
        try:
            self._compare_executions(ledger, verdict)
            self._compare_points(ledger, uri or self.uri, verdict)
        finally:
            ledger.close()
        mine = self.finished(uri)
        verdict.differing_ranks = len(
            [1 for one, other in zip(mine.ranking, undisturbed.ranking, strict=False) if one != other]
        ) + abs(len(mine.ranking) - len(undisturbed.ranking))
        for x, points in undisturbed.points.items():
            if mine.points.get(x) != points:
                verdict.steps_twice_or_missing += 1
                verdict.remarks.append(f"x={x}: {mine.points.get(x)}")
        return verdict

    def _look_for_the_left_behind(self, verdict: Verdict) -> None:
        try:
            eventually(lambda: not self.project.processes(), "no process is left", 30)
        except AssertionError:
            left = self.project.processes()
            verdict.left_behind = len(left)
            verdict.remarks += [f"left behind: {line}" for line in left.values()]

    def _compare_executions(self, ledger: Ledger, verdict: Verdict) -> None:
        executions = self.executions
        starts = Counter(each.attempt for each in executions if each.what == "start")
        verdict.executions = sum(starts.values())
        verdict.attempts_executed_twice = sum(count > 1 for count in starts.values())
        attempts = {attempt.id: attempt for attempt in ledger.attempts()}
        verdict.attempts = len(attempts)
        verdict.executions_unknown_to_the_ledger = len(set(starts) - set(attempts))
        by_trial: dict[int, list[Attempt]] = {}
        for attempt in attempts.values():
            by_trial.setdefault(attempt.trial, []).append(attempt)
        for trial in ledger.trials():
            verdict.trials += 1
            mine = by_trial.get(trial.number, [])
            complete = [attempt for attempt in mine if attempt.state is TrialState.COMPLETE]
            if trial.state is not TrialState.COMPLETE or not complete:
                verdict.lost += 1
                verdict.remarks.append(f"trial {trial.number} is {trial.state}: {mine}")
                continue
            verdict.completed_twice += len(complete) > 1
            verdict.executed_after_completion += sum(
                attempt.ordinal > complete[0].ordinal for attempt in mine
            )
            x = int(str(trial.params["x"]))
            self._compare_times([each for each in executions if each.x == x], complete[0], attempts, verdict)
        verdict.lost += max(0, self.trials - verdict.trials)

    def _compare_times(
        self, lines: list[Execution], complete: Attempt, attempts: dict[str, Attempt], verdict: Verdict
    ) -> None:
        """A result is recorded after its stamp, so what starts before the stamp starts before it is recorded."""
        assert complete.ended_at is not None
        ordinals = {attempt.id: attempt.ordinal for attempt in attempts.values()}
        for each in lines:
            if each.what == "start" and each.at > complete.ended_at:
                verdict.executed_after_completion += 1
                verdict.remarks.append(f"{each} after {complete}")
            later = [
                other
                for other in lines
                if other.what == "start" and ordinals.get(other.attempt, 0) > ordinals.get(each.attempt, 0)
            ]
            if any(other.at < each.at for other in later):
                verdict.overlapping_executions += 1
                verdict.remarks.append(f"{each} after {later}")

    def _compare_points(self, ledger: Ledger, uri: str, verdict: Verdict) -> None:
        sweep_id = ledger.spec.sweep_id
        runs = runs_of(uri, sweep_id=sweep_id)
        verdict.runs_too_many = len(runs) - self.trials + len(runs_of(uri, sweep=True, sweep_id=sweep_id)) - 1
        for run in runs:
            number = int(run.data.tags["repro_sweep.trial"])
            there = points_in(uri, run)
            wanted = points_of_ledger(ledger, number)
            verdict.points_twice += len(there) - len(set(there)) + len(set(there) - wanted)
            verdict.points_missing += len(wanted - set(there))
            if wanted != set(there):
                verdict.remarks.append(
                    f"trial {number}: missing {wanted - set(there)}, more {set(there) - wanted}"
                )


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> bool:
    """Send a signal to a process; returns whether it was there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def end_leftovers(swarm: Swarm, module: str) -> None:
    """Kill what a killed coordinator has left of a module, and wait for its end."""
    pids = swarm.pids(module)
    for pid in pids:
        kill(pid)
    eventually(lambda: not set(pids) & set(swarm.project.processes()), f"{module} is gone")


def kill_coordinators(
    swarm: Swarm, kills: int, rng: random.Random, *, pause_s: float, start_s: float, **env: str
) -> None:
    """Start the sweep so many times, each time kill its command at a random instant before all trials have ended.

    ``pause_s`` is between the steps of a trial; a command needs about ``start_s`` before its trials start.
    """
    for left in range(kills, 0, -1):
        left_s = (swarm.trials - swarm.count("end")) * (STEPS * pause_s + 0.02) / SLOTS
        at_s = rng.random() * (start_s + 2 * left_s / left)
        with swarm.start(resume=rng.random() < 0.5, **env) as command:
            assert not wait_at_most(at_s, lambda: command.process.poll() is not None), command.stderr
            command.process.kill()
            assert command.wait() == -signal.SIGKILL


def wait_at_most(seconds: float, over: Callable[[], object]) -> bool:
    """Wait so long, or until it is over; returns whether it is."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if over():
            return True
        time.sleep(0.002)
    return bool(over())


def swarms(folder: Path, store: Path) -> Iterator[Callable[..., Swarm]]:
    """Makes sweeps; kills what they leave behind."""
    for make_project in projects(folder, store):
        yield partial(_make, make_project)


def _make(
    make_project: Callable[..., Project],
    trials: int,
    *options: str,
    pause_s: float = 0.01,
    name: str = "project",
    sweep: str = "swarm",
) -> Swarm:
    config = {"conf/config.yaml": f"{{x: 0, pause: {pause_s}}}"}
    return Swarm(make_project(_FILES | config, name=name), trials, options, sweep)
