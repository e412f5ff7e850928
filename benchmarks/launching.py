"""``noop``, ``sleep``, ``slow_server``: what a trial costs, how full the slots are, that MLflow is in nobody's way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks import harness, slow
from benchmarks.harness import Project
from benchmarks.report import OURS, Row, Table, Target

_RAY = Path(__file__).with_name("ray_tune.py")
_FLOOR = """
import os, sys, time, torch
began = time.perf_counter()
for _ in range(count := int(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
print((time.perf_counter() - began) / count * 1000)
"""


def noop(folder: Path, *, quick: bool) -> Table:
    """Milliseconds a trial of a task that does nothing, on 2 slots."""
    trials, basic, joblib = (100, 10, 20) if quick else (1000, 50, 100)
    project = Project(
        folder, params=f"{{x: range({trials})}}", imports="\nimport torch", body="torch  # only imported"
    )
    ours = project.sweep(trials, "sweep.executor.slots=2")
    ledger_ms = ours.ledger_s / trials * 1000
    hydra = ["app.py", "--multirun", "hydra.sweep.dir=multirun/peer"]
    in_process = project.peer([*hydra, f"x=range({basic})"], basic)
    parallel = project.peer(
        [*hydra, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"x=range({joblib})"], joblib
    )
    rows = [
        Row(
            system=OURS, value=ours.per_trial_ms,
            note=_uploaded(ours),
        ),
        Row(system=f"{OURS}, ledger", value=ledger_ms, note="handing out of the first to recorded end of the last"),
        Row(system="Hydra, basic launcher", value=in_process.per_trial_ms, note=f"{basic} trials, one after the other"),
        Row(system="Hydra, joblib launcher", value=parallel.per_trial_ms, note=f"{joblib} trials, n_jobs=2"),
    ]  # fmt: skip
    return Table(
        title="noop: what a trial costs",
        text="A task that returns at once and whose module imports torch, 2 slots; first start to last end, divided by"
        " the number of trials. Hydra's launchers track nothing and give no trial a process of its own.",
        unit="ms a trial",
        rows=rows,
        ideal=_fork_floor_ms(50 if quick else 200),
        ideal_is="fork and exit of a process that has imported torch, 2 at a time",
        targets=[Target(what="a trial (ledger)", value=ledger_ms, limit=15.0, unit="ms")],
    )


def sleep(folder: Path, *, quick: bool) -> Table:
    """Makespan of trials of 1 s on 16 slots."""
    slots, trials = 16, 32 if quick else 160
    project = Project(folder, params=f"{{x: range({trials})}}", body="time.sleep(1.0)")
    ours = project.sweep(trials, f"sweep.executor.slots={slots}")
    joblib = project.peer(
        ["app.py", "--multirun", "hydra.sweep.dir=multirun/peer", "hydra/launcher=joblib",
         f"hydra.launcher.n_jobs={slots}", f"x=range({trials})"], trials,
    )  # fmt: skip
    rows = [
        Row(
            system=OURS,
            value=ours.makespan_s,
            note=_uploaded(ours),
        ),
        Row(
            system=f"{OURS}, ledger",
            value=ours.ledger_s,
            note="handing out of the first to recorded end of the last",
        ),
        Row(system="Hydra, joblib launcher", value=joblib.makespan_s, note=f"n_jobs={slots}"),
    ]
    for name, *options in (("Ray Tune",), ("Ray Tune, reuse_actors", "--reuse")):
        times = project.peer([str(_RAY), str(trials), str(slots), *options], trials)
        rows.append(Row(system=name, value=times.makespan_s, note=f"num_cpus={slots}"))
    ideal = trials / slots
    return Table(
        title="sleep: how full the slots are",
        text=f"{trials} trials that sleep for 1 s, on {slots} slots; first start to last end.",
        unit="s",
        rows=rows,
        ideal=ideal,
        ideal_is=f"{trials} s / {slots} slots",
        targets=[Target(what="makespan (ledger)", value=ours.ledger_s, limit=1.25 * ideal, unit="s")],
    )


def slow_server(folder: Path, *, quick: bool) -> Table:
    """Makespan with an MLflow server that takes 2 s for each call, beside the embedded store."""
    slots, trials = 16, 32 if quick else 96
    params, body = f"{{x: range({trials})}}", "time.sleep(1.0)"
    embedded = Project(folder / "embedded", params=params, body=body).sweep(
        trials, f"sweep.executor.slots={slots}", upload=False
    )
    with slow.server(folder / "server", delay_s=2.0) as server:
        served = Project(folder / "served", params=params, body=body).sweep(
            trials, f"sweep.executor.slots={slots}", f"sweep.tracking.uri={server.uri}", upload=False
        )
    rows = [
        Row(system=OURS, value=embedded.ledger_s, note="the embedded store"),
        Row(
            system=f"{OURS}, slow server", value=served.ledger_s,
            note=f"{server.calls} calls while it ran; what was left is uploaded later",
        ),
    ]  # fmt: skip
    return Table(
        title="slow_server: MLflow is never on a trial's path",
        text=f"{trials} trials that sleep for 1 s, on {slots} slots, by the ledger; a real `mlflow server` behind"
        " a proxy that holds every call for 2 s. Once the last trial has ended, the upload is interrupted.",
        unit="s",
        rows=rows,
        ideal=trials / slots,
        ideal_is=f"{trials} s / {slots} slots",
        targets=[
            Target(
                what="slow server / embedded store",
                value=served.ledger_s / embedded.ledger_s,
                limit=1.1,
                unit="times",
            )
        ],
    )


def _uploaded(times: harness.Times) -> str:
    return f"{times.tracked} trials in MLflow {times.after_s:.1f} s after the last end"


def _fork_floor_ms(count: int) -> float:
    command = [sys.executable, "-c", _FLOOR, str(count)]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    figures = [float(process.communicate(timeout=harness.TIMEOUT_S)[0]) for process in pair]
    return sum(figures) / len(figures) / len(figures)
