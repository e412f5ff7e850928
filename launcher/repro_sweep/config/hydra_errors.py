"""Hydra's errors as ours: one line that says what is wrong, why, and which override it concerns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from repro_sweep.errors import CompositionError

# Hydra tells the user's mistakes in all these ways, asserts included.
_HYDRAS_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    yaml.YAMLError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


@contextmanager
def mapped_errors(overrides: Sequence[str]) -> Iterator[None]:
    """Turn what Hydra raises into one line: its own text, the cause, the override concerned."""
    try:
        yield
    except _HYDRAS_ERRORS as error:
        raise CompositionError(_one_line(error, overrides)) from error


def _one_line(error: BaseException, overrides: Sequence[str]) -> str:
    parts: list[str] = []
    step: BaseException | None = error
    while step is not None:
        text = _condensed(step)
        if text and not any(text in part for part in parts):
            parts.append(text)
        step = step.__cause__
    message = ": ".join(parts) or type(error).__name__
    if overrides and not any(line in message for line in overrides):
        message += f" (with {' '.join(overrides)})"
    return message


def _condensed(error: BaseException) -> str:
    """The text of one of Hydra's errors without its search path, its links and its line breaks."""
    text = str(error)
    if type(error) is KeyError:  # says nothing but the key
        text = f"KeyError: {text}"
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith(
            ("Config search path", "Search path:", "See https", "    full_key:", "    object_type")
        ):
            break
        words = " ".join(line.split())
        if not words:
            continue
        option_follows_option = line.startswith("\t") and lines and lines[-1].startswith("\t")
        lines.append(("\t" if line.startswith("\t") else "") + words)
        if option_follows_option:
            lines[-2] += ","
    return " ".join(line.strip() for line in lines)
