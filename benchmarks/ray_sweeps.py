"""``ray_160``, ``ray_1000`` and ``ray_noop``: workers that are actors, beside Ray Tune; each on a Ray of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness, ray_head
from benchmarks.harness import Project, Times
from benchmarks.ray_head import Head
from benchmarks.report import OURS, Row, Table, Target

_SLOTS = 16
_SLOTS_OF_ONE = 4
_SETTING = f"Ours with `sweep.executor.slots={_SLOTS_OF_ONE}`."
_SLEEP = "time.sleep(1.0)"
_TUNE = str(Path(__file__).with_name("ray_tune.py"))
_LEDGER = "handing out of the first to recorded end of the last"


def few(folder: Path, *, quick: bool) -> Table:
    """Makespan of 160 trials of 1 s."""
    trials = 32 if quick else 160
    ours, actors = _ours(folder / "several", trials, _SLEEP, slots=_SLOTS_OF_ONE)
    single, singles = _ours(folder / "single", trials, _SLEEP)
    new = _theirs(folder, trials, _SLEEP)
    reused = _theirs(folder, trials, _SLEEP, "--reuse")
    ideal = trials / _SLOTS
    return Table(
        title="ray_160: how full the slots of a Ray cluster are",
        text=f"{trials} trials that sleep for 1 s, on a Ray with {_SLOTS} CPUs that has just been started; from the"
        f" first start to the last end, by the trials' own stamps. {_SETTING} With one slot, the default, Ray has to"
        f" start {_SLOTS} processes of its own before all slots are there.",
        unit="s",
        rows=[
            Row(system=OURS, value=ours.makespan_s, note=f"{actors} actors; {_parts(ours)}"),
            Row(system=f"{OURS}, ledger", value=ours.ledger_s, note=_LEDGER),
            Row(
                system=f"{OURS}, one slot an actor", value=single.makespan_s,
                note=f"{singles} actors; {_parts(single)}",
            ),
            Row(system="Ray Tune", value=new.makespan_s, note=_parts(new)),
            Row(system="Ray Tune, reuse_actors", value=reused.makespan_s, note=_parts(reused)),
        ],
        ideal=ideal,
        ideal_is=f"{trials} s / {_SLOTS} slots",
        targets=[
            Target(what="makespan", value=ours.makespan_s, limit=1.5 * ideal, unit="s"),
            Target(what="actors", value=max(actors, singles), limit=_SLOTS, unit="actors"),
        ],
    )  # fmt: skip


def many(folder: Path, *, quick: bool) -> Table:
    """Makespan of 1,000 trials of 1 s, and what the sweep's processes hold meanwhile."""
    trials = 64 if quick else 1000
    seen: list[_Memory] = []

    def watch(ray: Head, pid: int, over: int) -> None:
        driver = harness.child(pid, "repro_sweep.ray_driver")
        if driver is not None and over >= trials // 10:
            seen.append(
                _Memory(
                    trials=over,
                    coordinator_mb=harness.memory_mb(pid),
                    driver_mb=harness.memory_mb(driver),
                    object_store_mb=ray.object_store_mb(),
                )
            )

    ours, actors = _ours(folder, trials, _SLEEP, watch, slots=_SLOTS_OF_ONE)
    if not seen:
        raise harness.BenchmarkError("the sweep was not seen at work")
    theirs = _theirs(folder, trials, _SLEEP, "--reuse")
    ideal = trials / _SLOTS
    return Table(
        title="ray_1000: the same for many trials, and what is held for them",
        text=f"{trials:,} trials that sleep for 1 s, measured in the same way. {_SETTING} The coordinator's"
        f" process, the one that speaks with Ray, and Ray's object store held {seen[0]} after {seen[0].trials:,}"
        f" trials, and {seen[-1]} after {seen[-1].trials:,}.",
        unit="s",
        rows=[
            Row(
                system=OURS, value=ours.makespan_s,
                note=f"{100 * ideal / ours.makespan_s:.1f} % of the ideal; {actors} actors; {_parts(ours)}",
            ),
            Row(system=f"{OURS}, ledger", value=ours.ledger_s, note=_LEDGER),
            Row(
                system="Ray Tune, reuse_actors", value=theirs.makespan_s,
                note=f"{100 * ideal / theirs.makespan_s:.1f} % of the ideal; {_parts(theirs)}",
            ),
        ],
        ideal=ideal,
        ideal_is=f"{trials:,} s / {_SLOTS} slots",
        targets=[Target(what="makespan, for 95 % of the ideal,", value=ours.makespan_s, limit=ideal / 0.95, unit="s")],
    )  # fmt: skip


def noop(folder: Path, *, quick: bool) -> Table:
    """Seconds from the command to its end of trials that do nothing."""
    trials = 64 if quick else 1000
    ours, actors = _ours(folder, trials, "pass", slots=_SLOTS_OF_ONE)
    theirs = _theirs(folder, trials, "pass", "--reuse")
    return Table(
        title="ray_noop: what a sweep of many small trials costs on Ray",
        text=f"{trials:,} trials that do nothing, on a Ray with {_SLOTS} CPUs that has just been started; from the"
        f" command's start to its end. {_SETTING} For us that includes the upload to MLflow, into an"
        " empty store as `mlflow` makes it, and the ranking; the peer has neither.",
        unit="s",
        rows=[
            Row(system=OURS, value=ours.command_s, note=f"{actors} actors; {_parts(ours)}"),
            Row(system="Ray Tune, reuse_actors", value=theirs.command_s, note=_parts(theirs)),
        ],
        targets=[
            Target(what="the whole command", value=ours.command_s, limit=theirs.command_s / 2, unit="s"),
        ],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Memory:
    """What the processes of a sweep held when ``trials`` were over."""

    trials: int
    coordinator_mb: float
    driver_mb: float
    object_store_mb: float

    def __str__(self) -> str:
        return f"{self.coordinator_mb:.1f}, {self.driver_mb:.1f} and {self.object_store_mb:.1f} MB"


def _ours(
    folder: Path,
    trials: int,
    body: str,
    watch: Callable[[Head, int, int], None] | None = None,
    *,
    slots: int = 1,
) -> tuple[Times, int]:
    """Run our sweep; the second value is how many actors it has used."""
    with ray_head.started(_SLOTS) as ray:
        project = _project(folder / "ours", ray, trials, body)
        project.make_store()
        times = project.sweep(
            trials, "sweep/executor=ray", f"sweep.executor.address={ray.address}", "sweep.executor.host=127.0.0.1",
            f"sweep.executor.slots={slots}",
            watch=None if watch is None else lambda pid, over: watch(ray, pid, over),
        )  # fmt: skip
    return times, len(list(project.folder.glob("multirun/bench/workers/ray-*")))


def _theirs(folder: Path, trials: int, body: str, *options: str) -> Times:
    with ray_head.started(_SLOTS) as ray:
        project = _project(folder / f"theirs{'-'.join(options)}", ray, trials, body)
        return project.peer([_TUNE, str(trials), str(_SLOTS), "--address", ray.address, *options], trials)


def _project(folder: Path, ray: Head, trials: int, body: str) -> Project:
    return Project(folder, params=f"{{x: range({trials})}}", body=body, env=ray.env)


def _parts(times: Times) -> str:
    """First start and what follows the last end, where the command's time went besides."""
    return f"first start after {times.first_start_s:.1f} s, over {times.after_s:.1f} s after the last end"
