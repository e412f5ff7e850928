"""``search_slots`` and ``search_handout``: a search's slots do not wait for each other, nor for the sampler."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

from benchmarks import harness, optuna_sweeper
from benchmarks.harness import Project
from benchmarks.report import OURS, Row, Table, Target
from benchmarks.spans import busy_share, handouts, quantile

_SLOTS = 4
_SHORT_S, _LONG_S = 0.2, 2.0
_NUMBER = "\nfrom hydra.core.hydra_config import HydraConfig"
_SIX = (
    '{x: "interval(-5, 5)", lr: "tag(log, interval(0.00001, 0.1))", dropout: "interval(0, 0.5)",'
    ' layers: "range(1, 9)", width: "choice(32, 64, 128, 256)", cell: "choice(lstm, gru, rnn)"}'
)
_LEAST_HANDOUTS = 100


def slots(folder: Path, *, quick: bool) -> Table:
    """Makespan of a search whose trials differ much in their durations, and how full its slots were."""
    trials = 16 if quick else 40
    long = _long_ones(trials)
    project = Project(
        folder / "project",
        params='{x: "interval(-5, 5)"}',
        imports=_NUMBER,
        body=f"time.sleep({_LONG_S} if HydraConfig.get().job.num in {long} else {_SHORT_S})",
        value="(cfg.x - 1) ** 2",
        sampler="tpe",
    )
    python = optuna_sweeper.python(harness.cache())
    ours = project.sweep(
        trials, f"sweep.executor.slots={_SLOTS}", f"sweep.budget.trials={trials}", "sweep.sampler.seed=0"
    )
    by_stamps = busy_share(project.stamps(trials), _SLOTS)
    by_ledger = busy_share(project.ledger(), _SLOTS)
    command = optuna_sweeper.command(project, trials=trials, slots=_SLOTS, params={"x": "interval(-5, 5)"})
    peer = project.peer(command, trials, python=python)
    peer_busy = busy_share(project.stamps(trials), _SLOTS)
    total = sum(_LONG_S if number in long else _SHORT_S for number in range(trials))
    return Table(
        title="search_slots: a search of trials that differ in their durations",
        text=f"{trials} trials of {_SHORT_S} s, but for {len(long)} of {_LONG_S} s (the same numbers for both: "
        f"{', '.join(map(str, sorted(long)))}), TPE, {_SLOTS} slots; first start to last end. A slot's time is counted"
        " from the first start of all to the last one, as nothing is left to hand out after that.",
        unit="s",
        rows=[
            Row(system=OURS, value=ours.makespan_s, note=f"slots {_percent(by_stamps)} busy; {_whole(ours)}"),
            Row(system=f"{OURS}, ledger", value=ours.ledger_s, note=f"slots {_percent(by_ledger)} busy"),
            Row(
                system="hydra-optuna-sweeper, joblib", value=peer.makespan_s,
                note=f"slots {_percent(peer_busy)} busy; {_whole(peer)}; no tracking",
            ),
        ],
        ideal=max(total / _SLOTS, _LONG_S),
        ideal_is=f"{total:.1f} s / {_SLOTS} slots",
        targets=[Target(what="slots' idle time (ledger)", value=100 * (1 - by_ledger), limit=5.0, unit="%")],
    )  # fmt: skip


def handout(folder: Path, *, quick: bool) -> Table:
    """Milliseconds from the end of a trial to the start of the next on its slot, late in a search."""
    before, more = (100, 40) if quick else (1000, 140)
    project = Project(
        folder,
        params=_SIX,
        imports=_NUMBER,
        body=f"time.sleep(0.3 if HydraConfig.get().job.num >= {before} else 0.0)",
        value="(cfg.x - 1) ** 2 + cfg.lr + cfg.dropout + cfg.layers + cfg.width / 64 + (cfg.cell == 'gru')",
        sampler="tpe",
        conf="lr: 0.01\ndropout: 0.0\nlayers: 1\nwidth: 32\ncell: lstm\n",
    )
    options = (f"sweep.executor.slots={_SLOTS}", "sweep.sampler.seed=0")
    filled = project.sweep(before, *options, f"sweep.budget.trials={before}")
    budget = f"sweep.budget.trials={before + more}"
    project.sweep(before + more, *options, budget, stamped=more, upload=False)
    gaps = handouts(span for span in project.ledger() if span.trial >= before)
    if len(gaps) < (1 if quick else _LEAST_HANDOUTS):
        raise harness.BenchmarkError(f"only {len(gaps)} trials followed another one on their slot")
    median, late = statistics.median(gaps) * 1000, quantile(gaps, 0.95) * 1000
    return Table(
        title="search_handout: the sampler keeps no slot waiting",
        text=f"TPE, 6 parameters of all kinds, {_SLOTS} slots: {before:,} trials that do nothing"
        f" ({filled.ledger_s:.1f} s), then {more} of 0.3 s in the same search, submitted again with a larger budget."
        f" From the recorded end of a trial to the handing out of the next on its slot, {len(gaps)} times.",
        unit="ms",
        rows=[
            Row(system=OURS, value=median, note="median"),
            Row(system=f"{OURS}, 95 of 100", value=late, note="are handed out within this time"),
            Row(system=f"{OURS}, longest", value=max(gaps) * 1000),
        ],
        targets=[Target(what="a hand-out (median)", value=median, limit=20.0, unit="ms")],
    )


def _long_ones(trials: int) -> set[int]:
    return set(random.Random(0).sample(range(trials), trials // 8))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _whole(times: harness.Times) -> str:
    return f"first start after {times.first_start_s:.1f} s, command over {times.after_s:.1f} s after the last end"
