"""Hydra's override grammar, as the space needs it: from text or a YAML value to the terms of an axis.

Hydra's own parser does all the parsing, so that a value means here what it means on Hydra's command line.
This module must never read a config or expand a space; it maps every error of the parser to a
:class:`SpaceError`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    Glob,
    Override,
    Quote,
    QuotedString,
    RangeSweep,
    Transformer,
    ValueType,
)
from hydra.errors import HydraException

from repro_sweep.errors import SpaceError

MAX_AXIS_VALUES = 1_000_000
"""The values of one axis are held in memory (the points are not), hence a bound."""

_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*", re.ASCII)
_RESERVED = frozenset({"true", "false", "null", "inf", "nan"})
_PREFIXES = "+~"
_QUOTING = """a string with special characters needs quotes of its own: "'a, b'" """.strip()

Token = tuple[str, object]


class Term(NamedTuple):
    """One value of an axis: how Hydra's grammar writes it, and what it is in Python."""

    text: str
    value: object


class Grammar:
    """Hydra's parser, with the errors of this project.

    Args:
        config_loader: finds the options of config groups for ``glob``; without it a glob is an error.
    """

    def __init__(self, config_loader: ConfigLoader | None = None) -> None:
        self._loader = config_loader
        self._parser = OverridesParser.create()

    def parse(self, text: str, where: str) -> Override:
        """Parse one override; ``where`` names its place in errors.

        Raises:
            SpaceError: it is not in Hydra's grammar.
        """
        try:
            override = self._parser.parse_override(text)
        except (HydraException, ValueError, RecursionError) as error:
            raise SpaceError(
                f"{where}: {text!r} is not in Hydra's override grammar: {_reason(error)} ({_QUOTING})"
            ) from error
        override.config_loader = self._loader
        return override

    def parse_key(self, key: object, where: str) -> Override:
        """Parse a key such as ``lr``, ``+lr``, ``~db`` or ``db@src``: an override without a value.

        Raises:
            SpaceError: it is no string, or no key in Hydra's grammar.
        """
        if not isinstance(key, str):
            raise SpaceError(f"{where}: a key must be a string, got {key!r} ({type(key).__name__})")
        if "=" in key or not key.strip(_PREFIXES):
            raise SpaceError(f"{where}: {key!r} is not a key such as lr, optimizer.lr, +lr or db@src")
        return self.parse(f"{key}=", where)

    def terms(self, override: Override, where: str) -> tuple[Term, ...]:
        """All values of a parsed override in Hydra's order, at least one.

        ``shuffle`` draws from the module ``random`` here, once, as Hydra's BasicSweeper does.

        Raises:
            SpaceError: there is no value, too many, or a continuous interval.
        """
        if not override.is_sweep_override():
            return (Term(override.get_value_element_as_str(), override.value()),)
        if override.is_interval_sweep():
            raise SpaceError(
                f"{where}: interval is continuous; a grid needs values: use range(…), choice(…) or "
                f"a comma list; got {override.get_value_string()!r}"
            )
        try:
            if isinstance(override._value, RangeSweep):
                _check_length(override._value, where)
            elements = list(override.sweep_iterator())
        except (HydraException, ValueError, TypeError, ArithmeticError) as error:
            raise SpaceError(
                f"{where}: {override.get_value_string()!r} cannot be expanded: {_reason(error)}"
            ) from error
        if not elements:
            raise SpaceError(
                f"{where}: {override.get_value_string()!r} has no values{self._options(override)}"
            )
        return tuple(Term(Transformer.str(element), _plain(element)) for element in elements)

    def literal(self, value: object, where: str) -> Term:
        """Write a YAML value (scalar, list or mapping, nested) such that Hydra reads exactly this value.

        Raises:
            SpaceError: its type is none of YAML's plain ones, or the grammar has no way to write it (such
                as the characters in a mapping's key).
        """
        element = _element(value, where)
        term = Term(Transformer.str(element), _plain(element))
        # the grammar has no quoted keys, so not all can be written
        if isinstance(value, (Mapping, list, tuple)):
            back = self.parse(f"x={term.text}", where).value()
            if token(back) != token(term.value):
                raise SpaceError(f"{where}: {value!r} cannot be written in Hydra's override grammar")
        return term

    def _options(self, override: Override) -> str:
        if override.value_type is not ValueType.GLOB_CHOICE_SWEEP or self._loader is None:
            return ""
        assert isinstance(override._value, Glob)
        options = self._loader.get_group_options(override.key_or_group, results_filter=ObjectType.CONFIG)
        return f" (the options of {override.key_or_group} are: {', '.join(options) or 'none'})"


