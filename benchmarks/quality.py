"""``search_quality``: what a search finds, beside Optuna's own loop with the same sampler."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.report import OURS, Table, Target, number

_SLOTS = (1, 4, 16)
_NOISE = 2.0
"""How many standard errors of the difference of two means are still noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The mean of ours less the mean of theirs (smaller is better), and its standard error."""

    mean: float
    error: float

    @property
    def is_worse(self) -> bool:
        """Whether ours is larger by more than noise."""
        return self.mean > _NOISE * self.error


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Of independent samples, each with its own variance (Welch)."""
    squares = statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs)
    return Difference(mean=statistics.fmean(ours) - statistics.fmean(theirs), error=math.sqrt(squares))


def quality(folder: Path, *, quick: bool) -> Table:
    """The best value of some trials, on standard functions, with slots that are simulated."""
    del folder
    from benchmarks.functions import FUNCTIONS

    trials, seeds = (20, 3) if quick else (60, 20)
    jobs = [(index, seed, trials) for index in range(len(FUNCTIONS)) for seed in range(seeds)]
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        found = pool.starmap(best_values, jobs, chunksize=1)
    by_function = {
        function.name: [values for (at, _, _), values in zip(jobs, found, strict=True) if at == index]
        for index, function in enumerate(FUNCTIONS)
    }
    lines, worse = _lines(by_function, {function.name: function.least for function in FUNCTIONS})
    return Table(
        title="search_quality: what a search finds",
        text=f"The best value of {trials} trials (smaller is better), median of {seeds} seeds; TPE with the options of"
        " `sweep/sampler=tpe` on both sides. Slots are simulated: durations are lognormal (σ = 1), our search asks as"
        " it does in a sweep, ahead of free slots too. `study.optimize` runs one trial after the other, so it knows"
        " every result before it chooses; Optuna with the same slots is its `ask` and `tell`, with its constant liar."
        f" A difference is that of the means, ± its standard error; ours counts as worse beyond {_NOISE:g} of these.",
        unit="functions",
        rows=(),
        grid=(_HEADER, *lines),
        targets=[
            Target(
                what=f"functions of {len(FUNCTIONS)} where ours is worse than {name} with {slots} slot{'s'[:slots - 1]}",
                value=count, limit=0.0, unit="",
            )
            for (name, slots), count in worse.items()
        ],
    )  # fmt: skip


_OPTIMIZE, _SAME = "`study.optimize`", "Optuna, same slots"
_HEADER = ("function (least)", "slots", OURS, _OPTIMIZE, "difference", _SAME, "difference")


def _lines(
    by_function: Mapping[str, Sequence[Mapping[str, float]]], least: Mapping[str, float]
) -> tuple[list[tuple[str, ...]], dict[tuple[str, int], int]]:
    lines = []
    worse = {(_OPTIMIZE, slots): 0 for slots in _SLOTS} | {(_SAME, slots): 0 for slots in _SLOTS[1:]}
    for name, values in by_function.items():
        for slots in _SLOTS:
            mine, plain = ([each[key] for each in values] for key in (f"ours {slots}", "optimize"))
            against = difference(mine, plain)
            worse[_OPTIMIZE, slots] += against.is_worse
            cells = [f"{name} ({number(least[name])})", str(slots), _median(mine), _median(plain), _shown(against)]
            if slots > 1:
                same = [each[f"optuna {slots}"] for each in values]
                beside = difference(mine, same)
                worse[_SAME, slots] += beside.is_worse
                cells += [_median(same), _shown(beside)]
            lines.append((*cells, "", "")[: len(_HEADER)])
    return lines, worse


def best_values(index: int, seed: int, trials: int) -> dict[str, float]:
    """The best value that each system finds of a function, by its number, with a seed."""
    import optuna

    from benchmarks import virtual
    from benchmarks.functions import FUNCTIONS
    from repro_sweep.search.optuna import TpeConf

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    function = FUNCTIONS[index]
    options = {key: value for key, value in asdict(TpeConf()).items() if key != "seed"}
    generator = random.Random(seed)
    durations_s = [generator.lognormvariate(0.0, 1.0) for _ in range(trials)]

    def study() -> optuna.Study:
        return optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, **options))

    plain = study()
    plain.optimize(lambda trial: function.evaluate(function.suggest(trial)), n_trials=trials, n_jobs=1)
    best = {"optimize": plain.best_value}
    for slots in _SLOTS:
        values = virtual.ours(
            function.params, function.evaluate, durations_s, slots=slots, seed=seed, options=options
        )
        if len(values) != trials:
            raise AssertionError(f"{function.name}: {len(values)} of {trials} trials ran")
        best[f"ours {slots}"] = min(values)
        if slots > 1:
            best[f"optuna {slots}"] = min(
                virtual.asked_and_told(study(), function.suggest, function.evaluate, durations_s, slots=slots)
            )
    return best


def _median(values: Sequence[float]) -> str:
    return number(statistics.median(values))


def _shown(found: Difference) -> str:
    verdict = " **worse**" if found.is_worse else ""
    return f"{'+' if found.mean > 0 else ''}{number(found.mean)} ± {number(found.error)}{verdict}"
