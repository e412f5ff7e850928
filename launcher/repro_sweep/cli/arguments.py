"""Reads the arguments of a command; a mistake in them is one line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from repro_sweep.errors import SweepError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises :class:`SweepError` instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise SweepError(f"{message}; see '{self.prog} --help'")


def trial_numbers(texts: Sequence[str]) -> tuple[int, ...]:
    """Trial numbers as they are typed, or copied from a ranking: ``3 4`` or ``3,4``; each once, in order.

    Raises:
        SweepError: something else stands there.
    """
    numbers = set()
    for text in texts:
        for part in text.split(","):
            if not (part.isascii() and part.isdigit()):
                raise SweepError(f"'{part}' is not the number of a trial")
            numbers.add(int(part))
    return tuple(sorted(numbers))


def at_least(least: int, text: str) -> int:
    """A whole number from ``least`` on."""
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value
