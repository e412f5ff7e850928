"""Backends found by name: a module of a package's folder, or an entry point that refers to such a module."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Set as AbstractSet
from importlib.metadata import EntryPoints, entry_points
from types import ModuleType

PORT: frozenset[str] = frozenset({"base"})
"""What is no backend in any folder: the port itself."""


def names(package: str, group: str, helpers: AbstractSet[str] = PORT) -> tuple[str, ...]:
    """The names of all backends, sorted; none is imported for it. The modules ``helpers`` are none."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    own = {module.name for module in found} - helpers
    return tuple(sorted(own | {entry.name for entry in _entries(group)}))


def load(package: str, group: str, name: str, helpers: AbstractSet[str] = PORT) -> ModuleType | None:
    """The module of a backend, None if there is none; a module of the folder goes before an entry point."""
    if name not in names(package, group, helpers):
        return None
    try:
        return importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{package}.{name}":
            raise
    module: ModuleType = next(entry for entry in _entries(group) if entry.name == name).load()
    return module


def _entries(group: str) -> EntryPoints:
    return _declared(group, tuple(sys.path))


@functools.cache
def _declared(group: str, _path: tuple[str, ...]) -> EntryPoints:
    """Reading what all installed packages declare takes tens of milliseconds, and each command asks dozens of times."""
    return entry_points(group=group)
