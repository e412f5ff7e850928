"""Reads the parts of a sweep's space into axes: ``sweep.params``, ``zip``, ``exclude``, ``repeats`` and overrides.

Every error names the place. How the parts go together is the matter of :class:`repro_sweep.config.space.Space`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hydra.core.override_parser.types import Override
from omegaconf import Container, OmegaConf

from repro_sweep.config import domains
from repro_sweep.config.axes import Axis, Block, Choice, Role, Union
from repro_sweep.config.domains import Span
from repro_sweep.config.grammar import Grammar, Term, Token, bare_name, key_name, sequence, token
from repro_sweep.errors import SpaceError

Clause = dict[str, frozenset[Token]]
"""What ``exclude`` drops: for each of these keys, one of these values."""


class Reader:
    """Reads each part of a space; with ``search``, params and overrides may be ranges."""

    def __init__(self, grammar: Grammar, *, search: bool) -> None:
        self._grammar = grammar
        self._search = search

    def override_axes(self, hydra_params: object, overrides: Sequence[str]) -> tuple[list[Axis], list[Axis]]:
        """The axes of ``hydra.sweeper.params`` and of the command line, each as it stands."""
        where = "hydra.sweeper.params"
        items = mapping(hydra_params, where, "a mapping of keys to values")
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
            Union(
                blocks=tuple(self._block(grid, f"{where}[{i}]", Role.PARAM) for i, grid in enumerate(params)),
                name="params",
                where=where,
                labels=tuple(str(i) for i in range(len(params))),
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
            items = mapping(native(clause), where, "a mapping of keys to values")
            if not items:
                raise SpaceError(f"{where}: names no key, so it would drop every point")
            result.append({})
            for key, value in items.items():
                override, terms = self._terms(key, value, f"{where}.{key}", search=False)
                assert not isinstance(terms, Span)
                result[-1][key_name(override)] = frozenset(token(term.value) for term in terms)
        return result

    def _block(self, params: object, where: str, role: Role) -> Block:
        items = mapping(params or {}, where, "a mapping of keys to values")
        return tuple(self._axis(key, value, f"{where}.{key}", role) for key, value in items.items())

    def _axis(self, key: object, value: object, where: str, role: Role) -> Axis:
        if isinstance(value, Mapping):
            return self._conditional(key, value, where, role)
        override, terms = self._terms(key, value, where, search=self._search and role is Role.PARAM)
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
            block = mapping(
                {} if nested is None else nested, place, "a mapping of params that go with this choice"
            )
            blocks.append(self._block(block, place, role))
        return _make_axis(override, terms, where, role, blocks)

    def _choice(self, key: str, name: object, where: str) -> Term:
        if not isinstance(name, str):
            return self._grammar.literal(name, where)
        parsed = self._grammar.parse(f"{key}={name}", where)
        if parsed.is_sweep_override():
            raise SpaceError(f"{where}: must be one choice, got {name!r}")
        return self._grammar.terms(parsed, where)[0]

    def _terms(
        self, key: object, value: object, where: str, *, search: bool
    ) -> tuple[Override, Sequence[Term] | Span]:
        override = self._grammar.parse_key(key, where)
        if isinstance(value, str):
            if value == "???":
                raise SpaceError(f"{where}: is missing (???); give it values")
            override = self._grammar.parse(f"{key}={value.strip()}", where)
            return override, self._expand(override, where, search=search)
        if not isinstance(value, (list, tuple)):
            return override, (self._grammar.literal(value, where),)
        if not value:
            raise SpaceError(f"{where}: the list has no values; write [[]] for the empty list as a value")
        return override, tuple(self._grammar.literal(item, f"{where}[{i}]") for i, item in enumerate(value))

    def _expand(self, override: Override, where: str, *, search: bool) -> Sequence[Term] | Span:
        if search:
            return domains.read(self._grammar, override, where)
        return self._grammar.terms(override, where)

    def _axis_of(self, override: Override, where: str) -> Axis:
        role = Role.PARAM if override.is_sweep_override() else Role.FIXED
        terms = self._expand(override, where, search=self._search)
        axis = _make_axis(override, terms, where, role)
        return replace(axis, pinned=not override.is_sweep_override())


def native(value: object) -> object:
    """OmegaConf's containers as plain ones; interpolations stay for the trial's config to resolve."""
    return OmegaConf.to_container(value, resolve=False) if isinstance(value, Container) else value


def mapping(value: object, where: str, what: str) -> Mapping[object, object]:
    """``value`` if it is a mapping, else an error that says that ``what`` was expected.

    Raises:
        SpaceError: it is no mapping.
    """
    if isinstance(value, Mapping):
        return value
    raise SpaceError(f"{where}: must be {what}, got {value!r}")


def _make_axis(
    override: Override,
    terms: Sequence[Term] | Span,
    where: str,
    role: Role,
    blocks: Sequence[Block] | None = None,
) -> Axis:
    """The axis of a parsed override, with these values or this range, and a block for each value."""
    span = terms if isinstance(terms, Span) else None
    terms = [Term("", None)] if isinstance(terms, Span) else terms
    key, name = override.get_key_element(), key_name(override)
    blocks = blocks or [()] * len(terms)
    choices = tuple(
        Choice(name=name, role=role, override=f"{key}={term.text}", value=term.value, block=block)
        for term, block in zip(terms, blocks, strict=True)
    )
    return Axis(key=key, name=name, where=where, choices=choices, nested=any(blocks), span=span)


def _check_key(override: Override, where: str) -> None:
    """Refuse to sweep what decides about the sweep itself."""
    if override.is_hydra_override():
        raise SpaceError(
            f"{where}: Sweeping over Hydra's configuration is not supported: {override.input_line!r}"
        )
    if override.key_or_group.replace("/", ".").split(".")[0] == "sweep":
        raise SpaceError(f"{where}: the options of a sweep cannot be swept: {override.input_line!r}")
