"""One point of a sweep's space: what a trial is made from.

It stands alone so that the space, which makes points, and the searchers, which hand them out, need not know
each other. Nothing here may import Hydra or any other heavy library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

Scalar: TypeAlias = str | int | float | bool | None
"""What a sampler can choose: Optuna's ``CategoricalChoiceType``, and numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point of the space.

    ``overrides`` is the trial's whole list of Hydra overrides, fixed ones included, as Hydra's BasicSweeper
    would hand it to its launcher. ``params`` and ``repeat`` hold plain Python values for display and
    ranking, by key without ``+``, ``++`` or ``~``: those of the keys of ``sweep.params`` and of all other
    swept keys, and those of ``sweep.repeats``. The mappings must not be changed.
    """

    overrides: tuple[str, ...]
    params: Mapping[str, object]
    repeat: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Categorical:
    """One of these values, at least one; no two are equal."""

    choices: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class IntRange:
    """The integers ``low``, ``low + step``, … up to ``high``, which is one of them."""

    low: int
    high: int
    log: bool = False
    step: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatRange:
    """The numbers from ``low`` to ``high``, both included; with a ``step`` only ``low``, ``low + step``, …"""

    low: float
    high: float
    log: bool = False
    step: float | None = None


Domain: TypeAlias = Categorical | IntRange | FloatRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """What a sampler chooses a value for.

    ``name`` is its own in the whole space: the ``key`` without ``+``, ``++`` or ``~``, followed by the choices that it
    depends on where the key stands in several places (``optimizer.lr (optimizer=SGD)``). ``conditional``: it exists
    only with some choice of another parameter. ``where`` names its place for messages.
    """

    name: str
    key: str
    where: str
    domain: Domain
    conditional: bool = False


Choose: TypeAlias = Callable[[Parameter], Scalar]
"""Chooses a value in a parameter's domain; called once for each parameter that exists."""
