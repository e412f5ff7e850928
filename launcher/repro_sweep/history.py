"""What a search knows when it begins: its own earlier trials, and those of other sweeps.

All of it is written into the search's first step, so that it can be rebuilt whatever becomes of the other sweeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro_sweep.errors import ReproSweepError, SweepError
from repro_sweep.ledger import FILE_NAME, Ledger
from repro_sweep.search.base import SearchSpace
from repro_sweep.states import StepKind, TrialState
from repro_sweep.sweep import Constraint, SearchSpec, SweepSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a trial of some sweep has come to."""

    params: Mapping[str, object]
    point: str
    state: TrialState
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """What the ledger of a sweep holds: the definition of its search, None if it was none, and all results."""

    definition: Mapping[str, Any] | None
    seed: int | None
    results: tuple[Result, ...]


def earlier(ledger: Ledger) -> Earlier:
    """What was done under a sweep's name."""
    steps = ledger.steps()
    begun = steps[0].data["definition"] if steps and steps[0].kind is StepKind.BEGIN else None
    search = ledger.spec.search
    return Earlier(
        definition=begun if search is not None else None,
        seed=None if search is None else search.seed,
        results=tuple(_results(ledger)),
    )


def _results(ledger: Ledger) -> Iterable[Result]:
    metrics = {attempt.trial: attempt.metrics for attempt in ledger.attempts()}
    for trial in sorted(ledger.trials(), key=lambda each: each.number):
        if trial.state.is_done():
            yield Result(
                params=trial.params,
                point=trial.point,
                state=trial.state,
                metrics=metrics.get(trial.number, {}),
            )


def same_seed(search: SearchSpec, before: Earlier | None) -> SearchSpec:
    """The same command again goes on with the same search: a seed that was not given is the one that was drawn."""
    if before is None or before.seed is None or search.sampler.options.get("seed") is not None:
        return search
    return search.model_copy(update={"seed": before.seed})


def begin(
    spec: SweepSpec, space: SearchSpace, before: Earlier | None, *, first: int
) -> dict[str, Any] | None:
    """The first step of a search, None where it goes on with the one that its ledger holds.

    Raises:
        SweepError: a sweep to start from is not there, or has no results of this search's objectives.
    """
    assert spec.search is not None
    definition = definition_of(spec)
    if before is not None and before.definition == definition:
        return None
    known = list(_known(space, spec, before.results if before is not None else ()))
    for name in spec.search.start_from:
        found = list(_known(space, spec, _results_of(name, spec)))
        if not found:
            raise SweepError(
                f"sweep.start_from: sweep '{name}' has no finished trial with"
                f" {' and '.join(each.metric for each in spec.all_objectives)} that lies in this search's space"
            )
        known += found
    return {"definition": definition, "known": known, "first": first}


def definition_of(spec: SweepSpec) -> dict[str, Any]:
    """All that decides which points a search suggests, given the same results."""
    assert spec.search is not None
    search = spec.search.model_dump(mode="json", exclude={"budget"})
    objectives = [each.model_dump(mode="json") for each in spec.all_objectives]
    return {"search": search, "objectives": objectives, "task": spec.task.name}


def _known(space: SearchSpace, spec: SweepSpec, results: Iterable[Result]) -> Iterable[dict[str, Any]]:
    """The points that the space has too, with the means over their repeats."""
    objectives = spec.all_objectives
    constraints = spec.search.constraints if spec.search is not None else ()
    points: dict[str, list[Result]] = {}
    for index, result in enumerate(results):
        points.setdefault(result.point or str(index), []).append(result)
    for repeats in points.values():
        values = space.assign(repeats[0].params)
        complete = [each for each in repeats if each.state is TrialState.COMPLETE]
        counted = [each.metrics for each in complete or repeats]
        if values is None or not all(each.metric in metrics for metrics in counted for each in objectives):
            continue
        means = [sum(metrics[each.metric] for metrics in counted) / len(counted) for each in objectives]
        state = TrialState.COMPLETE if complete else TrialState.PRUNED
        yield {
            "values": values,
            "state": state,
            "objectives": means,
            "violations": _violations(constraints, counted),
        }


def _violations(constraints: Sequence[Constraint], counted: Sequence[Mapping[str, float]]) -> list[float]:
    """One for each constraint, none where some of the metrics are not there."""
    if not all(each.metric in metrics for metrics in counted for each in constraints):
        return []
    means = [sum(metrics[each.metric] for metrics in counted) / len(counted) for each in constraints]
    return [each.violation(mean) for each, mean in zip(constraints, means, strict=True)]


def _results_of(name: str, spec: SweepSpec) -> list[Result]:
    """Those of another sweep: beside this one, else from the same MLflow store."""
    if name == spec.name:
        raise SweepError(f"sweep.start_from: '{name}' is this sweep itself; it knows its own results anyway")
    for directory in (Path(spec.directory).parent / name, Path(name)):
        if (directory / FILE_NAME).is_file():
            ledger = Ledger.open(directory, readonly=True)
            try:
                return list(_results(ledger))
            finally:
                ledger.close()
    from repro_sweep.ranking import trials

    try:
        found = trials(name, uri=spec.tracking.uri)
    except ReproSweepError as error:
        raise SweepError(
            f"sweep.start_from: there is no sweep '{name}' beside this one, nor in MLflow: {error}"
        ) from error
    return [
        Result(params=trial.params, point=trial.point, state=trial.state, metrics=trial.metrics)
        for trial in found
        if trial.state.is_done()
    ]
