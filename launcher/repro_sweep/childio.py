"""The output of a process that speaks with its parent through stdout."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def private_stdout(log: Path) -> Iterator[IO[str]]:
    """Keep stdout for the parent: everything else that writes to it or to stderr writes to the log."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with out:
        yield out
