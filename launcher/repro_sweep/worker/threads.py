"""How many threads the numeric libraries of a trial may use."""

from __future__ import annotations

import os
import sys

from repro_sweep.sweep import Resources

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_BACKGROUND_THREADS = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""pandas imports pyarrow, whose allocator starts a thread; a process with one cannot be forked safely."""

_limited: set[str] = set()


def limit() -> None:
    """Keep the numeric libraries at one thread while the task is imported, so that no pool exists at a fork.

    Variables that the user has set stay as they are. :func:`allow` is the other half.
    """
    for variable, value in _BACKGROUND_THREADS.items():
        os.environ.setdefault(variable, value)
    for variable in _THREAD_VARIABLES:
        if variable not in os.environ:
            os.environ[variable] = "1"
            _limited.add(variable)


def allow(resources: Resources) -> None:
    """In the trial: give the numeric libraries as many threads as the trial has CPUs."""
    threads = resources.threads
    if threads == 1 or not _limited:
        return
    for variable in _limited:
        os.environ[variable] = str(threads)
    import threadpoolctl

    threadpoolctl.threadpool_limits(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
