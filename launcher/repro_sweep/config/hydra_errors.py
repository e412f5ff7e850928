"""Hydra's errors as ours: one line that says what is wrong, why, and which override it concerns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import yaml
from hydra.errors import HydraException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

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
    """Turn what Hydra raises into one line: its own text, the cause, the keys allowed, the override concerned."""
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
    message = (": ".join(parts) or type(error).__name__) + _allowed_keys(error)
    message += _misplaced_choice(message)
    if overrides and not any(line in message for line in overrides):
        message += f" (with {' '.join(overrides)})"
    return message


def _allowed_keys(error: BaseException) -> str:
    """For a key that a typed node does not have: those that it has."""
    origin: BaseException | None = error
    while origin is not None and not isinstance(origin, (ConfigKeyError, ConfigAttributeError)):
        origin = origin.__cause__ or origin.__context__  # Hydra does not always name the cause
    node = None if origin is None else origin.object_type
    if not (isinstance(node, type) and is_dataclass(node)):
        return ""
    return f" ({', '.join(field.name for field in fields(node))})"


def _misplaced_choice(message: str) -> str:
    """For a YAML file whose body has ``sampler: tpe``, which belongs into its defaults."""
    if re.search(r"Merge error: \w+ is not a subclass of \w+Conf\b", message):
        return "; what a sampler, an executor or a pruner is, the file's defaults say"
    return ""


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
