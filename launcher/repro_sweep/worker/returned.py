"""What a trial comes to by what its task returned: its final metrics, or the failure that they make."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig

from repro_sweep.states import FailureKind, TrialState
from repro_sweep.sweep import SweepSpec
from repro_sweep.worker import trial

_SEQUENCES = (list, tuple, ListConfig)


def final_metrics(value: object, reported: Mapping[str, float], spec: SweepSpec) -> dict[str, Any]:
    """The fields of a result from what the task returned and last reported.

    A task returns a dict, a number, or a list of numbers in the order of the objectives (as tasks for
    hydra-optuna-sweeper do); what is returned goes before what was reported. Objectives that have a name, and the
    metrics of constraints, must be there: a task that ends well without them will do so in all trials, so this ends
    the sweep (``missing``).
    """
    metrics = dict(reported)
    wanted = [each.metric for each in spec.all_objectives]
    needed = _needed(spec)
    if isinstance(value, (Mapping, DictConfig)):
        returned = dict(value.items())
    elif value is None:
        returned = {}
    elif isinstance(value, _SEQUENCES) and len(value) == len(wanted):
        returned = dict(zip(wanted, value, strict=True))
    elif _is_named(spec) and (len(wanted) > 1 or isinstance(value, _SEQUENCES)):
        return _missing(_wrong_count(value, wanted), metrics)
    else:
        returned = {wanted[0]: value}
    for name, item in returned.items():
        try:
            metrics[trial.metric_name(name)] = trial.as_number(item, f"returned metric '{name}'")
        except TypeError as error:
            if name in needed:
                return _invalid(str(error), metrics)
            logging.getLogger("repro_sweep").info("%s: it is not recorded", error)
    for name, option in needed.items():
        if name not in metrics:
            names = ", ".join(sorted(metrics)) or "nothing"
            return _missing(f"{option}: the task does not return '{name}' ({names})", metrics)
    for name in needed:
        if math.isnan(metrics[name]):
            return _invalid(f"metric '{name}' is NaN", metrics)
    return {"metrics": metrics}


def _needed(spec: SweepSpec) -> dict[str, str]:
    """The metrics that a trial must have, each with the option that says so."""
    needed = {each.metric: "sweep.metric" for each in spec.all_objectives if _is_named(spec)}
    for constraint in spec.search.constraints if spec.search is not None else ():
        needed.setdefault(constraint.metric, "sweep.constraints")
    return needed


def _is_named(spec: SweepSpec) -> bool:
    """Whether the sweep says what it wants; without that, any end of a task is a good one."""
    return spec.metric is not None or bool(spec.objectives)


def _wrong_count(value: object, wanted: Sequence[str]) -> str:
    got = str(len(value)) if isinstance(value, _SEQUENCES) else type(value).__name__
    numbers = "1 number" if len(wanted) == 1 else f"{len(wanted)} numbers"
    return f"sweep.metric: the task must return {numbers} ({', '.join(wanted)}), got {got}"


def _missing(message: str, metrics: dict[str, float]) -> dict[str, Any]:
    return _invalid(message, metrics) | {"missing": True}


def _invalid(message: str, metrics: dict[str, float]) -> dict[str, Any]:
    print(f"repro-sweep: {message}", file=sys.stderr)  # noqa: T201  (the trial's own log)
    return {
        "state": TrialState.FAIL,
        "kind": FailureKind.INVALID_METRIC,
        "message": message,
        "metrics": metrics,
    }
