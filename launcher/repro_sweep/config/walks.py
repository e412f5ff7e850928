"""The walks of a search through the tree of a space: naming its parameters, drawing a point, finding one again.

A grid's way through the same tree is :func:`repro_sweep.config.axes.combinations`. Some walks take ``late``: the names
of axes of the outermost block that exist only where no other axis has the same key (``hydra.sweeper.params`` gives
way to a conditional parameter). Nothing here knows what is excluded or repeated.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from repro_sweep.config import domains
from repro_sweep.config.axes import Axis, Block, Choice, Combination, Node, Union, walk_blocks
from repro_sweep.config.grammar import bare_name, token
from repro_sweep.errors import SpaceError
from repro_sweep.points import Categorical, Choose, Domain, Parameter, Scalar

Values: TypeAlias = dict[str, Scalar]
"""What is chosen, by the names of parameters."""

_NONE: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A choice of a parameter, on which others depend; ``text`` is how the user knows it (``optimizer=SGD``)."""

    parameter: str
    value: Scalar
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a key stands, and what must have been chosen for it to exist; an axis or a union."""

    node: Node
    conditions: tuple[Condition, ...]

    @property
    def texts(self) -> str:
        """The conditions for messages."""
        return ", ".join(condition.text for condition in self.conditions)


# --- parameters -----------------------------------------------------------------------------------------


def with_parameters(block: Block, late: frozenset[str] = _NONE) -> Block:
    """The block for a search: each choice only once, and a parameter in each node that has more than one.

    Raises:
        SpaceError: choices that a sampler cannot take or tell apart; two parameters of one key that exist at once.
    """
    block = _distinct(block)
    counts = Counter(node.name for inner in walk_blocks(block) for node in inner)
    named = _named(block, counts, (), late)
    places: dict[str, str] = {}
    for parameter in parameters(named):
        if parameter.name in places:
            raise SpaceError(
                f"{parameter.where}: the key {parameter.key!r} already stands at {places[parameter.name]}, "
                "and both would exist at once"
            )
        places[parameter.name] = parameter.where
    return named


def _distinct(block: Block) -> Block:
    return tuple(_distinct_node(node) for node in block)


def _distinct_node(node: Node) -> Node:
    if isinstance(node, Union):
        kept = tuple(i for i, label in enumerate(node.labels) if node.labels.index(label) == i)
        return replace(
            node,
            blocks=tuple(_distinct(node.blocks[i]) for i in kept),
            labels=tuple(node.labels[i] for i in kept),
        )
    if node.span is not None:
        return node
    several = len(node.choices) > 1
    kept = domains.distinct([choice.value for choice in node.choices], node.where) if several else (0,)
    choices = tuple(replace(node.choices[i], block=_distinct(node.choices[i].block)) for i in kept)
    return replace(node, choices=choices)


def _named(
    block: Block, counts: Mapping[str, int], conditions: tuple[str, ...], late: frozenset[str] = _NONE
) -> Block:
    return tuple(_named_node(node, counts, conditions, late) for node in block)


def _named_node(
    node: Node, counts: Mapping[str, int], conditions: tuple[str, ...], late: frozenset[str]
) -> Node:
    parameter = None
    if (domain := _domain(node)) is not None:
        suffix = f" ({', '.join(conditions)})" if counts[node.name] > 1 and conditions else ""
        parameter = Parameter(
            name=node.name + suffix,
            key=node.name,
            where=node.where,
            domain=domain,
            conditional=bool(conditions) or node.name in late,
        )

    def under(text: str) -> tuple[str, ...]:
        return conditions if parameter is None else (*conditions, text)

    if isinstance(node, Union):
        blocks = tuple(_named(block, counts, under(_text(node, i))) for i, block in enumerate(node.blocks))
        return replace(node, blocks=blocks, parameter=parameter)
    choices = tuple(
        replace(choice, block=_named(choice.block, counts, under(_text(node, i))))
        for i, choice in enumerate(node.choices)
    )
    return replace(node, choices=choices, parameter=parameter)


def _domain(node: Node) -> Domain | None:
    """What can be chosen in a node; None if nothing can."""
    if isinstance(node, Axis) and node.span is not None:
        return node.span.domain
    options = node.labels if isinstance(node, Union) else tuple(choice.value for choice in node.choices)
    return Categorical(choices=options) if len(options) > 1 else None  # type: ignore[arg-type]  # see _distinct


def _text(node: Node, index: int) -> str:
    """A possibility of the node as a condition of what stands in it."""
    if isinstance(node, Union):
        return f"{node.name}={node.labels[index]}"
    return bare_name(node.choices[index].override)


def _branches(node: Node) -> Iterator[tuple[Condition | None, Block]]:
    """What can be chosen in a node, each with the block that exists only with it; a range has one, without block."""
    blocks = node.blocks if isinstance(node, Union) else tuple(choice.block for choice in node.choices)
    for index, block in enumerate(blocks):
        condition = None
        if node.parameter is not None and isinstance(node.parameter.domain, Categorical):
            condition = Condition(
                parameter=node.parameter.name,
                value=node.parameter.domain.choices[index],
                text=_text(node, index),
            )
        yield condition, block


def parameters(block: Block) -> Iterator[Parameter]:
    """All parameters, in walking order."""
    for place in places(block):
        if place.node.parameter is not None:
            yield place.node.parameter


def places(block: Block, conditions: tuple[Condition, ...] = ()) -> Iterator[Place]:
    """All nodes at any depth, each before what depends on it."""
    for node in block:
        yield Place(node=node, conditions=conditions)
        for condition, inner in _branches(node):
            yield from places(inner, conditions if condition is None else (*conditions, condition))


# --- drawing --------------------------------------------------------------------------------------------


def draw(block: Block, choose: Choose, late: frozenset[str] = _NONE) -> Combination:
    """The combination that results from choosing each parameter that exists, as the grid would have it.

    Raises:
        ValueError: ``choose`` has returned something outside of the parameter's domain.
    """
    drawn = [() if _is_late(node, late) else _draw_node(node, choose) for node in block]
    if late:
        names = _names(drawn)
        for index, node in enumerate(block):
            if _is_late(node, late) and node.name not in names:
                drawn[index] = _draw_node(node, choose)
    return tuple(itertools.chain.from_iterable(drawn))


def _draw_node(node: Node, choose: Choose) -> Combination:
    value = None if node.parameter is None else choose(node.parameter)
    if isinstance(node, Union):
        index = 0 if node.parameter is None else domains.find(node.labels, value)
        if index is not None:
            return draw(node.blocks[index], choose)
    else:
        choice = _only(node) if node.parameter is None else _choice(node, value)
        if choice is not None:
            return (choice, *draw(choice.block, choose)) if choice.block else (choice,)
    assert node.parameter is not None
    raise ValueError(
        f"{node.parameter.name} must be {domains.describe(node.parameter.domain)}, but {value!r} was chosen"
    )


def _only(axis: Axis) -> Choice:
    return axis.choices[0]


def _choice(axis: Axis, value: object) -> Choice | None:
    """The axis's choice of this value, None if it has none."""
    if axis.span is None:
        index = domains.find([choice.value for choice in axis.choices], value)
        return None if index is None else axis.choices[index]
    if (taken := axis.span.take(value)) is None:
        return None
    (pattern,) = axis.choices
    return replace(pattern, override=f"{pattern.override}{taken!r}", value=taken)


