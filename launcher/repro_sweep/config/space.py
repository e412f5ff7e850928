"""The space of a sweep: ``sweep.params``, ``zip``, ``exclude``, ``repeats`` and the command line as points.

A grid expands it; a search draws from it, and may have ranges in it. Where no feature of repro-sweep is used, the
points and their order are those of Hydra's BasicSweeper (``hydra/_internal/core_plugins/basic_sweeper.py``). What the
features mean is said in :class:`Space`.

A space never composes a config: whether a key exists is Hydra's to judge. Nor does it drop duplicates:
points may repeat (``x=1,1``), and two different ones may resolve to the same config; whoever composes them
tells.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence

from hydra.core.config_loader import ConfigLoader

from repro_sweep.config import axes, domains, walks
from repro_sweep.config.axes import Block, Combination, Role
from repro_sweep.config.grammar import Grammar, Token, bare_name, token
from repro_sweep.config.reader import Clause, Reader, mapping, native
from repro_sweep.errors import SpaceError
from repro_sweep.points import Choose, Parameter, Point, Scalar


class Space:
    """All points of a sweep, expanded while iterating and always in the same order.

    A value in ``params``, ``exclude`` and ``repeats`` is a string in Hydra's override grammar
    (``"0.1,0.01"``, ``"range(3)"``, ``"'a, b'"``), another YAML scalar (itself), or a YAML list, whose
    items are taken as they are: a string there is this very string, a list or mapping there is one value.

    Args:
        params: a mapping of keys to values, or a list of such mappings: their union, in order. The value of
            a key may also be a mapping of its choices (in the grammar) to nested params, which exist only
            with the choice and vary faster than it. The last key varies fastest. OmegaConf's containers are
            taken unresolved.
        zip_: lists of keys of one mapping whose values advance together, at the position of the first.
        exclude: partial points: each drops the points that have, for every key it names, one of its values.
        repeats: keys to values; they vary fastest, and a point keeps them apart from its params.
        overrides: the task's overrides from the command line. One whose key stands in ``params`` or
            ``repeats`` replaces the values there, wherever they exist (a fixed one pins them; for a key
            with nested choices it selects among these, and a new choice has nothing nested). All others are
            appended, as Hydra does. Without a ``+`` or ``~`` of its own the override takes that of the key
            in ``params``.
        hydra_params: ``hydra.sweeper.params``; they come first, and give way to equal keys of all other
            sources.
        config_loader: finds the options of config groups for ``glob``.
        search: the space is drawn from: ``interval(…)`` is allowed, and ``range(…)`` is a numeric range.
            All else that has several values is one categorical parameter: the rows of a ``zip_`` too, named as
            their keys, and the mappings of a list in ``params``, named so.
        extended: a function of the user's adds parameters, so there need be none here.

    Raises:
        SpaceError: something of the above is not so, a sweep of Hydra's own configuration or of the sweep's
            options is asked for, an axis has no values, a key in ``zip_`` or ``exclude`` is no key of
            the space, or there is nothing to search.
    """

    def __init__(
        self,
        *,
        params: object = None,
        zip_: Sequence[Sequence[str]] = (),
        exclude: Sequence[Mapping[str, object]] = (),
        repeats: Mapping[str, object] | None = None,
        overrides: Sequence[str] = (),
        hydra_params: Mapping[str, str] | None = None,
        config_loader: ConfigLoader | None = None,
        search: bool = False,
        extended: bool = False,
    ) -> None:
        reader = Reader(Grammar(config_loader), search=search)
        base, given = reader.override_axes(native(hydra_params) or {}, overrides)
        declared = reader.params(native(params))
        repeated = reader.repeats(native(repeats))
        axes.check_names(declared)
        if both := axes.all_names(declared) & axes.axis_names(repeated):
            raise SpaceError(
                f"sweep.repeats.{min(both)}: the key stands in sweep.params too; keep one of them"
            )

        by = {axis.name: axis for axis in given}
        by_again = {name: axes.expanded(by[name]) for name in axes.axis_names(repeated) & by.keys()}
        grid, again = axes.replace_axes(declared, by), axes.replace_axes(repeated, by_again)
        live = axes.all_names(grid) | axes.axis_names(again)
        first, last = axes.ordinary(base, [axis for axis in given if axis.name not in live])
        always = axes.names_in_all(grid) | axes.axis_names(again)
        first = tuple(axis for axis in first if axis.name not in always)
        self._shadowed = frozenset({axis.name for axis in first} & live)

        groups = reader.zip(native(zip_))
        self._exclude = reader.exclude(native(exclude))
        block, before = first + grid + last, first + declared + last
        _check_zip(groups, (before, block, repeated))
        _check_exclude(
            self._exclude, axes.all_names(before) | axes.all_names(block) | axes.all_names(repeated)
        )
        block, self._again = axes.zip_axes(block, groups), axes.zip_axes(again, groups)
        self._block: Block = block + self._again
        self._tree: Block = walks.with_parameters(block, self._shadowed) if search else ()
        if search and not extended and not self.parameters():
            raise SpaceError(
                "sweep.params: there is nothing to search: no key has several values; give one choices or a "
                "range, such as interval(0, 1)"
            )

    def __len__(self) -> int:
        """The same as :attr:`size`."""
        return self.size

    @property
    def size(self) -> int:
        """The number of points, repeats included, before ``exclude`` drops any; expands nothing but ranges.

        Raises:
            SpaceError: there is an interval.
        """
        return axes.count(self._grid)

    @property
    def _grid(self) -> Block:
        return axes.expand_all(self._block) if self._tree else self._block

    def __iter__(self) -> Iterator[Point]:
        """Expand the points one by one.

        Raises:
            SpaceError: there is an interval; at the end, if ``exclude`` has dropped every point.
        """
        empty = True
        for combination in axes.combinations(self._grid):
            choices = self._unshadowed(combination) if self._shadowed else combination
            if self._exclude and self._is_excluded(choices):
                continue
            empty = False
            yield _point(choices)
        if empty:
            raise SpaceError(f"sweep.exclude: drops all of the {self.size} points; nothing is left to run")

    def parameters(self) -> tuple[Parameter, ...]:
        """All that a search can choose, each after what it depends on; none in a space that is no search's."""
        return tuple(walks.parameters(self._tree))

    def draw(self, choose: Choose) -> tuple[Point, ...]:
        """The point that results from choosing each parameter that exists, once for each repeat; empty if excluded.

        Raises:
            ValueError: ``choose`` has returned something outside of the parameter's domain.
        """
        drawn = self._unshadowed(walks.draw(self._tree, choose, self._shadowed))
        repeats = (drawn + again for again in axes.combinations(self._again))
        return tuple(_point(choices) for choices in repeats if not self._is_excluded(choices))

    def assign(self, params: Mapping[str, object]) -> dict[str, Scalar] | None:
        """What must be chosen to draw the point with these params, by the names of parameters.

        None where the space does not have it: a parameter's key is missing, a value is not in its range or among its
        choices, or a key does not exist beside the others. A key of which the space has one value may be missing, and
        keys that the space has nowhere are ignored.
        """
        known = axes.all_names(self._tree) & params.keys()
        found: dict[str, Scalar] | None = None
        for combination, values in walks.fits(self._tree, params, self._shadowed):
            if not known <= {choice.name for choice in combination}:
                continue
            if all(choice.name in params for choice in combination if choice.role is Role.PARAM):
                return values
            found = values if found is None else found
        return found

    def assign_partial(self, params: Mapping[str, object], where: str) -> dict[str, Scalar]:
        """What must be chosen for a point to have these values, whatever its others are.

        A key that exists only with some choice brings the choice along: the first that allows its value.

        Args:
            params: plain values by key.
            where: the place of ``params`` for errors.

        Raises:
            SpaceError: a key that the space does not have, a value that it has in no branch, or keys that never
                exist together.
        """
        plain = mapping(native(params), where, "a mapping of keys to values")
        return walks.partial(self._tree, {bare_name(str(key)): value for key, value in plain.items()}, where)

    def probes(self) -> Iterator[tuple[Point, ...]]:
        """Draws that together have every choice, and both ends of every range, wherever these are not excluded.

        Raises:
            SpaceError: at the end, if ``exclude`` has dropped every point that was tried.
        """
        seen: set[tuple[str, Token]] = set()
        for values in walks.covering(self._tree):
            yield from self._probe(values, seen, tries=1)
        if self._exclude or self._shadowed:
            for values in walks.wanted(self._tree):
                *_, (name, value) = values.items()
                if (name, token(value)) not in seen:
                    yield from self._probe(values, seen, tries=100, must=name)
        if not seen:  # such as where both ends of the only range are excluded
            yield from self._probe({}, seen, tries=1000)
        if not seen:
            raise SpaceError("sweep.exclude: drops every point that was tried; nothing is left to search")

    def _probe(
        self,
        values: Mapping[str, Scalar],
        seen: set[tuple[str, Token]],
        *,
        tries: int,
        must: str | None = None,
    ) -> Iterator[tuple[Point, ...]]:
        """The first draw with these values that is not excluded and has the parameter ``must``, if there is one."""
        dice = random.Random(0)  # noqa: S311  # not the module's own, which shuffle draws from
        for _ in range(tries):
            drawn: dict[str, Scalar] = {}

            def choose(parameter: Parameter, drawn: dict[str, Scalar] = drawn) -> Scalar:
                name = parameter.name
                drawn[name] = values[name] if name in values else domains.sample(parameter.domain, dice)
                return drawn[name]

            points = self.draw(choose)
            if points and (must is None or must in drawn):
                seen.update((name, token(value)) for name, value in drawn.items())
                yield points
                return

    def _unshadowed(self, combination: Combination) -> Combination:
        """Without the choices of ``hydra.sweeper.params`` whose key a conditional axis has set as well."""
        last = {choice.name: choice for choice in combination if choice.name in self._shadowed}
        return tuple(choice for choice in combination if last.get(choice.name, choice) is choice)

    def _is_excluded(self, combination: Combination) -> bool:
        values = {choice.name: choice.value for choice in combination}
        return any(
            all(name in values and token(values[name]) in tokens for name, tokens in clause.items())
            for clause in self._exclude
        )


