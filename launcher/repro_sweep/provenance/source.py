"""The state of the source tree that a sweep is submitted from."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class GitState:
    """The commit that is checked out, and whether tracked files differ from it."""

    commit: str
    dirty: bool


def git_state(directory: Path) -> GitState | None:
    """The state of the repository that holds ``directory``; None outside of one, or before its first commit."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return GitState(commit=commit.strip(), dirty=bool(changes))


def code_fingerprint(directory: Path) -> str:
    """A hash of the project's Python files, tracked or not; equal code gives equal fingerprints wherever it lies.

    In a repository these are the files below ``directory`` that git does not ignore, elsewhere all below it that are
    not in hidden folders, virtual environments or the output of sweeps. Empty where they cannot be read, or not be
    found within some seconds; then nothing is known to be equal.
    """
    listed = _git(directory, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.py")
    if listed is not None:
        files = [directory / name for name in listed.split("\0") if name]
    else:
        found = _python_files(directory)
        if found is None:
            return ""
        files = found
    total = hashlib.sha256()
    for file in sorted(filter(Path.is_file, files)):
        total.update(file.relative_to(directory).as_posix().encode("utf-8", "surrogateescape") + b"\0")
        try:
            total.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError:
            return ""
    return total.hexdigest()


_PATIENCE_S = 5.0
_OUTPUT = frozenset({"multirun", "outputs", "mlruns", "mlartifacts", "__pycache__", "node_modules"})


def _python_files(directory: Path) -> list[Path] | None:
    """None where there are too many folders to look into, such as those of a dataset."""
    files: list[Path] = []
    deadline = time.monotonic() + _PATIENCE_S
    for parent, folders, names in os.walk(directory):
        if time.monotonic() > deadline:
            return None
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and name not in _OUTPUT
            and not (Path(parent) / name / "pyvenv.cfg").exists()
        ]
        files += (Path(parent) / name for name in names if name.endswith(".py"))
    return files


def _git(directory: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *command], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