def _is_late(node: Node, late: frozenset[str]) -> bool:
    return isinstance(node, Axis) and node.name in late


def _names(parts: Sequence[Combination]) -> set[str]:
    return {choice.name for part in parts for choice in part}


# --- finding values again -------------------------------------------------------------------------------

Fit: TypeAlias = tuple[Combination, Values]


def fits(block: Block, params: Mapping[str, object], late: frozenset[str] = _NONE) -> Iterator[Fit]:
    """The combinations with these values by key, and what must be chosen for them.

    Keys that a combination does not have are not looked at; a key with one value may be missing in ``params``.
    """
    early: list[list[Fit]] = [
        [((), {})] if _is_late(node, late) else list(_fits_node(node, params)) for node in block
    ]
    for parts in itertools.product(*early):
        names = _names([combination for combination, _ in parts])
        rows = [
            list(_fits_node(node, params)) if _is_late(node, late) and node.name not in names else [part]
            for node, part in zip(block, parts, strict=True)
        ]
        yield from (_joined(row) for row in itertools.product(*rows))


def _fits_node(node: Node, params: Mapping[str, object]) -> Iterator[Fit]:
    if isinstance(node, Union):
        for condition, block in _branches(node):
            own: Values = {} if condition is None else {condition.parameter: condition.value}
            for combination, values in fits(block, params):
                yield combination, own | values
        return
    if node.name not in params and node.parameter is not None:
        return
    choice = _choice(node, params[node.name]) if node.name in params else _only(node)
    if choice is None:
        return
    for combination, values in fits(choice.block, params):
        yield (choice, *combination), _chosen(node, choice.value) | values


