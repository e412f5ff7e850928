"""Checkpoints that outlive their machine: copies at ``sweep.checkpoint_uri``, through fsspec.

``<uri>/<sweep id>/<trial>/latest.json`` names the folder beside it that holds the newest whole copy; it is replaced
when a copy is complete, so what is found is never half of one.
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any, TypeAlias

from repro_sweep.errors import ReproSweepError

CHECKPOINTS = "checkpoints"
_LATEST = "latest.json"

Signature: TypeAlias = frozenset[tuple[str, int, int]]
"""Of each file in a folder: its name, size and time of change."""

log = logging.getLogger(__name__)


class CheckpointError(ReproSweepError):
    """A checkpoint that exists cannot be had."""


def signature(folder: Path) -> Signature:
    """What a folder holds now."""
    found = set()
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it was just renamed
            if path.is_file():
                about = path.stat()
                found.add((str(path.relative_to(folder)), about.st_size, about.st_mtime_ns))
    return frozenset(found)


class Checkpoints:
    """The copies of one trial's checkpoints.

    Args:
        uri: ``sweep.checkpoint_uri``, as fsspec takes it.
        sweep_id: the sweep's.
        trial: the trial's number.
        attempt: the attempt's id, for whose copies there are folders of their own.
    """

    def __init__(self, uri: str, sweep_id: str, trial: int, attempt: str) -> None:
        from fsspec.core import url_to_fs

        self._fs: Any
        self._fs, base = url_to_fs(uri)
        self._root = f"{base.rstrip('/')}/{sweep_id}/{trial}"
        self._attempt = attempt
        self._copies = 0
        self._previous: str | None = None

    def restore(self, folder: Path) -> None:
        """Bring the newest copy into a folder, if there is one.

        Raises:
            CheckpointError: it is there, but cannot be had.
        """
        try:
            try:
                latest = json.loads(self._fs.cat_file(f"{self._root}/{_LATEST}"))
            except FileNotFoundError:
                return
            for name in latest["files"]:
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(f"{self._root}/{latest['folder']}/{name}", str(target))
        except Exception as error:
            raise CheckpointError(f"its checkpoint at {self._root} cannot be had: {error}") from error

    def save(self, folder: Path) -> bool:
        """Copy what a folder holds; returns whether that was done, whole."""
        before = signature(folder)
        copy = f"{self._attempt}-{self._copies}"
        self._copies += 1
        try:
            for name, _, _ in sorted(before):
                target = f"{self._root}/{copy}/{name}"
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._fs.put_file(str(folder / name), target)
            if signature(folder) != before:
                self._remove(copy)
                return False
            self._fs.makedirs(self._root, exist_ok=True)
            partial = f"{self._root}/{self._attempt}.partial"
            self._fs.pipe_file(
                partial, json.dumps({"folder": copy, "files": sorted(name for name, _, _ in before)}).encode()
            )
            self._fs.mv(partial, f"{self._root}/{_LATEST}")
        except Exception as error:  # noqa: BLE001  (whatever a file system raises: the trial goes on, it is tried again)
            log.warning("the checkpoint cannot be kept at %s: %s", self._root, error)
            return False
        if self._previous is not None:
            self._remove(self._previous)
        self._previous = copy
        return True

    def _remove(self, copy: str) -> None:
        with contextlib.suppress(Exception):  # it only takes room
            self._fs.rm(f"{self._root}/{copy}", recursive=True)
