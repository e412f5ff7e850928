"""Backends found by name: a module of a package's folder, or an entry point that refers to such a module."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Set as AbstractSet
from importlib.metadata import entry_points
from types import ModuleType

PORT: frozenset[str] = frozenset({"base"})
"""What is no backend in any folder: the port itself."""


def names(package: str, group: str, helpers: AbstractSet[str] = PORT) -> tuple[str, ...]:
    """The names of all backends, sorted; none is imported for it. The modules ``helpers`` are none."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    own = {module.name for module in found} - helpers
    return tuple(sorted(own | {entry.name for entry in entry_points(group=group)}))


def load(package: str, group: str, name: str, helpers: AbstractSet[str] = PORT) -> ModuleType | None:
    """The module of a backend, None if there is none; a module of the folder goes before an entry point."""
    if name not in names(package, group, helpers):
        return None
    try:
        return importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{package}.{name}":
            raise
    module: ModuleType = next(iter(entry_points(group=group, name=name))).load()
    return module