def key_name(override: Override) -> str:
    """The key with its package but without ``+``, ``++`` or ``~``: what names the axis."""
    return bare_name(override.get_key_element())


def bare_name(key: str) -> str:
    """``key`` without ``+``, ``++`` or ``~``."""
    return key.lstrip(_PREFIXES)


def token(value: object) -> Token:
    """A hashable stand-in for a plain value: 1 and 1.0 are equal, but not 1 and true, or 1 and "1"."""
    if isinstance(value, bool) or value is None:
        return ("constant", value)
    if isinstance(value, (int, float)):
        return ("number", "nan" if value != value else value)
    if isinstance(value, (list, tuple)):
        return ("list", tuple(token(item) for item in value))
    if isinstance(value, Mapping):
        return ("mapping", frozenset((token(key), token(item)) for key, item in value.items()))
    return ("string", value)


def _plain(element: object) -> object:
    """A parsed element as plain Python: quoted strings become strings."""
    if isinstance(element, QuotedString):
        return element.text
    if isinstance(element, list):
        return [_plain(item) for item in element]
    if isinstance(element, dict):
        return {_plain(key): _plain(item) for key, item in element.items()}
    return element


def _element(value: object, where: str) -> str | int | float | bool | list[object] | dict[str, object] | None:
    """A YAML value as the parser would have returned it."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        bare = _BARE.fullmatch(value) and value.lower() not in _RESERVED
        return value if bare else QuotedString(text=value, quote=Quote.single)  # type: ignore[return-value]
    if isinstance(value, (list, tuple)):
        return [_element(item, where) for item in value]
    if isinstance(value, Mapping):
        for key in value:
            if not (key is None or isinstance(key, (str, bool, int, float))):
                raise SpaceError(f"{where}: {key!r} ({type(key).__name__}) cannot be the key of a mapping")
        return {key: _element(item, where) for key, item in value.items()}
    raise SpaceError(
        f"{where}: a value must be a string, number, true, false, null, list or mapping; "
        f"got {value!r} ({type(value).__name__}; quote it to make it a string)"
    )


def _reason(error: Exception) -> str:
    """The error in one line, without the parser's list of tokens that it would have taken."""
    text = re.sub(r" expecting \{.*\}", "", " ".join(str(error).split()))
    return text.replace("'<EOF>'", "end of the value") or type(error).__name__


def _check_length(sweep: RangeSweep, where: str) -> None:
    """Refuse a range that would fill the memory (or never end, as ``range(0, inf)``)."""
    assert sweep.start is not None
    assert sweep.stop is not None
    if sweep.step and (sweep.stop - sweep.start) / sweep.step > MAX_AXIS_VALUES:
        raise SpaceError(
            f"{where}: an axis may have at most {MAX_AXIS_VALUES:,} values, "
            f"got range({sweep.start}, {sweep.stop}, {sweep.step})"
        )


def sequence(value: object, where: str, what: str) -> Sequence[object]:
    """``value`` if it is a list, else an error that says that ``what`` was expected.

    Raises:
        SpaceError: it is no list.
    """
    if isinstance(value, (list, tuple)):
        return value
    raise SpaceError(f"{where}: must be {what}, got {value!r}")