def _chosen(axis: Axis, value: object) -> Values:
    """What must be chosen for an axis to have this value, which it can have."""
    if axis.parameter is None:
        return {}
    if axis.span is not None:
        return {axis.parameter.name: axis.span.chosen(value)}
    choice = _choice(axis, value)
    assert choice is not None
    return {axis.parameter.name: choice.value}  # type: ignore[dict-item]  # see _distinct


def _joined(fits_of_nodes: Sequence[Fit]) -> Fit:
    values: Values = {}
    for _, own in fits_of_nodes:
        values |= own
    return tuple(choice for combination, _ in fits_of_nodes for choice in combination), values


def partial(block: Block, given: Mapping[str, object], where: str) -> Values:
    """What must be chosen for a point to have these values; the first branches that have them, where none is given.

    Raises:
        SpaceError: a key or value that no branch has, or several that exist in no branch together.
    """
    by_key: dict[str, list[Place]] = {}
    for place in places(block):
        if isinstance(place.node, Axis):
            by_key.setdefault(place.node.name, []).append(place)
    for name in given:
        if name not in by_key:
            known = ", ".join(sorted(by_key)) or "it has none"
            raise SpaceError(f"{where}: {name!r} is no key of this space ({known})")
    allowing = {name: _allowing(by_key[name], value, f"{where}.{name}") for name, value in given.items()}
    # what others depend on goes first, so that it is the dependent key that does not go with it
    order = sorted(given, key=lambda name: min(len(place.conditions) for place in by_key[name]))
    values: Values | None = {}
    for number, name in enumerate(order, 1):
        values = _together([(allowing[key], given[key]) for key in order[:number]], {})
        if values is None:
            needed = " or ".join(dict.fromkeys(place.texts for place in allowing[name]))
            raise SpaceError(
                f"{where}.{name}: {given[name]!r} does not go with the other keys: it exists only with {needed}"
            )
    assert values is not None
    return values


def _allowing(candidates: Sequence[Place], value: object, where: str) -> list[Place]:
    allowing = [p for p in candidates if isinstance(p.node, Axis) and _choice(p.node, value) is not None]
    if not allowing:
        allowed = "; or ".join(dict.fromkeys(_allowed(place) for place in candidates))
        raise SpaceError(f"{where}: must be {allowed}; got {value!r}")
    return allowing


def _allowed(place: Place) -> str:
    assert isinstance(place.node, Axis)
    parameter = place.node.parameter
    text = _only(place.node).text if parameter is None else domains.describe(parameter.domain)
    return f"{text} (with {place.texts})" if place.conditions else text


def _together(wanted: Sequence[tuple[Sequence[Place], object]], values: Values) -> Values | None:
    """The first places that can exist together, as what must be chosen for them; one place for each value."""
    if not wanted:
        return values
    (candidates, value), *rest = wanted
    for place in candidates:
        assert isinstance(place.node, Axis)
        needed = {condition.parameter: condition.value for condition in place.conditions}
        needed |= _chosen(place.node, value)
        if all(token(values.get(name, own)) == token(own) for name, own in needed.items()):
            found = _together(rest, values | needed)
            if found is not None:
                return found
    return None


# --- probing --------------------------------------------------------------------------------------------


def covering(block: Block) -> list[Values]:
    """As few draws as have every choice and both ends of every range, nothing being excluded.

    As many as the node needs that needs most: the nodes of a block go side by side, and begin again at their end.
    """
    nodes = [_covering_node(node) for node in block]
    rows: list[Values] = []
    for index in range(max(map(len, nodes), default=1)):
        rows.append({})
        for own in nodes:
            rows[-1] |= own[index % len(own)]
    return rows


def _covering_node(node: Node) -> list[Values]:
    if node.parameter is not None and not isinstance(node.parameter.domain, Categorical):
        return [{node.parameter.name: end} for end in domains.ends(node.parameter.domain)]
    return [
        ({} if condition is None else {condition.parameter: condition.value}) | inner
        for condition, block in _branches(node)
        for inner in covering(block)
    ]


def wanted(block: Block) -> Iterator[Values]:
    """Every choice and both ends of every range, last in what must be chosen for it to exist."""
    for place in places(block):
        if place.node.parameter is not None:
            needed = {condition.parameter: condition.value for condition in place.conditions}
            for end in domains.ends(place.node.parameter.domain):
                yield needed | {place.node.parameter.name: end}
