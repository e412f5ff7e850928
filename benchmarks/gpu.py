"""``gpu_share`` and ``gpu_strict``: trials on a GPU; they need a machine with one."""

from __future__ import annotations

import contextlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness
from benchmarks.report import OURS, Row, Table

_SWEEP = "optimizer_grid"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """First hand-out to last end, and the most memory that was in use on the GPU meanwhile."""

    trials: int
    took_s: float
    peak_mb: float


def share(folder: Path, *, quick: bool) -> Table:
    """The reference study with one, two and four trials at a time on one GPU."""
    name = _gpu()
    harness.copy_study(folder)
    counts = (1, 4) if quick else (1, 2, 4)
    # what a first sweep has to do (tables of the store, modules from the disk) is nobody's
    _sweep(folder, "first", 4, "sweep.repeats.seed=0")
    runs = {count: _sweep(folder, f"share-{count}", count) for count in counts}
    alone = runs[1]
    return Table(
        title="gpu_share: trials that share one GPU",
        text=f"`+sweep={_SWEEP} model=lstm sweep.resources.gpus_per_trial=…` on one {name}: {alone.trials} trainings"
        " of a small LSTM, which cannot fill such a GPU alone. From the handing out of the first trial to the recorded"
        " end of the last one.",
        unit="s",
        rows=[
            Row(
                system=OURS if count == 1 else f"{OURS}, {count} at a time",
                value=run.took_s,
                note=f"gpus_per_trial={1 / count:g}: {60 * run.trials / run.took_s:.0f} trials a minute,"
                f" {alone.took_s / run.took_s:.2f} times one at a time; {run.peak_mb:.0f} MiB in use at most",
            )
            for count, run in runs.items()
        ],
    )


def strict(folder: Path, *, quick: bool) -> Table:
    """What strict determinism costs in the reference study."""
    name = _gpu()
    harness.copy_study(folder)
    few = ("sweep.repeats.seed=0", *(("epochs=3",) if quick else ()))
    _sweep(folder, "first", 4, *few)
    # in turn, twice: what the machine does meanwhile is nobody's
    found = {
        (kind, turn): _sweep(folder, f"{kind}-{turn}", 1, f"sweep.determinism.strict={kind}", *few)
        for turn in (1, 2)
        for kind in ("false", "true")
    }
    best = {kind: min(found[kind, turn].took_s for turn in (1, 2)) for kind in ("false", "true")}
    return Table(
        title="gpu_strict: what strict determinism costs",
        text=f"`+sweep={_SWEEP} model=lstm sweep.determinism.strict=…` on one {name}:"
        f" {found['true', 1].trials} trainings, one at a time; from the handing out of the first trial to the recorded"
        " end of the last one, the better of two runs of each, in turn.",
        unit="s",
        rows=[
            Row(system=OURS, value=best["false"], note="`strict: false`"),
            Row(system=f"{OURS}, strict", value=best["true"], note="`strict: true`"),
        ],
    )


def _gpu() -> str:
    return _ask("name,driver_version").replace(", ", " with driver ")


def _sweep(folder: Path, name: str, at_a_time: int, *overrides: str) -> _Run:
    options = [
        f"sweep.name={name}", "sweep.reuse=false", "model=lstm", f"sweep.executor.slots={at_a_time}",
        f"sweep.resources.gpus_per_trial={1 / at_a_time}", *overrides,
    ]  # fmt: skip
    peak = 0.0
    with harness.started([*harness.front_door(), f"+sweep={_SWEEP}", *options], folder, {}) as process:
        while process.poll() is None:
            peak = max(peak, _used_mb())
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
    if process.returncode != 0:
        raise harness.failed(folder, f"status {process.returncode}")
    with harness.ledger(folder, name) as db:
        states, took_s = harness.outcome(db)
    if set(states) != {"COMPLETE"}:
        raise harness.failed(folder, f"trials ended as {states}")
    return _Run(trials=states["COMPLETE"], took_s=took_s, peak_mb=peak)


def _used_mb() -> float:
    return float(_ask("memory.used", "nounits"))


def _ask(what: str, *form: str) -> str:
    """What nvidia-smi says of the first GPU."""
    command = [
        "nvidia-smi",
        f"--query-gpu={what}",
        f"--format={','.join(('csv', 'noheader', *form))}",
        "--id=0",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise harness.BenchmarkError("no GPU: nvidia-smi does not run here") from error
