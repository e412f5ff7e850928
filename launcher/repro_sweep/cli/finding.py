"""Finds a sweep that was started before, by its name or its directory."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable
from pathlib import Path

from repro_sweep.errors import SweepError
from repro_sweep.ledger import FILE_NAME, Ledger
from repro_sweep.states import TrialState

FOLDER = "multirun"
_SHOWN = 10


def find(name: str) -> Path:
    """The directory of a sweep: ``multirun/NAME`` below the working directory, or NAME as a path.

    Raises:
        SweepError: there is none; the message names those that there are.
    """
    for directory in (Path.cwd() / FOLDER / name, Path(name).absolute()):
        if (directory / FILE_NAME).is_file():
            return directory
    raise SweepError(_unknown(name))


def latest() -> Path:
    """The directory of the sweep below ``multirun`` that changed last.

    Raises:
        SweepError: there is none.
    """
    found = _sweeps()
    if not found:
        raise SweepError(f"there is no sweep in {Path.cwd() / FOLDER}")
    return found[0]


def reference(directory: Path) -> str:
    """What a command in the working directory calls a sweep, ready to be typed."""
    here = Path.cwd()
    if directory.parent == here / FOLDER:
        return shlex.quote(directory.name)
    return shlex.quote(str(directory.relative_to(here) if directory.is_relative_to(here) else directory))


def check_place(directory: Path, ledger: Ledger) -> None:
    """Make sure that a sweep that is to go on is where it was.

    Raises:
        SweepError: its directory was moved.
    """
    recorded = Path(ledger.spec.directory)
    if not (recorded / FILE_NAME).exists() or not recorded.samefile(directory):
        raise SweepError(
            f"{directory}: this sweep ran in {recorded}; move it back, or start it here with its own command"
        )


def check_trials(ledger: Ledger, numbers: Iterable[int]) -> None:
    """Make sure that a sweep has these trials.

    Raises:
        SweepError: it has not; the message says which it has.
    """
    known = {number for number, _ in ledger.states()}
    unknown = [number for number in numbers if number not in known]
    if not unknown:
        return
    has = f"its trials are {min(known)} to {max(known)}" if known else "it has none yet"
    which = ", ".join(map(str, unknown))
    raise SweepError(
        f"sweep '{ledger.spec.name}' has no trial{'s' if len(unknown) > 1 else ''} {which}: {has}"
    )


def is_finished(ledger: Ledger) -> bool:
    """Whether nothing is left to run: each trial has its result, or was cancelled, or is no part of the sweep."""
    if _searches(ledger):
        return False
    apart = ledger.withdrawn | ledger.cancelled
    return all(state.is_done() or number in apart for number, state in ledger.states())


def has_ended(ledger: Ledger) -> bool:
    """Whether nothing runs or waits; some trials may have failed."""
    if _searches(ledger):
        return False
    apart = ledger.withdrawn
    return all(state.is_finished() or number in apart for number, state in ledger.states())


def _searches(ledger: Ledger) -> bool:
    """Whether a search has not come to its end."""
    return ledger.spec.search is not None and ledger.search_over is None


def failed(ledger: Ledger) -> list[int]:
    """The trials that have failed and that the user has not cancelled."""
    apart = ledger.withdrawn | ledger.cancelled
    return [number for number, state in ledger.states() if state is TrialState.FAIL and number not in apart]


def _sweeps() -> list[Path]:
    """The directories of the sweeps in ``multirun``, the latest first."""
    found = {path.parent: _changed(path) for path in (Path.cwd() / FOLDER).glob(f"*/{FILE_NAME}")}
    return sorted(found, key=lambda directory: -found[directory])


def _changed(ledger: Path) -> float:
    """When a ledger was changed last, seconds UTC: what is new stands in its write-ahead log first."""
    log = ledger.with_name(f"{ledger.name}-wal")
    return max(path.stat().st_mtime for path in (ledger, log) if path.exists())


def _unknown(name: str) -> str:
    names = [directory.name for directory in _sweeps()]
    if not names:
        return (
            f"there is no sweep '{name}': {Path.cwd() / FOLDER} has none; a sweep's directory will do as well"
        )
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"there is no sweep '{name}' in {FOLDER}/; did you mean '{near[0]}'?"
    more = ", …" if len(names) > _SHOWN else ""
    return f"there is no sweep '{name}' in {FOLDER}/, which has {', '.join(names[:_SHOWN])}{more}"
