"""What can be known to be wrong with a search before anything starts.

Where Optuna would silently do something else than what was asked for, such as drawing at random, it is an error or a
notice here. The evidence is Optuna 5.0's source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from repro_sweep.errors import SpaceError, SweepError
from repro_sweep.points import Categorical, FloatRange, Parameter
from repro_sweep.search import pruning, samplers
from repro_sweep.search.base import SearchSpace
from repro_sweep.sweep import Chosen, SearchSpec, SweepSpec

# cmaes and gp model the parameters that all complete trials have (IntersectionSearchSpace), qmc those of the first
# complete trial; all others are drawn at random. cmaes gives up altogether when that set changes (sample_relative).
_UNCONDITIONAL = frozenset({"cmaes", "gp", "qmc"})
_CONDITIONAL = "bruteforce, random, tpe"
# an IntersectionSearchSpace too, but mutation keeps drawing, so that all of the space is searched
_GENETIC = frozenset({"nsgaii", "nsgaiii"})
_ONE_OBJECTIVE = frozenset({"cmaes"})
_NO_CONSTRAINTS = frozenset({"bruteforce", "cmaes", "qmc", "random"})
_NO_LEARNING = frozenset({"cmaes", "nsgaii", "nsgaiii", "qmc", "random"})
_LEAST: Mapping[str, int] = {
    "n_startup_trials": 0,
    "n_ei_candidates": 1,
    "popsize": 2,
    "population_size": 2,
    "dividing_parameter": 1,
}


def check(space: SearchSpace, sweep: SweepSpec) -> list[str]:
    """See that a sweep's pruners, and its sampler where that is one of Optuna's, can do what they are asked for.

    Returns:
        What the user should know all the same, one line each.

    Raises:
        SweepError: an option is wrong, or a package missing.
        SpaceError: the sampler cannot handle the space.
    """
    _check_pruner(sweep, sweep.pruner, "sweep.pruner")
    _check_reported(sweep)
    search = sweep.search
    if search is None:
        return []
    _check_pruner(sweep, search.repeats_pruner, "sweep.repeats_pruner")
    if search.sampler.name not in {*samplers.CLASSES, samplers.BY_TARGET}:
        return []
    name = _check_sampler(search, len(sweep.all_objectives))
    parameters = space.parameters()
    _check_objectives(name, sweep)
    _check_space(name, parameters)
    for index, point in enumerate(search.enqueue):
        space.assign_partial(point, where=f"sweep.enqueue[{index}]")
    return _notices(name, parameters, search)


def _check_pruner(sweep: SweepSpec, chosen: Chosen | None, where: str) -> None:
    if chosen is None or chosen.name == pruning.NONE:
        return
    if len(sweep.all_objectives) > 1:
        raise SweepError(
            f"{where.replace('.', '/', 1)}: pruning needs one objective, got {_objectives(sweep)}"
        )
    pruning.build(chosen, where)


def _check_reported(sweep: SweepSpec) -> None:
    """What a pruner decides by is reported by its name, and the number that a task returns has none."""
    if sweep.pruner is not None and sweep.pruner.name != pruning.NONE and sweep.metric is None:
        raise SweepError(
            f"sweep/pruner={sweep.pruner.name}: a pruner needs a metric that the task reports: sweep.metric=NAME"
        )


def _check_sampler(search: SearchSpec, objectives: int) -> str:
    """The name of the sampler; of one that is given by its class, if it is Optuna's own, as if it were by name."""
    name, options = search.sampler.name, search.sampler.options
    if name != samplers.BY_TARGET:
        for key, least in _LEAST.items():
            if options.get(key) is not None and _number(options[key], key) < least:
                raise SweepError(f"{samplers.WHERE}.{key}: must be at least {least}, got {options[key]!r}")
    made = samplers.build(name, options, search.seed)
    points = options.get("reference_points")
    if name == "nsgaiii" and points is not None and any(len(point) != objectives for point in _rows(points)):
        raise SweepError(
            f"{samplers.WHERE}.reference_points: each point needs {objectives} numbers, one for each objective"
        )
    known = {class_name: short for short, class_name in samplers.CLASSES.items()}
    is_own = type(made).__module__.startswith("optuna.")
    return known.get(type(made).__name__, name) if is_own else name


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SweepError(f"{samplers.WHERE}.{key}: must be a number, got {value!r}")
    return value


def _rows(points: Any) -> Sequence[Sequence[object]]:
    rows: Sequence[Sequence[object]] = points
    return rows


def _check_objectives(name: str, sweep: SweepSpec) -> None:
    if name in _ONE_OBJECTIVE and len(sweep.all_objectives) > 1:
        others = ", ".join(sorted(set(samplers.CLASSES) - _ONE_OBJECTIVE))
        raise SweepError(
            f"sweep/sampler={name}: it needs one objective, got {_objectives(sweep)}; for several: {others}"
        )


def _check_space(name: str, parameters: Sequence[Parameter]) -> None:
    conditional = [parameter.name for parameter in parameters if parameter.conditional]
    if name in _UNCONDITIONAL and conditional:
        raise SpaceError(
            f"sweep/sampler={name}: it cannot handle parameters that exist only with some choice of another: "
            f"{_some(conditional)}; these samplers can: {_CONDITIONAL}"
        )
    if name == "bruteforce":
        for parameter in parameters:
            if isinstance(parameter.domain, FloatRange) and parameter.domain.step is None:
                raise SpaceError(
                    f"{parameter.where}: sweep/sampler=bruteforce tries every value, and a continuous interval has "
                    f"no end of them: use range(…) or choice(…); got {parameter.domain.low} to {parameter.domain.high}"
                )


def _notices(name: str, parameters: Sequence[Parameter], search: SearchSpec) -> list[str]:
    what = f"sweep/sampler={name}"
    notices = []
    categorical = [item.name for item in parameters if isinstance(item.domain, Categorical)]
    conditional = [item.name for item in parameters if item.conditional]
    if name == "cmaes" and categorical:
        notices.append(f"{what} draws categorical parameters at random: {_some(categorical)}")
    if name in _GENETIC and conditional:
        notices.append(
            f"{what} draws at random what exists only with some choice of another: {_some(conditional)}"
        )
    if name in _NO_CONSTRAINTS and search.constraints:
        notices.append(f"sweep.constraints: {what} does not use them to choose points")
    if name in _NO_LEARNING and search.start_from:
        notices.append(f"sweep.start_from: {what} does not learn from other sweeps")
    return notices


def _objectives(sweep: SweepSpec) -> str:
    metrics = [objective.metric for objective in sweep.all_objectives]
    return f"{len(metrics)} ({', '.join(metrics)})"


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
