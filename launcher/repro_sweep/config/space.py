"""The space of a sweep: ``sweep.params``, ``zip``, ``exclude``, ``repeats`` and the command line as points.

Where no feature of repro-sweep is used, the points and their order are those of Hydra's BasicSweeper
(``hydra/_internal/core_plugins/basic_sweeper.py``). What the features mean is said in :class:`Space`.

A space never composes a config: whether a key exists is Hydra's to judge. Nor does it drop duplicates:
points may repeat (``x=1,1``), and two different ones may resolve to the same config; whoever composes them
tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from omegaconf import Container, OmegaConf

from repro_sweep.config import axes
from repro_sweep.config.axes import Axis, Block, Choice, Combination, Role
from repro_sweep.config.grammar import Grammar, Term, Token, bare_name, key_name, sequence, token
from repro_sweep.errors import SpaceError
from repro_sweep.points import Point

Clause = dict[str, frozenset[Token]]


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

    Raises:
        SpaceError: something of the above is not so, a sweep of Hydra's own configuration or of the sweep's
            options is asked for, an axis has no values, or a key in ``zip_`` or ``exclude`` is no key of
            the space.
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
    ) -> None:
        reader = _Reader(Grammar(config_loader))
        base, given = reader.override_axes(_native(hydra_params) or {}, overrides)
        declared = reader.params(_native(params))
        repeated = reader.repeats(_native(repeats))
        axes.check_names(declared)
        if both := axes.all_names(declared) & axes.axis_names(repeated):
            raise SpaceError(
                f"sweep.repeats.{min(both)}: the key stands in sweep.params too; keep one of them"
            )

        by = {axis.name: axis for axis in given}
        grid, again = axes.replace_axes(declared, by), axes.replace_axes(repeated, by)
        live = axes.all_names(grid) | axes.axis_names(again)
        first, last = _ordinary(base, [axis for axis in given if axis.name not in live])
        always = axes.names_in_all(grid) | axes.axis_names(again)
        first = tuple(axis for axis in first if axis.name not in always)
        self._shadowed = {axis.name for axis in first} & live

        groups = reader.zip(_native(zip_))
        self._exclude = reader.exclude(_native(exclude))
        block, before = first + grid + last, first + declared + last
        _check_zip(groups, (before, block, repeated))
        _check_exclude(
            self._exclude, axes.all_names(before) | axes.all_names(block) | axes.all_names(repeated)
        )
        self._block: Block = axes.zip_axes(block, groups) + axes.zip_axes(again, groups)

    def __len__(self) -> int:
        """The same as :attr:`size`."""
        return self.size

    @property
    def size(self) -> int:
        """The number of points, repeats included, before ``exclude`` drops any; expands nothing."""
        return axes.count(self._block)

    def __iter__(self) -> Iterator[Point]:
        """Expand the points one by one.

        Raises:
            SpaceError: at the end, if ``exclude`` has dropped every point.
        """
        empty = True
        for combination in axes.combinations(self._block):
            choices = self._unshadowed(combination) if self._shadowed else combination
            if self._exclude and self._is_excluded(choices):
                continue
            empty = False
            yield _point(choices)
        if empty:
            raise SpaceError(f"sweep.exclude: drops all of the {self.size} points; nothing is left to run")

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


def _ordinary(base: Iterable[Axis], given: Iterable[Axis]) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """Merge as BasicSweeper does: the last of equal keys wins, at the first one's position."""
    first = {axis.key: axis for axis in base}
    last: dict[str, Axis] = {}
    for axis in given:
        (first if axis.key in first else last)[axis.key] = axis
    return tuple(first.values()), tuple(last.values())


def _native(value: object) -> object:
    """OmegaConf's containers as plain ones; interpolations stay for the trial's config to resolve."""
    return OmegaConf.to_container(value, resolve=False) if isinstance(value, Container) else value


