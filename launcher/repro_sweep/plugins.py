"""Backends found by name: a module of a package's folder, or an entry point that refers to such a module."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType


def names(package: str, group: str) -> tuple[str, ...]:
    """The names of all backends, sorted; none is imported for it. ``base`` is the port itself."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    own = {module.name for module in found} - {"base"}
    return tuple(sorted(own | {entry.name for entry in entry_points(group=group)}))


def load(package: str, group: str, name: str) -> ModuleType | None:
    """The module of a backend, None if there is none; a module of the folder goes before an entry point."""
    if name == "base" or name not in names(package, group):
        return None
    try:
        return importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{package}.{name}":
            raise
    module: ModuleType = next(iter(entry_points(group=group, name=name))).load()
    return module
