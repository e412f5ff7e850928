"""The pruners: their typed options, and the rungs on which the trials of a sweep are compared.

Optuna decides, on a study in memory. The options have Optuna's names and defaults; one that Optuna wants without a
default is null here, and asked for before anything starts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from repro_sweep.errors import SweepError
from repro_sweep.search import samplers, targets
from repro_sweep.states import Direction, TrialState
from repro_sweep.sweep import Chosen

if TYPE_CHECKING:
    from optuna.pruners import BasePruner

NONE = "none"


@dataclass
class NoneConf:
    """Nothing is pruned."""


@dataclass
class MedianConf:
    """``MedianPruner``: worse than the median of the complete trials at the same step."""

    n_startup_trials: int = 5
    n_warmup_steps: int = 0
    interval_steps: int = 1
    n_min_trials: int = 1


@dataclass
class PercentileConf:
    """``PercentilePruner``: not among the best ``percentile`` per cent at the same step."""

    percentile: float | None = None
    n_startup_trials: int = 5
    n_warmup_steps: int = 0
    interval_steps: int = 1
    n_min_trials: int = 1


@dataclass
class SuccessiveHalvingConf:
    """``SuccessiveHalvingPruner`` (ASHA); ``min_resource`` is a number of steps, or auto."""

    min_resource: Any = "auto"
    reduction_factor: int = 4
    min_early_stopping_rate: int = 0
    bootstrap_count: int = 0


@dataclass
class HyperbandConf:
    """``HyperbandPruner``; ``max_resource`` is a number of steps, or auto."""

    min_resource: int = 1
    max_resource: Any = "auto"
    reduction_factor: int = 3
    bootstrap_count: int = 0


@dataclass
class PatientConf:
    """``PatientPruner``: nothing better for ``patience`` steps, and ``wrapped_pruner`` ({name: median}) agrees."""

    wrapped_pruner: Any = None
    patience: int | None = None
    min_delta: float = 0.0


@dataclass
class ThresholdConf:
    """``ThresholdPruner``: a value below ``lower``, above ``upper``, or NaN."""

    lower: float | None = None
    upper: float | None = None
    n_warmup_steps: int = 0
    interval_steps: int = 1


@dataclass
class WilcoxonConf:
    """``WilcoxonPruner``: probably worse than the best trial, step by step; for steps such as folds or seeds."""

    p_threshold: float = 0.1
    n_startup_steps: int = 2


OPTIONS: Mapping[str, type | Mapping[str, object]] = {
    "hyperband": HyperbandConf,
    "median": MedianConf,
    NONE: NoneConf,
    "optuna": {"_target_": None},
    "patient": PatientConf,
    "percentile": PercentileConf,
    "successive_halving": SuccessiveHalvingConf,
    "threshold": ThresholdConf,
    "wilcoxon": WilcoxonConf,
}
_CLASSES: Mapping[str, str] = {
    "hyperband": "HyperbandPruner",
    "median": "MedianPruner",
    "patient": "PatientPruner",
    "percentile": "PercentilePruner",
    "successive_halving": "SuccessiveHalvingPruner",
    "threshold": "ThresholdPruner",
    "wilcoxon": "WilcoxonPruner",
}
# what they decide about a trial depends on what was reported, not on what they have decided before
_DECIDE_ALONE = frozenset({"median", "percentile", "threshold", "wilcoxon"})
_REQUIRED: Mapping[str, tuple[str, str]] = {
    "percentile": ("percentile", "a number from 0 to 100"),
    "patient": ("patience", "a number of steps"),
}


def build(chosen: Chosen | None, where: str = "sweep.pruner") -> BasePruner:
    """Optuna's pruner for a choice, ``NopPruner`` for none; ``where`` is the place of its options.

    Raises:
        SweepError: the options cannot be used, or a package is missing.
    """
    import optuna

    if chosen is None or chosen.name == NONE:
        return optuna.pruners.NopPruner()
    options = {key: value for key, value in chosen.options.items() if key != "name"}
    if chosen.name == "optuna":
        with samplers.quiet():
            targets.locate(options.get(targets.TARGET), f"{where}.{targets.TARGET}")
            made = targets.instantiate(options, where)
        if not isinstance(made, optuna.pruners.BasePruner):
            raise SweepError(
                f"{where}.{targets.TARGET}: {options[targets.TARGET]!r} is no pruner of Optuna's"
            )
        return made
    _check_options(chosen.name, options, where)
    if chosen.name == "patient":
        options["wrapped_pruner"] = _wrapped(options.get("wrapped_pruner"), f"{where}.wrapped_pruner")
    with samplers.quiet():
        made = targets.call(getattr(optuna.pruners, _CLASSES[chosen.name]), options, where)
    assert isinstance(made, optuna.pruners.BasePruner)
    return made


def must_decide(pruner: Chosen | None, *, decide: bool) -> bool:
    """Whether a pruner is to be asked about a trial at a step: somebody wants to know, or it notes something then."""
    if pruner is None or pruner.name == NONE:
        return False
    return decide or pruner.name not in _DECIDE_ALONE


class Rungs:
    """Says which trials are not worth going on with, from what all have reported.

    For the trials of any sweep, by their own numbers. What it says is a function of the calls, in their order.
    A decision is made when a value is reported, and stands.

    Args:
        pruner: what decides.
        direction: of the metric that is reported.
        name: of the sweep; Hyperband sorts trials into brackets by it.
    """

    def __init__(self, pruner: Chosen | None, direction: Direction, name: str) -> None:
        import optuna

        self._storage = optuna.storages.InMemoryStorage()
        with samplers.quiet():
            self._study = optuna.create_study(
                study_name=name,
                storage=self._storage,
                direction=direction.value,
                pruner=build(pruner),
                sampler=optuna.samplers.RandomSampler(seed=0),
            )
        self._pruner = pruner
        self._trials: dict[int, optuna.Trial] = {}
        self._pruned: set[int] = set()

    def add(self, number: int) -> None:
        """Trial ``number`` starts; one that has ended starts anew."""
        if number not in self._trials:
            self._pruned.discard(number)
            with samplers.quiet():
                self._trials[number] = self._study.ask()

    def report(self, number: int, step: int, value: float, *, decide: bool = True) -> None:
        """A value of a running trial; what has ended, or been reported for that step, is not taken.

        Without ``decide`` nobody will ask about the trial.
        """
        trial = self._trials.get(number)
        if trial is None or step < 0:
            return
        with samplers.quiet():
            trial.report(value, step)
            if must_decide(self._pruner, decide=decide) and trial.should_prune():
                self._pruned.add(number)

    def should_prune(self, number: int) -> bool:
        """Whether trial ``number`` is not worth going on with."""
        return number in self._pruned

    def end(self, number: int, state: TrialState, value: float | None) -> None:
        """Trial ``number`` came to ``state``; ``value`` is its metric, if it has one."""
        import optuna

        trial = self._trials.pop(number, None)
        if trial is None:
            return
        with samplers.quiet():
            if state is TrialState.COMPLETE and value is not None and not math.isnan(value):
                self._study.tell(trial, value)
            elif state is TrialState.PRUNED:
                self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                self._study.tell(trial, state=optuna.trial.TrialState.FAIL)


def _wrapped(value: object, where: str) -> BasePruner | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise SweepError(f"{where}: must be null or a mapping such as {{name: median}}, got {value!r}")
    if value["name"] == NONE:
        return None
    return build(Chosen(name=value["name"], options=dict(value)), where)


def _check_options(name: str, options: Mapping[str, Any], where: str) -> None:
    """What Optuna itself would not find before it prunes.

    Raises:
        SweepError: the first thing that is wrong.
    """
    conf = OPTIONS.get(name)
    if not isinstance(conf, type):
        raise SweepError(f"{where}.name: {name!r} is not a pruner ({', '.join(sorted(OPTIONS))})")
    allowed = [field.name for field in fields(conf)]
    for key in options:
        if key not in allowed:
            raise SweepError(f"{where}.{key}: not an option of {name} ({', '.join(allowed)})")
    if name in _REQUIRED:
        key, what = _REQUIRED[name]
        if options.get(key) is None:
            raise SweepError(f"{where}.{key}: must be given: {what}")
    if name == "threshold" and options.get("lower") is None and options.get("upper") is None:
        raise SweepError(f"{where}: threshold needs lower, upper or both")
    if name == "wilcoxon":
        samplers.check_packages(f"{where.replace('.', '/', 1)}=wilcoxon", ("scipy",))
    if name in {"successive_halving", "hyperband"}:
        _check_resources(options, where)


def _check_resources(options: Mapping[str, Any], where: str) -> None:
    for key in ("min_resource", "max_resource"):
        value = options.get(key, "auto")
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise SweepError(f"{where}.{key}: must be a number of steps, at least 1, or auto; got {value!r}")
    if options.get("reduction_factor", 3) < 2:
        raise SweepError(f"{where}.reduction_factor: must be at least 2, got {options['reduction_factor']!r}")
    low, high = options.get("min_resource"), options.get("max_resource")
    if isinstance(low, int) and isinstance(high, int) and low > high:
        raise SweepError(f"{where}.max_resource: must be at least min_resource ({low}), got {high}")
