"""What is wrong with a composed config, and what it *is*: its part of a trial's identity.

:func:`check` finds every problem of a config before anything starts: mandatory values that are missing,
interpolations that cannot be resolved. On the way it builds the *container*: the resolved config as plain
JSON-able data, in which

- what comes from the environment, the clock or Hydra's runtime (``oc.env``, ``now``, ``hydra:``) keeps its
  interpolation's text, so that secrets, paths and dates are no part of an identity, nor ever written by this
  module;
- ``${hydra:runtime.choices.*}`` is resolved, because which options were chosen tells trials apart;
- what JSON cannot tell apart stays apart: see :func:`plain`.

:func:`identity` hashes it with the task, the source and the data.

Nothing here changes a config. Resolving runs the user's resolvers, as the task would.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import PurePath
from typing import Any

from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.base import UnionNode
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationToMissingValueError,
    OmegaConfBaseException,
)
from omegaconf.grammar_parser import parse

from repro_sweep.config.nodes import has_interpolation
from repro_sweep.config.yamltext import to_yaml
from repro_sweep.redaction import is_excepted, is_secret, reveals, secret_message

_MISSING = "???"
_MISSING_MESSAGE = "mandatory value is missing ('???')"
_OUTSIDE = ("oc.env", "now")
_CHOICES = "runtime.choices."
_resolvers_lock = threading.RLock()

Args = tuple[Any, ...]
Resolver = Callable[[Any, Any, Any, Args, tuple[str, ...]], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that keeps a config from being used; ``key`` is the full dotted key."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A composed config after its examination.

    ``container`` is meaningful only if there are no ``problems``.
    """

    yaml: str
    container: dict[str, Any]
    problems: tuple[Problem, ...] = ()

    @property
    def digest(self) -> str:
        """The SHA-256 of the container alone, in hex."""
        return hashlib.sha256(_canonical(self.container)).hexdigest()

    @property
    def params(self) -> dict[str, object]:
        """The resolved leaves under their dotted keys; a list is a leaf, a kept interpolation its text."""
        return dict(_leaves(self.container, ""))


def check(cfg: DictConfig, *, hydra: DictConfig | None = None, not_secret: Collection[str] = ()) -> Checked:
    """Examine one composed config without starting anything.

    ``hydra`` is the hydra node it was composed with (``Composer.hydra``): with it, choices are
    resolved. What is only known when the job runs (its number, its directory) is no problem. Safe in any
    thread; threads take turns where there are interpolations. A text or a number at or below a key that looks like a
    secret's is a problem, and so is a URL with a password, but for the keys in ``not_secret``.
    """
    examination = _Examination(hydra, not_secret)
    container = examination.run(cfg)
    return Checked(yaml=to_yaml(cfg), container=container, problems=tuple(examination.problems.values()))


def identity(task: str, container: Mapping[str, Any], source: str = "", data: str = "") -> str:
    """The identity of a trial: SHA-256, in hex, over canonical JSON of all that decides its result.

    ``container`` is that of :class:`Checked`, or any data made by :func:`plain`; ``source`` and ``data`` are
    fingerprints. The order of keys does not matter; types do. Raises ``TypeError`` for a container that is
    not JSON.
    """
    parts = {"config": container, "data": data, "source": source, "task": task, "version": 1}
    return hashlib.sha256(_canonical(parts)).hexdigest()


