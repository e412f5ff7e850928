"""Conditions that choose trials, such as ``optimizer=Adam`` or ``val_loss<0.5``, and groups of them.

Conditions on params and repeats choose trials. Conditions on metrics choose points, by their mean over the trials that
were chosen: who leaves out the seeds of a point that did badly has not found a better point.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import yaml

from repro_sweep.errors import TrackingError
from repro_sweep.results import Trial, value_of
from repro_sweep.standings import point_of
from repro_sweep.states import TrialState

SWEEP = "sweep"
"""Stands for the sweep that a trial belongs to, unless a param has this name."""

_CONDITION = re.compile(r"\s*(?P<name>[^!=<>]+?)\s*(?P<sign>!=|<=|>=|=|<|>)\s*(?P<value>.*?)\s*", re.DOTALL)
_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_NOTHING = object()

Labelled = tuple[str, Trial]
"""A trial, and what its sweep is called."""


class UnknownNameError(TrackingError):
    """No trial has a param, repeat or metric of this name."""


class Kind(StrEnum):
    """What a name stands for."""

    PARAM = "params"
    METRIC = "metrics"
    SWEEP = "sweep"


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """``name sign value``; ``quoted``: the value is text, whatever it looks like."""

    name: str
    sign: str
    value: str
    quoted: bool

    def __str__(self) -> str:
        return f"{self.name}{self.sign}{self.value}"

    def holds(self, found: object) -> bool:
        """Whether a value satisfies it. What is not there is equal to nothing."""
        if self.sign in _ORDERS:
            is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
            return is_number and _ORDERS[self.sign](found, float(self.value))
        return (found is not _NOTHING and self._is(found)) is (self.sign == "=")

    def _is(self, found: object) -> bool:
        if isinstance(found, str) or self.quoted:
            return found == self.value
        if isinstance(found, bool):
            return self.value.lower() == str(found).lower()
        if found is None:
            return self.value.lower() in {"null", "none", ""}
        if isinstance(found, (int, float)):
            number = _number(self.value)
            return number is not None and (found == number or (math.isnan(found) and math.isnan(number)))
        try:
            return bool(yaml.safe_load(self.value) == found)
        except yaml.YAMLError:
            return False


def parse(where: str | Sequence[str]) -> list[Condition]:
    """Conditions that must all hold: of several texts, or of one with commas between them.

    A value with a comma stands in quotes or brackets.

    Raises:
        TrackingError: a text is no condition.
    """
    found = []
    for text in [where] if isinstance(where, str) else where:
        for part in _parts(text):
            matched = _CONDITION.fullmatch(part)
            if matched is None:
                raise TrackingError(
                    f"where: {part.strip()!r} is no condition: write NAME=VALUE, with one of = != < <= > >="
                )
            name, sign, value = matched["name"], matched["sign"], matched["value"]
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            value = value[1:-1] if quoted else value
            if sign in _ORDERS and _number(value) is None:
                raise TrackingError(f"where: {part.strip()!r}: {value!r} is no number")
            found.append(Condition(name=name, sign=sign, value=value, quoted=quoted))
    return found


def chosen(trials: Sequence[Labelled], conditions: Sequence[Condition]) -> list[Labelled]:
    """The trials that satisfy all conditions, in their order.

    Raises:
        UnknownNameError: no trial has a name.
        TrackingError: a name is that of a param and of a metric.
    """
    names = [(each, *resolved(each.name, trials)) for each in conditions]
    left = [
        (label, trial)
        for label, trial in trials
        if all(
            each.holds(_param(label, trial, kind, name))
            for each, kind, name in names
            if kind is not Kind.METRIC
        )
    ]
    for each, kind, name in names:
        if kind is Kind.METRIC:
            means = _means(left, name)
            left = [
                (label, trial) for label, trial in left
                if each.holds(means.get((label, _point(trial)), _NOTHING))
            ]  # fmt: skip
    return left


def resolved(name: str, trials: Iterable[Labelled], *, metrics: bool = True) -> tuple[Kind, str]:
    """What a name stands for, and the name without what makes it plain which it is.

    Args:
        name: of a param, a repeat or a metric, perhaps with ``params.`` or ``metrics.`` before it.
        trials: those that may have it.
        metrics: whether it may be that of a metric.

    Raises:
        UnknownNameError: no trial has it.
        TrackingError: it is that of a param and of a metric.
    """
    there: dict[Kind, dict[str, None]] = {Kind.PARAM: {}, Kind.METRIC: {}}
    for _, trial in trials:
        there[Kind.PARAM] |= dict.fromkeys([*trial.params, *trial.repeat])
        there[Kind.METRIC] |= dict.fromkeys(trial.metrics if metrics else ())
    kinds = [kind for kind, names in there.items() if name in names]
    if len(kinds) > 1:
        raise TrackingError(f"{name!r} is a param and a metric: write params.{name} or metrics.{name}")
    if kinds:
        return kinds[0], name
    for kind, names in there.items():
        if (rest := name.removeprefix(f"{kind}.")) != name and rest in names:
            return kind, rest
    if name == SWEEP:
        return Kind.SWEEP, name
    known = sorted({each for names in there.values() for each in names})
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are: {', '.join(known[:20]) or 'none yet'}"
    raise UnknownNameError(f"no trial has a {'param or metric' if metrics else 'param'} {name!r}; {hint}")


def group_of(label: str, trial: Trial, names: Sequence[tuple[Kind, str]]) -> dict[str, object]:
    """The values of some params of a trial, without those that it does not have."""
    values = {name: _param(label, trial, kind, name) for kind, name in names}
    return {name: value for name, value in values.items() if value is not _NOTHING}


def _param(label: str, trial: Trial, kind: Kind, name: str) -> object:
    if kind is Kind.SWEEP:
        return label
    return trial.params.get(name, trial.repeat.get(name, _NOTHING))


def _means(trials: Iterable[Labelled], metric: str) -> Mapping[tuple[str, str], float]:
    """The mean of a metric over the complete trials of each point that has it."""
    values: dict[tuple[str, str], list[float]] = {}
    for label, trial in trials:
        value = value_of(trial, metric)
        if trial.state is TrialState.COMPLETE and value is not None:
            values.setdefault((label, _point(trial)), []).append(value)
    return {point: sum(each) / len(each) for point, each in values.items()}


def _point(trial: Trial) -> str:
    return point_of(trial.point, trial.params)


def _parts(text: str) -> list[str]:
    """A text at its commas, but for those in quotes and brackets."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "[{(":
            depth += 1
        elif sign in "]})":
            depth -= 1
        elif sign == "," and depth <= 0:
            parts.append("")
            continue
        parts[-1] += sign
    return parts


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
