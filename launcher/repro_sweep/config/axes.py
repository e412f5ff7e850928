"""The tree that a space is expanded from: blocks of axes, whose choices may hold blocks of their own.

A *block* is a sequence of nodes that are combined with each other, the last one varying fastest. A node is
an *axis* (a key and its choices) or a *union* (blocks one after the other). What stands in a choice's block
exists only with that choice. Everything is immutable; changing a tree means making a new one. The points
are never held.

In a search, an axis may have a range in place of choices, and each node with more than one possibility has a
parameter, which chooses among them (:func:`with_parameters`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import TypeAlias

from repro_sweep.config.domains import Span
from repro_sweep.config.grammar import token
from repro_sweep.errors import SpaceError
from repro_sweep.points import Parameter


class Role(Enum):
    """Where a point shows the value of an axis, besides its overrides."""

    FIXED = auto()
    PARAM = auto()
    REPEAT = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One value of an axis, and the block that exists only with it."""

    name: str
    role: Role
    override: str
    value: object
    block: Block = ()

    @property
    def text(self) -> str:
        """The value as the override has it."""
        return self.override.partition("=")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A key and its choices, at least one. ``pinned``: the command line fixed it to one value.

    With a ``span`` the values are a range; the only choice is then a pattern, its override lacking the value.
    """

    key: str
    name: str
    where: str
    choices: tuple[Choice, ...]
    pinned: bool = False
    nested: bool = False
    span: Span | None = None
    parameter: Parameter | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Union:
    """Blocks one after the other; ``name`` and ``labels`` say what a search calls them, in no trial's config."""

    blocks: tuple[Block, ...]
    name: str
    where: str
    labels: tuple[str, ...]
    parameter: Parameter | None = None


Node: TypeAlias = Axis | Union
Block: TypeAlias = tuple[Node, ...]
Combination: TypeAlias = tuple[Choice, ...]


def ordinary(base: Iterable[Axis], given: Iterable[Axis]) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """Merge as BasicSweeper does: the last of equal keys wins, at the first one's position."""
    first = {axis.key: axis for axis in base}
    last: dict[str, Axis] = {}
    for axis in given:
        (first if axis.key in first else last)[axis.key] = axis
    return tuple(first.values()), tuple(last.values())


def combinations(block: Block, start: int = 0) -> Iterator[Combination]:
    """Every combination of the block's nodes from ``start`` on, the last node varying fastest."""
    stop = start
    while stop < len(block) and isinstance(node := block[stop], Axis) and not node.nested:
        stop += 1
    flat = itertools.product(*(axis.choices for axis in block[start:stop] if isinstance(axis, Axis)))
    return flat if stop == len(block) else _branch(flat, block, stop)


def _branch(heads: Iterator[Combination], block: Block, index: int) -> Iterator[Combination]:
    for head in heads:
        for middle in _alternatives(block[index]):
            for rest in combinations(block, index + 1):
                yield head + middle + rest


def _alternatives(node: Node) -> Iterator[Combination]:
    if isinstance(node, Union):
        for block in node.blocks:
            yield from combinations(block)
        return
    for choice in node.choices:
        for rest in combinations(choice.block):
            yield (choice, *rest)


def count(block: Block) -> int:
    """How many combinations there are, without expanding them."""
    return math.prod(_count_node(node) for node in block)


def _count_node(node: Node) -> int:
    if isinstance(node, Union):
        return sum(count(block) for block in node.blocks)
    return sum(count(choice.block) for choice in node.choices) if node.nested else len(node.choices)


def walk_blocks(block: Block) -> Iterator[Block]:
    """The block and all that it holds, at any depth."""
    yield block
    for node in block:
        if isinstance(node, Union):
            inner = node.blocks
        else:
            inner = tuple(choice.block for choice in node.choices) if node.nested else ()
        for child in inner:
            yield from walk_blocks(child)


def axis_names(block: Block) -> frozenset[str]:
    """The names of the block's own axes."""
    return frozenset(node.name for node in block if isinstance(node, Axis))


def all_names(block: Block) -> frozenset[str]:
    """The names of all axes, at any depth."""
    return frozenset().union(*(axis_names(inner) for inner in walk_blocks(block)))


def names_in_all(block: Block) -> frozenset[str]:
    """The names that every combination has."""
    names = axis_names(block)
    for node in block:
        if isinstance(node, Union):
            names |= frozenset.intersection(*(names_in_all(inner) for inner in node.blocks))
    return names


def check_names(block: Block) -> dict[str, str]:
    """Check that no key can have two values at once; return the places of all keys by name.

    Raises:
        SpaceError: a key stands twice where both would exist together.
    """
    places: dict[str, str] = {}
    for node in block:
        own: dict[str, str] = {}
        if isinstance(node, Union):
            for inner in node.blocks:
                own.update(check_names(inner))
        else:
            if node.nested:
                for choice in node.choices:
                    own.update(check_names(choice.block))
            _check_new(own, node.name, node.where)
            own[node.name] = node.where
        for name, where in own.items():
            _check_new(places, name, where)
        places.update(own)
    return places


