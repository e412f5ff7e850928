"""Writes the record of each attempt (``provenance.record``): what its trial said, and what is the same for all here."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from repro_sweep import host, protocol
from repro_sweep.provenance import environment
from repro_sweep.provenance.record import Facts, TrialRecord
from repro_sweep.sweep import SweepSpec

log = logging.getLogger(__name__)
_lock = threading.Lock()


@functools.cache
def _inspected() -> environment.Environment:
    return environment.inspect()


def look() -> None:
    """Find out what is the same for all trials here; takes a moment, once."""
    with _lock:
        _inspected()


def facts(seed: int | None) -> dict[str, Any]:
    """In the trial's process: what is to be known of it."""
    return {"seed": seed, "variables": environment.variables(os.environ), "torch": _torch()}


def _torch() -> dict[str, Any] | None:
    torch = sys.modules.get("torch")
    try:
        if torch is None:
            return None
        return {
            "version": str(torch.__version__),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
    except Exception:  # noqa: BLE001  (something else of that name, or half of it: the trial has its result)
        return None


def write(
    directory: Path,
    spec: SweepSpec,
    assignment: protocol.Assignment,
    said: Mapping[str, Any] | None,
    gpus: tuple[str, ...],
    span: tuple[float, float],
) -> None:
    """Write the record of an attempt that has just ended; nothing is known of one whose process has said nothing.

    Args:
        directory: the trial's.
        spec: the sweep's.
        assignment: what it ran.
        said: its :func:`facts`.
        gpus: what it saw.
        span: when it started and ended.
    """
    if said is None:
        return
    look()
    try:
        found = Facts.model_validate(said)
        TrialRecord(
            sweep=spec.name, sweep_id=spec.sweep_id, task=spec.task.name, trial=assignment.trial,
            attempt=assignment.attempt, identity=assignment.identity, overrides=assignment.overrides,
            snapshot=None if spec.source is None else spec.source.snapshot,
            submission="" if spec.source is None else spec.source.submission, commit=spec.origin.git_commit,
            dirty=spec.origin.git_dirty, data=spec.data, determinism=spec.determinism, resources=spec.resources,
            facts=found, environment=_inspected().model_copy(update={"variables": found.variables}), gpus_seen=gpus,
            host=host.name(), user=spec.origin.user, command=spec.origin.command, started_at=span[0],
            ended_at=span[1],
        ).write(directory)  # fmt: skip
    except (OSError, ValidationError) as error:  # it costs the trial its record, not its result
        log.warning("trial %d: its record cannot be written: %s", assignment.trial, error)
