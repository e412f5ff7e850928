"""What a searcher is, and how one is found by its name.

A :class:`Searcher` hands out all points of a space before anything starts; a :class:`Search` suggests one after the
other. A new one is a module in this folder, named as it is chosen in ``sweep/sampler=NAME``, or an entry point in the
group ``repro_sweep.searchers`` that refers to such a module. Either has two names: ``OPTIONS``, the dataclass of its
typed options (put into Hydra's ConfigStore), and ``SEARCHER``, its class. A module for several samplers has a mapping
from their names to the options of each as ``OPTIONS``. Nothing here may import Hydra, Optuna or the space.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from types import ModuleType
from typing import Protocol, TypeAlias

from repro_sweep import plugins
from repro_sweep.errors import SpaceError
from repro_sweep.points import Choose, Parameter, Point, Scalar
from repro_sweep.states import TrialState

ENTRY_POINT_GROUP = "repro_sweep.searchers"
_PACKAGE = "repro_sweep.search"
_HELPERS = plugins.PORT | {"checks", "memory", "pruning", "samplers", "study", "targets"}

Options: TypeAlias = type | Mapping[str, object]
"""What Hydra's ConfigStore gets: a dataclass, or a plain mapping where any further key is an option."""


class Searcher(ABC):
    """Hands out points and learns what became of them.

    It belongs to the coordinator, lives in its process only, and is called from one thread; it needs no
    locks and must not block for long, as no slot gets a trial meanwhile. It keeps nothing on disk: after a
    restart the coordinator makes a new one and tells it again what the ledger knows.
    """

    @abstractmethod
    def ask(self) -> Point | None:
        """The next point to try, or None if there is none (any more: it stays so).

        Raises:
            SpaceError: the space turns out to be empty.
        """

    @abstractmethod
    def tell(self, number: int, state: TrialState, values: Sequence[float] | None) -> None:
        """Trial ``number``, which is finished, came to ``state``; ``values`` are its metrics if it has any.

        ``number`` counts the points that :meth:`ask` returned, from 0. A trial is told once, in any order.
        """


