"""What the zygote imports for all trials once a first one had to import it."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Sequence

from repro_sweep.worker import memory

PRELOADED = frozenset({"matplotlib.figure", "pandas", "scipy.stats", "torch._dynamo", "torch.utils.data"})
"""Modules that are slow to import, safe to fork after, and often imported only when a trial runs: torch's optimizers
import ``torch._dynamo``, for 0.8 s of each trial. The zygote imports one of them when a first trial had to."""


def imported() -> set[str]:
    """Those of them that this process has; a look at all modules would touch the pages of all their names."""
    return {module for module in PRELOADED if module in sys.modules}


def load(modules: Sequence[str]) -> None:
    """Import, in the zygote, what its trials would otherwise import each for itself."""
    for module in PRELOADED.intersection(modules):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    memory.settle()
