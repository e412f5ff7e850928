"""Randomness in a trial: what is seeded before its task is called, and what a strict sweep refuses.

numpy and torch are seeded when they are imported, if the task does that itself: nothing is imported for it.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import os
import random
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from repro_sweep.sweep import Determinism

_HASHING = "PYTHONHASHSEED"
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_SETTINGS = ":4096:8"
"""One of the two settings with which cuBLAS gives the same bits in every run (CUDA's documentation of cuBLAS)."""
_WORD = 2**32


def seed_of(options: Determinism, config: Mapping[Any, Any], identity: str) -> int | None:
    """A trial's seed: its config's own ``seed``, else one from the sweep's seed and the trial's identity.

    None where the sweep leaves randomness alone.
    """
    if options.seed is None:
        return None
    own = config.get("seed")
    if isinstance(own, int) and not isinstance(own, bool):
        return own
    digest = hashlib.sha256(f"{options.seed}:{identity}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def interpreter(options: Determinism, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that a Python must start with: the order of sets is the same in all trials of a sweep."""
    if options.seed is None or environ.get(_HASHING, "random") != "random":
        return {}
    return {_HASHING: str(options.seed % _WORD)}


def enter(options: Determinism, seed: int | None) -> None:
    """In the trial's process, before its task is called."""
    if options.strict:
        os.environ.setdefault(_CUBLAS, _CUBLAS_SETTINGS)
    random.seed(seed)
    finder = _Finder({
        "numpy.random": lambda module: module.seed(None if seed is None else seed % _WORD),
        "torch": lambda module: _enter_torch(module, options, seed),
    })  # fmt: skip
    if not finder.over:
        sys.meta_path.insert(0, finder)


def _enter_torch(torch: Any, options: Determinism, seed: int | None) -> None:
    if seed is not None:
        torch.manual_seed(seed)
    if options.strict:
        torch.use_deterministic_algorithms(True, warn_only=options.strict == "warn")
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


class _Finder(importlib.abc.MetaPathFinder):
    """Does something to modules: at once to those that are imported, to others as soon as they are."""

    def __init__(self, then: Mapping[str, Callable[[Any], None]]) -> None:
        self._then: dict[str, Callable[[Any], None]] = {}
        for name, act in then.items():
            if name in sys.modules:
                act(sys.modules[name])
            else:
                self._then[name] = act

    @property
    def over(self) -> bool:
        """Whether nothing is left to be done."""
        return not self._then

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find a module as without this one, and have its loader do the rest."""
        del path, target
        act = self._then.pop(fullname, None)
        if act is None:
            return None
        found = importlib.util.find_spec(fullname)
        if found is not None and found.loader is not None:
            load = found.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                act(module)

            found.loader.exec_module = exec_module  # type: ignore[method-assign]
        return found


def generator(seed: int | None, device: str) -> Any:
    """A new ``torch.Generator``; without a seed it starts from torch's own."""
    import torch

    made = torch.Generator(device=device)
    made.manual_seed(torch.initial_seed() if seed is None else seed)
    return made


def worker_init_fn(worker_id: int) -> None:
    """Seed Python and numpy in a worker process of a ``DataLoader`` from what torch has seeded it with.

    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html#dataloader
    """
    del worker_id  # torch's seed differs for each worker
    import torch

    seed = torch.initial_seed() % _WORD
    random.seed(seed)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(seed)
