"""The figures of a report: Optuna's own, of not too many points, or a sentence where there is none to draw."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optuna import visualization

from repro_sweep.reporting.study import Findings, quiet, state_of, study_from
from repro_sweep.standings import Row, front_of
from repro_sweep.states import TrialState

_FEW = 50
"""Fewer points have less than five in their best tenth, which PED-ANOVA should have (Optuna's advice)."""
_MOST_IMPORTANCE = 3000
_MOST_SLICES = 1500
_MOST_LINES = 300
_MOST_CURVES = 200
_MOST_STEPS = 500
_MOST_PARETO = 1500
_BEST = 10
_NAME = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure with its heading.

    ``note`` is a sentence below it, or in its place where ``drawn`` (a plotly figure) is None. It needs ``width`` px.
    """

    title: str
    drawn: Any = None
    note: str = ""
    width: int = 0


def figures_of(findings: Findings) -> list[Figure]:
    """All figures of a report, in their order."""
    shown = _escaped(findings)
    objectives = shown.spec.all_objectives
    several = len(objectives) > 1
    figures: list[Figure] = [_pareto_front(shown), _parallel(shown)] if several else []
    for index, objective in enumerate(objectives):
        of = f" of {html.unescape(objective.metric)}" if several else ""
        figures += [
            _history(shown, index, f"Optimization history{of}"),
            _importances(shown, index, f"Parameter importances{of.replace(' of', ' for', 1)}"),
            _slices(shown, index, f"Slices{of}"),
        ]
    if not several:
        figures.insert(2, _parallel(shown))
    return [*figures, _curves(shown)]


def complete_points(findings: Findings) -> list[Row]:
    """The points with a finite mean, in the order of their first trials."""
    return [row for row in findings.points if state_of(row) is TrialState.COMPLETE]


def varying(rows: Sequence[Row]) -> list[str]:
    """The parameters that have more than one value in these points, in their order."""
    seen: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.params.items():
            seen.setdefault(name, set()).add(repr(value))
    return [name for name, values in seen.items() if len(values) > 1]


# --- one by one ------------------------------------------------------------------------------------------------


def _history(findings: Findings, index: int, title: str) -> Figure:
    complete = complete_points(findings)
    if not complete:
        return Figure(title=title, note="No point is complete yet.")
    name = findings.spec.all_objectives[index].metric
    study = study_from(findings, objective=index)
    drawn = _draw(lambda: visualization.plot_optimization_history(study, target_name=name))
    note = _grey(complete)
    if findings.spec.repeats:
        drawn.update_layout(xaxis_title="Point")
        note = f"Points are counted in the order of their first trials. {note}"
    return Figure(title=title, drawn=drawn, note=note)


def _importances(findings: Findings, index: int, title: str) -> Figure:
    complete = complete_points(findings)
    why = _too_little(complete)
    if why:
        return Figure(title=title, note=why)
    sample = _sample(complete, _MOST_IMPORTANCE)
    names = _present(varying(complete), sample)
    if len(names) == 1:
        return Figure(title=title, note=f"Only one parameter varies: {html.unescape(names[0])}.")
    if len({row.means[index] for row in complete}) == 1:
        return Figure(title=title, note="All complete points have the same value.")
    study = study_from(findings, objective=index, shown=_numbers(sample))
    drawn = _draw(lambda: visualization.plot_param_importances(study, params=names))
    note = f"{_part(sample, complete)}How much each parameter tells the best tenth of the points from all (PED-ANOVA)."
    if len(complete) < _FEW:
        note += f" From {len(complete)} points, it is no more than a hint."
    return Figure(title=title, drawn=drawn, note=note)


def _slices(findings: Findings, index: int, title: str) -> Figure:
    complete = complete_points(findings)
    why = _too_little(complete)
    if why:
        return Figure(title=title, note=why)
    sample = _sample(complete, _MOST_SLICES)
    names = _present(varying(complete), sample)
    study = study_from(findings, objective=index, shown=_numbers(sample))
    metric = findings.spec.all_objectives[index].metric
    drawn = _draw(lambda: visualization.plot_slice(study, params=names, target_name=metric))
    note = _part(sample, complete) + _grey(complete)
    return Figure(title=title, drawn=drawn, note=note, width=240 * len(names))


def _parallel(findings: Findings) -> Figure:
    title = "Parallel coordinates"
    complete = complete_points(findings)
    why = _too_little(complete)
    if why:
        return Figure(title=title, note=why)
    sample = _sample(complete, _MOST_LINES)
    names = _present(varying(complete), sample)
    study = study_from(findings, shown=_numbers(sample))
    objectives = findings.spec.all_objectives
    # of several objectives, each has an axis, named by the study
    name = objectives[0].metric if len(objectives) == 1 else "Objective Value"
    drawn = _draw(lambda: visualization.plot_parallel_coordinate(study, params=names, target_name=name))
    return Figure(
        title=title, drawn=drawn, note=_part(sample, complete), width=130 * (len(names) + len(objectives))
    )


def _curves(findings: Findings) -> Figure:
    label = findings.spec.all_objectives[0].metric
    metric = html.unescape(label)
    title = f"Intermediate values of {metric}"
    steps = {step for curve in findings.curves.values() for step in curve}
    if not steps:
        return Figure(title=title, note=f"No trial has reported {metric} yet.")
    if all(len(curve) <= 1 for curve in findings.curves.values()):
        return Figure(title=title, note=f"No trial has reported {metric} at more than one step.")
    with_curves = [row for row in findings.points if findings.curves.get(row.trials[0])]
    sample = _sample(with_curves, _MOST_CURVES)
    longest = max(len(findings.curves[row.trials[0]]) for row in sample)
    every = -(-longest // _MOST_STEPS)
    thin = {row.trials[0]: dict(list(findings.curves[row.trials[0]].items())[::every]) for row in sample}
    study = study_from(replace(findings, curves=thin), shown=_numbers(sample))
    drawn = _draw(lambda: visualization.plot_intermediate_values(study))
    if drawn is not None:
        drawn.update_layout(yaxis_title=label)
    note = _part(sample, with_curves, findings.uncounted)
    return Figure(
        title=title, drawn=drawn, note=note + (f"One step of {every} is shown." if every > 1 else "")
    )


def _pareto_front(findings: Findings) -> Figure:
    title = "Pareto front"
    objectives = findings.spec.all_objectives
    complete = complete_points(findings)
    if len(objectives) > 3:
        return Figure(
            title=title, note=f"It is drawn of two or three objectives; there are {len(objectives)}."
        )
    if not complete:
        return Figure(title=title, note="No point is complete yet.")
    front = _sample(front_of(findings.rows), _MOST_PARETO // 3)
    sample = front + [row for row in _sample(complete, _MOST_PARETO) if row.rank != 1 or row.infeasible]
    study = study_from(findings, shown=_numbers(sample))
    names = [each.metric for each in objectives]
    drawn = _draw(lambda: visualization.plot_pareto_front(study, target_names=names))
    note = f"{_part(sample, complete)}Red points are the front, blue ones the others. {_grey(complete)}"
    return Figure(title=title, drawn=drawn, note=note)


# --- what they share -------------------------------------------------------------------------------------------


def _draw(plot: Callable[[], Any]) -> Any:
    """Optuna's figure in the page's dress."""
    with quiet():
        drawn = plot()
    drawn.update_layout(
        title=None,
        template="plotly_white",
        font={"color": "#1b1b1b", "size": 13},
        width=None,
        margin={"l": 60, "r": 30, "t": 40, "b": 80},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": -0.22, "yanchor": "top"},
    )
    return drawn


def _too_little(complete: Sequence[Row]) -> str:
    """Why nothing can be said about parameters yet; empty where something can."""
    if not complete:
        return "No point is complete yet."
    if len(complete) == 1:
        return "It needs at least two complete points; there is one."
    return "" if varying(complete) else "No parameter varies in the complete points."


def _sample(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many of these points: the best, and others evenly spread, in their order."""
    if len(rows) <= most:
        return list(rows)
    best = sorted((row for row in rows if row.rank is not None), key=lambda row: row.rank or 0)[:_BEST]
    room = most - len(best)
    chosen = _numbers(best) | {rows[index * len(rows) // room].trials[0] for index in range(room)}
    return [row for row in rows if row.trials[0] in chosen]


def _present(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Those of the parameters that some of the points have."""
    return [name for name in names if any(name in row.params for row in rows)]


def _numbers(rows: Sequence[Row]) -> set[int]:
    return {row.trials[0] for row in rows}


def _part(sample: Sequence[Row], rows: Sequence[Row], others: int = 0) -> str:
    """What to say of a figure that shows a part of the points only."""
    total = len(rows) + others
    if len(sample) >= total:
        return ""
    return f"{len(sample):,} of {total:,} points: the best, and others evenly spread. "


def _grey(rows: Sequence[Row]) -> str:
    return "Grey points violate a constraint." if any(row.infeasible for row in rows) else ""


def _escaped(findings: Findings) -> Findings:
    """Names and values as plotly's labels take them: its text is HTML of a kind."""
    spec = findings.spec
    objectives = tuple(each.model_copy(update={"metric": _safe(each.metric)}) for each in spec.all_objectives)
    rows = [
        replace(row, params={_safe(name): _safe(value) for name, value in row.params.items()})
        for row in findings.rows
    ]
    return replace(findings, spec=spec.model_copy(update={"objectives": objectives}), rows=rows)


def _safe(value: Any) -> Any:
    if not isinstance(value, str):
        return value if isinstance(value, int | float) else _safe(str(value))
    text = value
    if len(value) > _NAME:
        digest = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        text = f"{value[: _NAME - 12]}… ({digest})"
    return html.escape(text, quote=False)