class SearchSpace(Protocol):
    """What a search needs of a space (``config.space.Space``)."""

    def parameters(self) -> Sequence[Parameter]:
        """All that a sampler can choose, whatever it depends on."""

    def draw(self, choose: Choose) -> tuple[Point, ...]:
        """The point that results from choosing each parameter that exists, once for each repeat; empty if excluded."""

    def assign(self, params: Mapping[str, object]) -> dict[str, Scalar] | None:
        """The values, by the names of parameters, of the point with these params; None where the space has it not."""

    def assign_partial(self, params: Mapping[str, object], where: str) -> dict[str, Scalar]:
        """The values, by the names of parameters, that some params fix; ``where`` names them in errors.

        Raises:
            SpaceError: the space has no such parameter or no such value.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """What a search asks for.

    ``values`` are those that it chose, by the names of parameters. ``points`` are what to run: one for each repeat;
    none where the space excludes what was chosen (it counts as failed, and needs no :meth:`Search.tell`).
    """

    values: Mapping[str, Scalar]
    points: tuple[Point, ...]


class Search(ABC):
    """Suggests one point after the other, from what became of the earlier ones.

    It lives in a process of its own and is called from one thread. Suggestions are counted from 0, the same number
    for all repeats of a point. Its state is a function of the calls made to it, in their order: a process that makes
    the calls again, with :meth:`restore` in place of :meth:`ask`, goes on with the same suggestions.
    """

    @abstractmethod
    def ask(self) -> Suggestion | None:
        """The next suggestion, None if there is none any more."""

    @abstractmethod
    def restore(self, values: Mapping[str, Scalar]) -> Suggestion:
        """The next suggestion has been made before, and was this one.

        Raises:
            SpaceError: the space does not have it.
        """

    @abstractmethod
    def tell(
        self, number: int, state: TrialState, values: Sequence[float] | None, violations: Sequence[float] = ()
    ) -> None:
        """Suggestion ``number`` came to ``state``; a later call replaces an earlier one.

        Args:
            number: of the suggestion.
            state: COMPLETE, PRUNED or FAIL.
            values: one for each objective, None where there are none; of a pruned one, its last value if it has any.
            violations: one for each constraint, greater than 0 where it is violated.
        """

    @abstractmethod
    def report(self, number: int, step: int, value: float, *, decide: bool = True) -> None:
        """The first objective's value at a step of suggestion ``number``.

        Without ``decide`` nobody will ask whether the suggestion is to be pruned; it had ended when this was read.
        """

    @abstractmethod
    def should_prune(self, number: int) -> bool:
        """Whether suggestion ``number`` is not worth going on with, by what was reported."""

    def learn(  # noqa: B027
        self,
        values: Mapping[str, Scalar],
        state: TrialState,
        objectives: Sequence[float],
        violations: Sequence[float] = (),
    ) -> None:
        """Something that is known from elsewhere, before the first suggestion; a search may ignore it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A searcher or search that was found: its name, its options, and its class."""

    name: str
    options: Options
    searcher: type[Searcher | Search]


def load(name: str) -> Sampler:
    """Find the searcher that is called ``name``; a module of this folder goes before an entry point.

    Raises:
        SpaceError: there is none, or what there is does not define ``OPTIONS`` and ``SEARCHER``.
    """
    own = _provided().get(name)
    module = own or plugins.load(_PACKAGE, ENTRY_POINT_GROUP, name, _HELPERS)
    if module is None or name not in names():
        raise SpaceError(f"sweep.sampler: {name!r} is not a sampler ({', '.join(names())})")
    options, searcher = getattr(module, "OPTIONS", None), getattr(module, "SEARCHER", None)
    if isinstance(options, Mapping):
        options = options.get(name)
    if not (isinstance(options, Mapping) or (isinstance(options, type) and is_dataclass(options))):
        raise SpaceError(
            f"sweep.sampler: {name!r}: {module.__name__}.OPTIONS must be a dataclass, got {options!r}"
        )
    if not (isinstance(searcher, type) and issubclass(searcher, (Searcher, Search))):
        raise SpaceError(
            f"sweep.sampler: {name!r}: {module.__name__}.SEARCHER must be a Searcher, got {searcher!r}"
        )
    return Sampler(name=name, options=options, searcher=searcher)


def names() -> tuple[str, ...]:
    """The names of all samplers, sorted; no other package's is imported for it."""
    modules = plugins.names(_PACKAGE, ENTRY_POINT_GROUP, _HELPERS)
    own = _modules()
    return tuple(sorted({*_provided(), *(name for name in modules if name not in own)}))


def options() -> dict[str, Options]:
    """The options of every sampler, by name.

    Raises:
        SpaceError: a searcher does not define what it must.
    """
    return {name: load(name).options for name in names()}


def pruner_options() -> dict[str, Options]:
    """The options of every pruner, by name: for ``sweep/pruner`` and ``sweep/repeats_pruner``."""
    found: dict[str, Options] = dict(import_module(f"{_PACKAGE}.pruning").OPTIONS)
    return found


def asks_quickly_until(name: str) -> int | None:
    """How many finished suggestions it takes until another one costs this sampler more than some 10 ms.

    None: it is always quick, or it is not known. A search that is not quick any more is better asked ahead of time.
    """
    known: Mapping[str, int | None] = getattr(_provided().get(name), "ASKS_QUICKLY_UNTIL", {})
    return known.get(name)


def _provided() -> dict[str, ModuleType]:
    """The module of each sampler of this folder: its own name, or the names in its mapping of options."""
    found: dict[str, ModuleType] = {}
    for name, module in _modules().items():
        given = getattr(module, "OPTIONS", None)
        found |= dict.fromkeys(given if isinstance(given, Mapping) else (name,), module)
    return found


def _modules() -> dict[str, ModuleType]:
    """The modules of this folder that are searchers; cheap, as none imports its library before it is used."""
    package = import_module(_PACKAGE)
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return {name: import_module(f"{_PACKAGE}.{name}") for name in found if name not in _HELPERS}