def _point(combination: Combination) -> Point:
    params: dict[str, object] = {}
    repeat: dict[str, object] = {}
    for choice in combination:
        if choice.role is Role.PARAM:
            params[choice.name] = choice.value
        elif choice.role is Role.REPEAT:
            repeat[choice.name] = choice.value
    return Point(overrides=tuple([choice.override for choice in combination]), params=params, repeat=repeat)


def _check_zip(groups: Iterable[tuple[str, frozenset[str]]], blocks: Sequence[Block]) -> None:
    known = frozenset().union(*(axes.all_names(block) for block in blocks))
    inner = [axes.axis_names(child) for block in blocks for child in axes.walk_blocks(block)]
    for where, names in groups:
        if unknown := names - known:
            raise _unknown_key(where, min(unknown), known)
        if not any(names <= own for own in inner):
            raise SpaceError(f"{where}: the keys {', '.join(sorted(names))} must stand in one mapping")


def _check_exclude(clauses: Iterable[Clause], known: frozenset[str]) -> None:
    for i, clause in enumerate(clauses):
        for name in clause:
            if name not in known:
                raise _unknown_key(f"sweep.exclude[{i}]", name, known)


def _unknown_key(where: str, name: str, known: Iterable[str]) -> SpaceError:
    return SpaceError(
        f"{where}: {name!r} is no key of this space ({', '.join(sorted(known)) or 'it has none'})"
    )
