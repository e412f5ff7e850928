"""The source tree that a sweep is submitted from: its state, and how it travels to machines that do not see it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro_sweep.exchange import ARCHIVE_NAME
from repro_sweep.sweep import SweepSpec

_ROOTS_NAME = "roots.json"
_SCHEME = "file://"
_OURSELVES = Path(__file__).resolve().parents[2]
"""Where this package lies, which is on the path of one that is installed to be edited."""
_LARGEST_FILE_MB = 50
_LARGEST_MB = 500


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
    files = _files(directory, ".py")
    if files is None:
        return ""
    total = hashlib.sha256()
    for file in files:
        total.update(file.relative_to(directory).as_posix().encode("utf-8", "surrogateescape") + b"\0")
        try:
            total.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError:
            return ""
    return total.hexdigest()


_PATIENCE_S = 5.0
_OUTPUT = frozenset({"multirun", "outputs", "mlruns", "mlartifacts", "__pycache__", "node_modules"})


def _files(directory: Path, suffix: str = "") -> list[Path] | None:
    """The project's own files, sorted; None where there are too many folders to look into, as those of a dataset."""
    listed = _git(
        directory, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", f"*{suffix}"
    )
    found = (
        _found(directory, suffix)
        if listed is None
        else [directory / name for name in listed.split("\0") if name]
    )
    return None if found is None else sorted(filter(Path.is_file, found))


def _found(directory: Path, suffix: str) -> list[Path] | None:
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
        files += (Path(parent) / name for name in names if name.endswith(suffix))
    return files


# --- to other machines -----------------------------------------------------------------------------------------


def pack(spec: SweepSpec) -> str | None:
    """Write the files that the task is run from to an archive in the sweep's directory; returns why that cannot be.

    They are the project's own files (as for :func:`code_fingerprint`, of any kind) in its working directory, on its
    path and on Hydra's search path, without what belongs to the interpreter, and without files of more than 50 MB.
    """
    archive = Path(spec.directory) / ARCHIVE_NAME
    archive.unlink(missing_ok=True)
    roots = _roots(spec)
    members: dict[str, Path] = {}
    for number, root in enumerate(roots):
        files = _files(root)
        if files is None:
            return f"{root} has too many folders to look into"
        members |= {f"{number}/{file.relative_to(root)}": file for file in files if _travels(file, spec)}
    if sum(file.stat().st_size for file in members.values()) > _LARGEST_MB * 1e6:
        return f"the files of the project take more than {_LARGEST_MB} MB"
    partial = archive.with_name(f".{ARCHIVE_NAME}.partial")
    with tarfile.open(partial, "w:gz", compresslevel=1, dereference=True) as tar:
        for name, file in members.items():
            tar.add(file, name, recursive=False)
        text = json.dumps([str(root) for root in roots]).encode()
        about = tarfile.TarInfo(_ROOTS_NAME)
        about.size = len(text)
        tar.addfile(about, io.BytesIO(text))
    partial.replace(archive)
    return None


def _travels(file: Path, spec: SweepSpec) -> bool:
    return file.stat().st_size <= _LARGEST_FILE_MB * 1e6 and Path(spec.directory) not in file.parents


def unpack(archive: Path, folder: Path) -> None:
    """Unpack such an archive, on another machine."""
    options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archive) as tar:
        tar.extractall(folder, **options)  # noqa: S202  (from the sweep's own coordinator)


def relocated(spec: SweepSpec, folder: Path, directory: Path) -> SweepSpec:
    """The record of a sweep whose source was unpacked into ``folder``; its own directory is ``directory``."""
    roots = json.loads((folder / _ROOTS_NAME).read_text())
    moved = {root: str(folder / str(number)) for number, root in enumerate(roots)}
    task, composition = spec.task, spec.composition
    search_path = tuple(
        (provider, _SCHEME * path.startswith(_SCHEME) + _moved(path.removeprefix(_SCHEME), moved))
        for provider, path in composition.search_path
    )
    for path in moved.values():
        Path(path).mkdir(exist_ok=True)  # one without files
    return spec.model_copy(update={
        "directory": str(directory),
        "task": task.model_copy(update={
            "file": None if task.file is None else _moved(task.file, moved),
            "cwd": _moved(task.cwd, moved),
            "sys_path": tuple(_moved(path, moved) for path in task.sys_path),
        }),
        "composition": composition.model_copy(update={"search_path": search_path}),
    })  # fmt: skip


def _roots(spec: SweepSpec) -> list[Path]:
    """The folders that the task is run from; none of them lies in another."""
    given = {spec.task.cwd, *spec.task.sys_path}
    given.update(path.removeprefix(_SCHEME) for _, path in spec.composition.search_path)
    if spec.task.file is not None:
        given.add(str(Path(spec.task.file).parent))
    interpreter = {Path(sys.prefix), Path(sys.base_prefix), _OURSELVES}
    folders = {
        path
        for path in map(Path, given)
        if path.is_absolute() and path.is_dir() and not interpreter & {path, *path.parents}
    }
    return sorted(path for path in folders if not folders & set(path.parents))


def _moved(path: str, moved: Mapping[str, str]) -> str:
    for root, new in moved.items():
        if path == root or path.startswith(f"{root}/"):
            return new + path[len(root) :]
    return path


def _git(directory: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *command], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
