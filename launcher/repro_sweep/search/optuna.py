"""The samplers of Optuna 5: their names, their typed options, and the search that uses them.

Optuna itself is imported by the modules that this one names, when a search is made. The options have Optuna's names
and defaults; what it has deprecated, and what cannot be written in YAML, is left out. ``seed`` is the search's own
where it is null.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from repro_sweep.search.study import OptunaSearch


@dataclass
class TpeConf:
    """``TPESampler``; unlike Optuna's default, conditional parameters are modelled jointly too (``group``).

    Optuna has ``group`` together with ``multivariate`` only, so null is what ``multivariate`` is.
    """

    n_startup_trials: int = 10
    n_ei_candidates: int = 24
    multivariate: bool | None = True
    group: bool | None = None
    constant_liar: bool = True
    seed: int | None = None


@dataclass
class RandomConf:
    """``RandomSampler``."""

    seed: int | None = None


@dataclass
class CmaesConf:
    """``CmaEsSampler``."""

    n_startup_trials: int = 1
    popsize: int | None = None
    consider_pruned_trials: bool = False
    use_separable_cma: bool = False
    with_margin: bool = False
    lr_adapt: bool = False
    seed: int | None = None


@dataclass
class GpConf:
    """``GPSampler``."""

    n_startup_trials: int = 10
    deterministic_objective: bool = False
    seed: int | None = None


@dataclass
class QmcConf:
    """``QMCSampler``; ``qmc_type`` is sobol or halton."""

    qmc_type: str = "sobol"
    scramble: bool = False
    seed: int | None = None


@dataclass
class NsgaiiConf:
    """``NSGAIISampler``; ``mutation`` and ``crossover`` are mappings with ``_target_``."""

    population_size: int = 50
    mutation: Any = None
    mutation_prob: float | None = None
    crossover: Any = None
    crossover_prob: float = 0.9
    swapping_prob: float = 0.5
    seed: int | None = None


@dataclass
class NsgaiiiConf(NsgaiiConf):
    """``NSGAIIISampler``; ``reference_points`` is a list of points, each with a number for every objective."""

    reference_points: Any = None
    dividing_parameter: int = 3


@dataclass
class BruteforceConf:
    """``BruteForceSampler``."""

    avoid_premature_stop: bool = False
    seed: int | None = None


OPTIONS: Mapping[str, object] = {
    "bruteforce": BruteforceConf,
    "cmaes": CmaesConf,
    "gp": GpConf,
    "nsgaii": NsgaiiConf,
    "nsgaiii": NsgaiiiConf,
    # any class, with whatever arguments it takes: a mapping stays open for further keys
    "optuna": {"_target_": None, "seed": None},
    "qmc": QmcConf,
    "random": RandomConf,
    "tpe": TpeConf,
}
SEARCHER = OptunaSearch

# Finished suggestions until an ask takes more than about 10 ms: measured with 5 parameters on one busy core. A Gaussian
# process takes 0.3 s as soon as it is fitted; what somebody else's sampler takes is not known.
ASKS_QUICKLY_UNTIL: Mapping[str, int | None] = {
    "bruteforce": 300,
    "cmaes": None,
    "gp": 10,
    "nsgaii": None,
    "nsgaiii": None,
    "optuna": 0,
    "qmc": None,
    "random": None,
    "tpe": 100,
}
