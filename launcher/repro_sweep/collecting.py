"""Python's search for cycles of dead objects, made rare where it finds none: while modules are imported.

An import makes objects by the hundred thousand that stay, and Python looks through them again and again. Our own
processes look less often; a trial's process has Python's own settings, as what it runs is the user's.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_OBJECTS = 50_000
"""So many more objects than before make Python look through the youngest ones; its own value is 700."""
_ROUNDS = 20


def rarely() -> None:
    """Look rarely from now on, in this process."""
    gc.set_threshold(_OBJECTS, _ROUNDS, _ROUNDS)


@contextlib.contextmanager
def rarely_meanwhile() -> Iterator[None]:
    """Look rarely until the end, then as before, unless what ran here has made settings of its own."""
    before = gc.get_threshold()
    rarely()
    try:
        yield
    finally:
        if gc.get_threshold() == (_OBJECTS, _ROUNDS, _ROUNDS):
            gc.set_threshold(*before)