def plain(value: Any) -> Any:
    """``value`` as JSON-able data of which no two differ by type only.

    What JSON lacks becomes an object with one key: ``{"$float": "nan"}``, ``{"$bytes": "00ff"}``, ``{"$path":
    "/tmp"}``, ``{"$enum": "Color.RED"}``, ``{"$object": "torch.dtype: torch.float32"}``. Keys that are no
    strings become ``"$int:1"`` and so on; a ``$`` that begins a key is doubled, so nothing can be mistaken
    for a tag.
    """
    kind = type(value)
    if value is None or kind is str or kind is int or kind is bool:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Enum):
        return {"$enum": f"{kind.__qualname__}.{value.name}"}
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    if isinstance(value, PurePath):
        return {"$path": str(value)}
    if isinstance(value, Mapping):
        return {_plain_key(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return {"$set": sorted((plain(item) for item in value), key=_canonical)}
    return {"$object": f"{kind.__module__}.{kind.__qualname__}: {value!r}"}


def _plain_key(key: Any) -> str:
    kind = type(key)
    if kind is str:
        return f"${key}" if key.startswith("$") else str(key)
    if isinstance(key, Enum):
        return f"$enum:{kind.__qualname__}.{key.name}"
    return f"${kind.__name__}:{key!r}"


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _leaves(container: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in container.items():
        name = f"{prefix}{key}"
        if not isinstance(value, dict) or not value:
            yield name, value
        elif len(value) == 1 and (tag := next(iter(value))).startswith("$") and tag[1:].isalpha():
            yield name, value[tag]
        else:
            yield from _leaves(value, f"{name}.")


class _Examination:
    """One walk over one config."""

    def __init__(self, hydra: DictConfig | None, not_secret: Collection[str]) -> None:
        self._not_secret = not_secret
        self.problems: dict[tuple[str, str], Problem] = {}
        self._hydra = hydra
        self._unfilled: list[tuple[Node, InterpolationToMissingValueError]] = []
        self._open: set[int] = set()  # ids of the interpolations whose targets are being walked
        self._outside: list[str] = []  # what the interpolation being resolved got from outside the config
        self._stand_ins: list[str] = []  # ... and what was made up, because only the running job knows it

    def run(self, cfg: DictConfig) -> dict[str, Any]:
        if has_interpolation(cfg):
            with self._observed_resolvers():
                container = self._walk(cfg)
        else:
            container = self._walk(cfg)
        if not any(problem.message is _MISSING_MESSAGE for problem in self.problems.values()):
            for node, error in self._unfilled:  # else they follow from what is missing
                self._add(node, _first_line(error))
        return container if isinstance(container, dict) else {}

    def _add(self, node: Node, message: str) -> None:
        key = str(node._get_full_key(None))
        self.problems.setdefault((key, message), Problem(key=key, message=message))

    def _walk(self, node: Node, *, secret: bool = False) -> Any:
        """The node's part of the container; ``secret``: its key looks like a secret's, or one above it."""
        state = node.__dict__
        value = state["_val"] if "_val" in state else state["_content"]
        kind = type(value)
        if kind is str:
            if value == _MISSING:
                self._add(node, _MISSING_MESSAGE)
                return None
            if "${" in value:
                return self._resolve(node, value)
            self._refuse_secret(node, value, secret=secret)
            return value
        if value is None or kind is bool:
            return value
        if kind is int:
            self._refuse_secret(node, value, secret=secret)
            return value
        if kind is dict and type(node) is DictConfig:
            below = secret and state["_metadata"].key != "token"  # it has a ``dim``
            return {
                key if type(key) is str and key[:1] != "$" else _plain_key(key): self._walk(
                    child, secret=below or is_secret(str(key))
                )
                for key, child in value.items()
            }
        if kind is list and type(node) is ListConfig:
            return [self._walk(child, secret=secret) for child in value]
        if isinstance(node, UnionNode) and isinstance(value, Node):
            return self._walk(value, secret=secret)
        self._refuse_secret(node, value, secret=secret)
        return plain(value)

    def _refuse_secret(self, node: Node, value: object, *, secret: bool) -> None:
        """A value that would be kept in the ledger, in MLflow and in the frozen source."""
        if reveals(value, secret=secret):
            key = str(node._get_full_key(None))
            if not is_excepted(key, self._not_secret):
                self._add(node, secret_message(key, url=not secret))

    def _resolve(self, node: Node, text: str) -> Any:
        if id(node) in self._open:
            self._add(node, "Recursive interpolation detected")
            return None
        self._outside = []
        self._stand_ins = []
        self._refuse_secret(node, text, secret=False)
        try:
            target = _dereferenced(node, text)
        except InterpolationToMissingValueError as error:
            self._unfilled.append((node, error))
            return None
        except OmegaConfBaseException as error:
            if not self._excused(error):
                self._add(node, self._discreet(error, text))
            return None
        kept = {"$interpolation": text}
        if self._outside:
            return kept
        state = target.__dict__
        if "_val" not in state:
            self._open.add(id(node))
            value = self._walk(target)
            self._open.discard(id(node))
            return value
        found = plain(state["_val"])
        self._refuse_secret(node, found, secret=False)
        # An object that shows its address is another one in each process.
        return kept if " at 0x" in repr(found) else found

    def _discreet(self, error: OmegaConfBaseException, text: str) -> str:
        """The error's first line, unless it shows what came from the environment."""
        line = _first_line(error)
        shown = any(value and value in line for value in self._outside)
        return f"the value of '{text}' cannot be used here ({type(error).__name__})" if shown else line

    def _excused(self, error: OmegaConfBaseException) -> bool:
        """Whether an error may come from a stand-in for what Hydra only knows when the job runs."""
        if not self._stand_ins:
            return False
        return not isinstance(error, InterpolationKeyError) or any(
            text in str(error) for text in self._stand_ins
        )

    @contextmanager
    def _observed_resolvers(self) -> Iterator[None]:
        """Notice, in this thread, when a value comes from outside the config."""
        registry: dict[str, Resolver] = BaseContainer._resolvers
        with _resolvers_lock:
            originals = {name: registry[name] for name in (*_OUTSIDE, "hydra") if name in registry}
            observed = {
                name: self._observed(original) for name, original in originals.items() if name != "hydra"
            }
            if "hydra" in originals:
                observed["hydra"] = self._observed_hydra(originals["hydra"])
            registry.update(observed)
            try:
                yield
            finally:
                registry.update({n: r for n, r in originals.items() if registry.get(n) is observed[n]})

    def _observed(self, original: Resolver) -> Resolver:
        owner = threading.get_ident()

        def resolver(
            config: Any, parent: Any, node: Any, args: tuple[Any, ...], texts: tuple[str, ...]
        ) -> Any:
            value = original(config, parent, node, args, texts)
            if threading.get_ident() == owner:
                self._outside.append(str(value))
            return value

        return resolver

    def _observed_hydra(self, original: Resolver) -> Resolver:
        owner = threading.get_ident()

        def resolver(
            config: Any, parent: Any, node: Any, args: tuple[Any, ...], texts: tuple[str, ...]
        ) -> Any:
            if threading.get_ident() != owner:
                return original(config, parent, node, args, texts)
            return self._hydra_value(str(args[0]) if args else "")

        return resolver

    def _hydra_value(self, key: str) -> Any:
        value = None
        if self._hydra is not None:
            try:
                value = OmegaConf.select(self._hydra, key)
            except InterpolationToMissingValueError:
                value = None  # known when the job runs
            if key.startswith(_CHOICES):
                return value
        if value is None:
            value = f"${{hydra:{key}}}"
            self._stand_ins.append(value)
        self._outside.append("")
        return value


@lru_cache(maxsize=1 << 10)
def _parse_tree(text: str) -> Any:
    return parse(text)


def _dereferenced(node: Node, text: str) -> Node:
    """``node._dereference_node()``, but the text, which recurs in all trials, is parsed once."""
    parent = node._get_parent_container()
    if parent is None:
        return node._dereference_node()
    target = parent._resolve_interpolation_from_parse_tree(
        parent=parent,
        key=node._key(),
        value=node,
        parse_tree=_parse_tree(text),
        throw_on_resolution_failure=True,
        memo=None,
    )
    assert target is not None
    return target


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
