"""``search_quality``: what a search finds, beside Optuna's own loop with the same sampler."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.report import OURS, Table, Target, number

_SLOTS = (1, 4, 16)
_OURS, _THEIRS = "ours", "theirs"
_ONE_BY_ONE = f"{_THEIRS} 1"
_HEADER = (
    "function (least)", "slots", OURS, "`study.optimize`", "difference", "Optuna, same slots", "difference",
)  # fmt: skip
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
        f"{function.name} ({number(function.least)})": _columns(found[index * seeds : (index + 1) * seeds])
        for index, function in enumerate(FUNCTIONS)
    }
    return Table(
        title="search_quality: what a search finds",
        text=f"The best value of {trials} trials (smaller is better), median of {seeds} seeds; TPE with the options of"
        " `sweep/sampler=tpe` everywhere. Slots are simulated, the durations of trials are lognormal (sigma 1); our"
        " search asks as it does in a sweep, some trials ahead of free slots too. Optuna with the same slots is its"
        " `ask` and `tell`, with its constant liar. `study.optimize` runs one trial after the other, so it knows every"
        " result before it chooses, which nobody does who has several slots: "
        + "; ".join(_against_one_by_one(by_function, slots) for slots in _SLOTS)
        + f". A difference is that of the means, ± its standard error; worse is what is larger by more than {_NOISE:g}"
        " of these.",
        unit="",
        rows=(),
        grid=(_HEADER, *(line for name, values in by_function.items() for line in _lines(name, values))),
        targets=[
            Target(
                what=f"functions of {len(FUNCTIONS)} where ours is worse than Optuna's own, slots: {slots}",
                value=_worse(by_function, f"{_OURS} {slots}", f"{_THEIRS} {slots}"), limit=0.0, unit="",
            )
            for slots in _SLOTS
        ],
    )  # fmt: skip


def _columns(found: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {key: [values[key] for values in found] for key in found[0]}


def _worse(by_function: Mapping[str, Mapping[str, Sequence[float]]], one: str, other: str) -> int:
    """The number of functions where one system is worse than the other."""
    return sum(difference(values[one], values[other]).is_worse for values in by_function.values())


def _against_one_by_one(by_function: Mapping[str, Mapping[str, Sequence[float]]], slots: int) -> str:
    ours = _worse(by_function, f"{_OURS} {slots}", _ONE_BY_ONE)
    if slots == 1:
        return f"with 1 slot ours is worse on {ours} of {len(by_function)} functions"
    theirs = _worse(by_function, f"{_THEIRS} {slots}", _ONE_BY_ONE)
    return f"with {slots} slots ours on {ours}, Optuna with the same slots on {theirs}"


def _lines(name: str, values: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, ...]]:
    for slots in _SLOTS:
        ours, theirs, plain = values[f"{_OURS} {slots}"], values[f"{_THEIRS} {slots}"], values[_ONE_BY_ONE]
        cells = (_median(ours), _median(plain), _shown(difference(ours, plain)))
        same = (_median(theirs), _shown(difference(ours, theirs))) if slots > 1 else ("", "")
        yield (name, str(slots), *cells, *same)


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
    best = {_ONE_BY_ONE: plain.best_value}
    for slots in _SLOTS:
        values = virtual.ours(
            function.params, function.evaluate, durations_s, slots=slots, seed=seed, options=options
        )
        if len(values) != trials:
            raise AssertionError(f"{function.name}: {len(values)} of {trials} trials ran")
        best[f"{_OURS} {slots}"] = min(values)
        if slots > 1:
            best[f"{_THEIRS} {slots}"] = min(
                virtual.asked_and_told(study(), function.suggest, function.evaluate, durations_s, slots=slots)
            )
    return best


def _median(values: Sequence[float]) -> str:
    return number(statistics.median(values))


def _shown(found: Difference) -> str:
    verdict = " **worse**" if found.is_worse else ""
    return f"{'+' if found.mean > 0 else ''}{number(found.mean)} ± {number(found.error)}{verdict}"