def _check_new(places: Mapping[str, str], name: str, where: str) -> None:
    if name in places:
        raise SpaceError(
            f"{where}: the key {name!r} already stands at {places[name]}, and both would exist at once"
        )


def replace_axes(block: Block, by: Mapping[str, Axis]) -> Block:
    """Replace the choices of every axis that ``by`` names, in place.

    Choices that the axis had keep their blocks. A ``by`` without ``+``, ``++`` or ``~`` leaves the axis its
    own.
    """
    return tuple(_replace_node(node, by) for node in block)


def _replace_node(node: Node, by: Mapping[str, Axis]) -> Node:
    if isinstance(node, Union):
        return replace(node, blocks=tuple(replace_axes(inner, by) for inner in node.blocks))
    choices = node.choices
    if (other := by.get(node.name)) is not None:
        if node.nested:
            other = expanded(other, f"{other.where}: choices here have params of their own, so give choices")
        key = other.key if other.key != other.name else node.key
        blocks = {token(choice.value): choice.block for choice in choices} if node.nested else {}
        role = choices[0].role
        choices = tuple(
            replace(
                choice,
                role=role,
                override=key + choice.override.removeprefix(other.key),
                block=blocks.get(token(choice.value), ()),
            )
            for choice in other.choices
        )
        nested = any(choice.block for choice in choices)
        node = replace(node, key=key, where=other.where, pinned=other.pinned, nested=nested, span=other.span)
    if node.nested:
        choices = tuple(replace(choice, block=replace_axes(choice.block, by)) for choice in choices)
    return replace(node, choices=choices)


def zip_axes(block: Block, groups: Sequence[tuple[str, frozenset[str]]]) -> Block:
    """Make the axes of each group advance together where they stand in one block, at the first one's place.

    ``groups`` are pairs of a place for errors and the names. A pinned axis leaves its group.

    Raises:
        SpaceError: lengths differ, or a block has some of a group's axes but not all.
    """
    if not groups:
        return block
    nodes = [_zip_inside(node, groups) for node in block]
    for where, names in groups:
        present = [node for node in nodes if isinstance(node, Axis) and node.name in names]
        if len(present) < 2:
            continue
        if missing := names - {axis.name for axis in present}:
            raise SpaceError(
                f"{where}: the keys must stand in one mapping, but {', '.join(sorted(missing))} "
                f"is missing beside {', '.join(axis.where for axis in present)}"
            )
        if len(axes := [axis for axis in present if not axis.pinned]) < 2:
            continue
        together = [id(axis) for axis in axes]
        axes = [expanded(axis, f"{where}: keys that advance together need choices") for axis in axes]
        if len({len(axis.choices) for axis in axes}) > 1:
            lengths = ", ".join(f"{axis.name} has {len(axis.choices)}" for axis in axes)
            raise SpaceError(
                f"{where}: keys that advance together must have equally many values, but {lengths}"
            )
        first, *others = together
        nodes = [
            _zipped(axes, where) if id(node) == first else node for node in nodes if id(node) not in others
        ]
    return tuple(nodes)


def _zipped(axes: Sequence[Axis], where: str) -> Union:
    """The rows of axes that advance together, labelled with their values."""
    rows = list(zip(*(axis.choices for axis in axes), strict=True))
    return Union(
        blocks=tuple(
            tuple(replace(axis, choices=(choice,)) for axis, choice in zip(axes, row, strict=True))
            for row in rows
        ),
        name=",".join(axis.name for axis in axes),
        where=where,
        labels=tuple(", ".join(choice.text for choice in row) for row in rows),
    )


def _zip_inside(node: Node, groups: Sequence[tuple[str, frozenset[str]]]) -> Node:
    if isinstance(node, Union):
        return replace(node, blocks=tuple(zip_axes(inner, groups) for inner in node.blocks))
    if not node.nested:
        return node
    return replace(
        node, choices=tuple(replace(choice, block=zip_axes(choice.block, groups)) for choice in node.choices)
    )


def expanded(axis: Axis, refusal: str = "") -> Axis:
    """The axis with the values of its range as choices, in Hydra's order.

    Raises:
        SpaceError: the range is an interval, or too long; the message is ``refusal`` and what was got, if given.
    """
    if axis.span is None:
        return axis
    try:
        terms = axis.span.terms()
    except SpaceError as error:
        if not refusal:
            raise
        raise SpaceError(f"{refusal}; got {axis.name}={axis.span.text}") from error
    (pattern,) = axis.choices
    choices = tuple(
        replace(pattern, override=pattern.override + term.text, value=term.value) for term in terms
    )
    return replace(axis, choices=choices, span=None)


def expand_all(block: Block) -> Block:
    """The block with :func:`expanded` axes, at any depth."""
    return tuple(_expand_node(node) for node in block)


def _expand_node(node: Node) -> Node:
    if isinstance(node, Union):
        return replace(node, blocks=tuple(expand_all(inner) for inner in node.blocks))
    if not node.nested:
        return expanded(node)
    return replace(
        node, choices=tuple(replace(choice, block=expand_all(choice.block)) for choice in node.choices)
    )
