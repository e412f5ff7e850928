"""The YAML text of a config, equal to ``OmegaConf.to_yaml(cfg)`` byte for byte, at a twentieth of its time.

PyYAML's emitter decides for each scalar anew how it must be quoted, which is nearly all of its cost. The text
of a scalar depends on nothing but its value, unless it must be folded or has several lines. So PyYAML is
asked once for each value, its answer is remembered, and only the layout (indentation, dashes, colons) is done
here. A scalar that may be folded is asked for at its very place in the document. For what is not covered
(objects, unusual keys, anything that PyYAML would write as an alias) OmegaConf does the whole text.

Nothing here resolves interpolations.
"""

from __future__ import annotations

import math
import re
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.base import UnionNode

_WIDTH = 80  # PyYAML's best width: it folds a scalar that reaches beyond
_KNOWN_SCALARS = 1 << 14
_LINE_BREAK = re.compile("[\n\x85\u2028\u2029]")
_MAP, _SEQUENCE = "m", "s"


class _UnusualError(Exception):
    """The config holds something whose text only OmegaConf knows."""


def to_yaml(cfg: DictConfig | ListConfig) -> str:
    """The text of ``OmegaConf.to_yaml(cfg)``: interpolations as they stand, keys in their order.

    Raises whatever OmegaConf raises for objects that YAML cannot represent.
    """
    try:
        lines = _Lines()
        lines.add_root(cfg.__dict__["_content"])
    except _UnusualError:
        return OmegaConf.to_yaml(cfg)
    return lines.text()


def hydra_yaml(cfg: DictConfig) -> str:
    """The text of ``.hydra/hydra.yaml`` that Hydra's ``run_job`` writes for a job with the full config."""
    node = cfg.__dict__["_content"]["hydra"]
    try:
        lines = _Lines()
        lines.add_map({"hydra": node}, "", "", _MAP)
    except _UnusualError:
        return OmegaConf.to_yaml(OmegaConf.masked_copy(cfg, "hydra"))
    return lines.text()


def _dump(data: Any) -> str:
    text: str = yaml.dump(
        data,
        default_flow_style=False,
        allow_unicode=True,
        sort_keys=False,
        Dumper=get_omega_conf_dumper(),
    )
    return text


_PLAIN_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*=[A-Za-z0-9_.]+")
"""Overrides such as ``optimizer.lr=0.1``: new in every trial, and never quoted in YAML."""


@lru_cache(maxsize=_KNOWN_SCALARS, typed=True)
def _scalar(value: str | int | None) -> str:
    """The text of a scalar; empty if it has several lines, so that its indentation depends on the place."""
    if type(value) is int:
        return str(value)
    if type(value) is str and _PLAIN_OVERRIDE.fullmatch(value):
        return value
    text = _dump({"k": value})[3:-1]
    return "" if _LINE_BREAK.search(text) else text


def _float(value: float) -> str:
    """As PyYAML's ``represent_float``; YAML reads each of these as a float, so none is ever quoted."""
    if not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    text = repr(value)
    return text.replace("e", ".0e", 1) if "e" in text and "." not in text else text


@lru_cache(maxsize=_KNOWN_SCALARS, typed=True)
def _key(key: str | int) -> str:
    text = _dump({key: 0})
    if not text.endswith(": 0\n") or text.startswith("? ") or "\n" in text[:-1]:
        raise _UnusualError
    return text[:-4]


@lru_cache(maxsize=1 << 10, typed=True)
def _in_place(kinds: str, key: str | int | None, value: Any) -> str:
    """The text of ``value`` as the last scalar of nested containers, which PyYAML may fold."""

    def nested(innermost: Any) -> str:
        data = innermost
        for depth in range(len(kinds) - 1, -1, -1):
            name = key if depth == len(kinds) - 1 else "k"
            data = [data] if kinds[depth] == _SEQUENCE else {name: data}
        return _dump(data)

    before = nested(0)[:-2]
    text = nested(value)
    if not text.startswith(before):
        raise _UnusualError
    return text[len(before) : -1]


class _Lines:
    """The lines of one document, in PyYAML's block style."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._objects: set[int] = set()

    def text(self) -> str:
        self._lines.append("")
        return "\n".join(self._lines)

    def add_root(self, content: Any) -> None:
        if not content or isinstance(content, str):
            raise _UnusualError
        if isinstance(content, dict):
            self.add_map(content, "", "", _MAP)
        else:
            self.add_sequence(content, "", "", _SEQUENCE)

    def add_map(self, content: dict[Any, Node], lead: str, pad: str, kinds: str) -> None:
        """A mapping: its first line begins with ``lead``, others with ``pad``; ``kinds`` is the way to it."""
        for key, node in content.items():
            if type(key) is not str and type(key) is not int:
                raise _UnusualError
            start = f"{lead}{_key(key)}:"
            lead = pad
            value = _content(node)
            if isinstance(value, dict) and value:
                self._lines.append(start)
                inner = pad + "  "
                self.add_map(value, inner, inner, kinds + _MAP)
            elif isinstance(value, list) and value:
                self._lines.append(start)
                self.add_sequence(value, pad, pad, kinds + _SEQUENCE)
            else:
                self._add_leaf(start + " ", value, kinds, key)

    def add_sequence(self, content: list[Node], lead: str, pad: str, kinds: str) -> None:
        """A sequence, likewise."""
        inner = pad + "  "
        for node in content:
            start = lead + "- "
            lead = pad
            value = _content(node)
            if isinstance(value, dict) and value:
                self.add_map(value, start, inner, kinds + _MAP)
            elif isinstance(value, list) and value:
                self.add_sequence(value, start, inner, kinds + _SEQUENCE)
            else:
                self._add_leaf(start, value, kinds, None)

    def _add_leaf(self, start: str, value: Any, kinds: str, key: str | int | None) -> None:
        if isinstance(value, Enum):
            value = value.name
        kind = type(value)
        if kind is float:
            text = _float(value)
        elif value is None or kind is str or kind is int or kind is bool:
            text = _scalar(value)
            may_fold = len(start) + len(text) > _WIDTH and (" " in text or text.startswith('"'))
            if may_fold or not text:
                text = _in_place(kinds, key, value)
        elif kind is bytes or isinstance(value, Path):
            text = self._object(value, kinds, key)
        elif kind is dict or kind is list:
            text = "[]" if kind is list else "{}"
        else:
            raise _UnusualError
        self._lines.append(start + text)

    def _object(self, value: bytes | Path, kinds: str, key: str | int | None) -> str:
        if isinstance(value, Path) and id(value) in self._objects:
            raise _UnusualError  # PyYAML writes an alias
        self._objects.add(id(value))
        return _in_place(kinds, key, value)


def _content(node: Node) -> Any:
    """What stands in a node, unresolved: a dict or list of nodes, or a value."""
    state = node.__dict__
    if "_val" in state:
        return state["_val"]
    content = state["_content"]
    return content.__dict__["_val"] if isinstance(node, UnionNode) and isinstance(content, Node) else content