class _Reader:
    """Reads each part of a sweep's space into axes; every error names the place."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar

    def override_axes(self, hydra_params: object, overrides: Sequence[str]) -> tuple[list[Axis], list[Axis]]:
        """The axes of ``hydra.sweeper.params`` and of the command line, each as it stands."""
        where = "hydra.sweeper.params"
        items = _mapping(hydra_params, where, "a mapping of keys to values")
        texts = [(f"{where}.{key}", f"{key}={value}") for key, value in items.items()]
        texts += [("command line", text) for text in overrides]
        # All are parsed before any is expanded: so shuffle draws its random numbers in BasicSweeper's order.
        parsed = [(self._grammar.parse(text, place), place) for place, text in texts]
        parsed[len(items) :] = [(o, f"{place}, {o.get_key_element()}") for o, place in parsed[len(items) :]]
        for override, where in parsed:
            if override.is_sweep_override():
                _check_key(override, where)
        made = [self._axis_of(override, where) for override, where in parsed]
        return made[: len(items)], made[len(items) :]

    def params(self, params: object) -> Block:
        """``sweep.params`` as a block."""
        where = "sweep.params"
        if not isinstance(params, (list, tuple)):
            return self._block(params, where, Role.PARAM)
        if not params:
            raise SpaceError(
                f"{where}: the list has no grid; give it mappings of keys to values, or leave it out"
            )
        return (
            axes.Union(
                tuple(self._block(grid, f"{where}[{i}]", Role.PARAM) for i, grid in enumerate(params))
            ),
        )

    def repeats(self, repeats: object) -> Block:
        """``sweep.repeats`` as a block of plain axes."""
        return self._block(repeats, "sweep.repeats", Role.REPEAT)

    def zip(self, groups: object) -> list[tuple[str, frozenset[str]]]:
        """``sweep.zip`` as pairs of a place and the names of the axes."""
        result: list[tuple[str, frozenset[str]]] = []
        what = "a list of lists of keys, such as [[model.width, model.depth]]"
        for i, group in enumerate(sequence(groups or (), "sweep.zip", what)):
            where = f"sweep.zip[{i}]"
            keys = [bare_name(str(key)) for key in sequence(group, where, "a list of keys")]
            if len(keys) < 2 or len(set(keys)) < len(keys):
                raise SpaceError(f"{where}: must name at least two different keys, got {group!r}")
            for other, names in result:
                if shared := names & set(keys):
                    raise SpaceError(f"{where}: {min(shared)!r} stands in {other} too")
            result.append((where, frozenset(keys)))
        return result

    def exclude(self, clauses: object) -> list[Clause]:
        """``sweep.exclude`` as the tokens that each clause drops, by name."""
        result: list[Clause] = []
        what = "a list of mappings of keys to values"
        for i, clause in enumerate(sequence(clauses or (), "sweep.exclude", what)):
            where = f"sweep.exclude[{i}]"
            items = _mapping(_native(clause), where, "a mapping of keys to values")
            if not items:
                raise SpaceError(f"{where}: names no key, so it would drop every point")
            result.append({})
            for key, value in items.items():
                override, terms = self._terms(key, value, f"{where}.{key}")
                result[-1][key_name(override)] = frozenset(token(term.value) for term in terms)
        return result

    def _block(self, params: object, where: str, role: Role) -> Block:
        items = _mapping(params or {}, where, "a mapping of keys to values")
        return tuple(self._axis(key, value, f"{where}.{key}", role) for key, value in items.items())

    def _axis(self, key: object, value: object, where: str, role: Role) -> Axis:
        if isinstance(value, Mapping):
            return self._conditional(key, value, where, role)
        override, terms = self._terms(key, value, where)
        _check_key(override, where)
        return _make_axis(override, terms, where, role)

    def _conditional(self, key: object, branches: Mapping[object, object], where: str, role: Role) -> Axis:
        override = self._grammar.parse_key(key, where)
        _check_key(override, where)
        if role is Role.REPEAT:
            raise SpaceError(f"{where}: repeats are never conditional; give it values such as range(3)")
        if not branches:
            raise SpaceError(
                f"{where}: the mapping has no choices; give it values, or choices with their params"
            )
        terms: list[Term] = []
        blocks: list[Block] = []
        for name, nested in branches.items():
            place = f"{where}.{name}"
            terms.append(self._choice(str(key), name, place))
            if token(terms[-1].value) in {token(term.value) for term in terms[:-1]}:
                raise SpaceError(f"{place}: the choice {terms[-1].text} stands here twice")
            mapping = _mapping(
                {} if nested is None else nested, place, "a mapping of params that go with this choice"
            )
            blocks.append(self._block(mapping, place, role))
        return _make_axis(override, terms, where, role, blocks)

    def _choice(self, key: str, name: object, where: str) -> Term:
        if not isinstance(name, str):
            return self._grammar.literal(name, where)
        parsed = self._grammar.parse(f"{key}={name}", where)
        if parsed.is_sweep_override():
            raise SpaceError(f"{where}: must be one choice, got {name!r}")
        return self._grammar.terms(parsed, where)[0]

    def _terms(self, key: object, value: object, where: str) -> tuple[Override, Sequence[Term]]:
        override = self._grammar.parse_key(key, where)
        if isinstance(value, str):
            if value == "???":
                raise SpaceError(f"{where}: is missing (???); give it values")
            override = self._grammar.parse(f"{key}={value.strip()}", where)
            return override, self._grammar.terms(override, where)
        if not isinstance(value, (list, tuple)):
            return override, (self._grammar.literal(value, where),)
        if not value:
            raise SpaceError(f"{where}: the list has no values; write [[]] for the empty list as a value")
        return override, tuple(self._grammar.literal(item, f"{where}[{i}]") for i, item in enumerate(value))

    def _axis_of(self, override: Override, where: str) -> Axis:
        role = Role.PARAM if override.is_sweep_override() else Role.FIXED
        axis = _make_axis(override, self._grammar.terms(override, where), where, role)
        return replace(axis, pinned=not override.is_sweep_override())


def _make_axis(
    override: Override, terms: Sequence[Term], where: str, role: Role, blocks: Sequence[Block] | None = None
) -> Axis:
    key, name = override.get_key_element(), key_name(override)
    blocks = blocks or [()] * len(terms)
    choices = tuple(
        Choice(name=name, role=role, override=f"{key}={term.text}", value=term.value, block=block)
        for term, block in zip(terms, blocks, strict=True)
    )
    return Axis(key=key, name=name, where=where, choices=choices, nested=any(blocks))


def _check_key(override: Override, where: str) -> None:
    """Refuse to sweep what decides about the sweep itself."""
    if override.is_hydra_override():
        raise SpaceError(
            f"{where}: Sweeping over Hydra's configuration is not supported: {override.input_line!r}"
        )
    if override.key_or_group.replace("/", ".").split(".")[0] == "sweep":
        raise SpaceError(f"{where}: the options of a sweep cannot be swept: {override.input_line!r}")


def _mapping(value: object, where: str, what: str) -> Mapping[object, object]:
    if isinstance(value, Mapping):
        return value
    raise SpaceError(f"{where}: must be {what}, got {value!r}")


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
