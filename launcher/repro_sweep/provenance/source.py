"""The source tree that a sweep is submitted from: its files and state, and trials that run from a frozen copy."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from repro_sweep.errors import SweepError
from repro_sweep.sweep import Data, SweepSpec

_SCHEME = "file://"
_OURSELVES = Path(__file__).resolve().parents[2]
"""Where this package lies, which is on the path of one that is installed to be edited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GitState:
    """The commit that is checked out, and whether tracked files differ from it or code lies there that it lacks."""

    commit: str
    dirty: bool


def git_state(directory: Path) -> GitState | None:
    """The state of the repository that holds ``directory``; None outside of one, or before its first commit."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return GitState(commit=commit.strip(), dirty=bool(changes) or _has_untracked_code(directory))


def _has_untracked_code(directory: Path) -> bool:
    return any(Path(name).suffix in CODE for name in _untracked(directory) or ())


def code_fingerprint(directory: Path) -> str:
    """A hash of the project's Python files, tracked or not; equal code gives equal fingerprints wherever it lies.

    In a repository these are the files below ``directory`` that git does not ignore, elsewhere all below it that are
    not in hidden folders, virtual environments or the output of sweeps. Empty where they cannot be read, or not be
    found within some seconds; then nothing is known to be equal.
    """
    found = _names(directory)
    if found is None:
        return ""
    names, _ = found
    total = hashlib.sha256()
    for name in names:
        file = directory / name
        if name.endswith(".py") and file.is_file():
            total.update(name.encode("utf-8", "surrogateescape") + b"\0")
            try:
                total.update(hashlib.sha256(file.read_bytes()).digest())
            except OSError:
                return ""
    return total.hexdigest()


@dataclass(frozen=True, slots=True)
class Listing:
    """A project's own files, and what git ignores there (files, and folders with nothing else in them).

    Paths below the project, sorted; files that were deleted may be among them. ``code`` are those of the files that
    nobody takes for the output of something: git tracks them, or they are code or configuration by their names.
    """

    files: list[str]
    ignored: list[str]
    code: frozenset[str]


def listed(directory: Path) -> Listing | None:
    """The project's own files, of any kind; None where there are too many folders to look into."""
    own = _names(directory)
    if own is None:
        return None
    names, tracked = own
    found = _git(directory, "ls-files", "-z", *_OTHERS, "--ignored", "--directory") or ""
    ignored = (name.rstrip("/") for name in found.split("\0") if name)
    code = tracked.union(name for name in names if Path(name).suffix in CODE)
    return Listing(names, sorted(name for name in ignored if not is_output(directory / name)), code)


_PATIENCE_S = 5.0
_OTHERS = ("--others", "--exclude-standard")
_OUTPUT = frozenset({"multirun", "outputs", "mlruns", "mlartifacts", "__pycache__", "node_modules"})
_MADE = frozenset({".egg-info", ".pyc"})
_SUBMODULE = "160000 "
CODE = frozenset([
    ".py", ".pyi", ".pyx", ".pxd", ".ipynb", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".rs", ".jl", ".sh",
    ".sql", ".j2", ".jinja", ".yaml", ".yml", ".toml", ".json", ".cfg", ".ini",
])  # fmt: skip
"""The endings of files that are code or configuration."""


def _names(directory: Path) -> tuple[list[str], frozenset[str]] | None:
    """The project's own files, and those of them that git tracks, here or in a nested repository; None for too many."""
    tracked = _git(directory, "ls-files", "-z", "--cached", "--stage")
    others = _untracked(directory)
    if tracked is None or others is None:
        below = files_below(directory)
        return None if below is None else (below, frozenset())
    names: list[str] = []
    nested: list[str] = []
    for entry in filter(None, tracked.split("\0")):
        about, _, name = entry.partition("\t")
        (nested if about.startswith(_SUBMODULE) else names).append(name)
    own = set(names)
    for name in others:
        (nested if name.endswith("/") else names).append(name)
    for name in nested:
        # without this git would take the folder for a part of the repository around it
        if (directory / name / ".git").exists():
            inner, of_inner = _names(directory / name) or ((), ())
            names += (f"{name.rstrip('/')}/{each}" for each in inner)
            own.update(f"{name.rstrip('/')}/{each}" for each in of_inner)
    return sorted(set(names)), frozenset(own)


def files_below(directory: Path) -> list[str] | None:
    """The files below a folder, and links to folders, without hidden folders and output; None for too many folders."""
    files: list[str] = []
    deadline = time.monotonic() + _PATIENCE_S
    for parent, folders, names in os.walk(directory):
        if time.monotonic() > deadline:
            return None
        folders[:] = [
            name for name in folders if not name.startswith(".") and not is_output(Path(parent, name))
        ]
        found = (*names, *(name for name in folders if Path(parent, name).is_symlink()))
        below = Path(parent).relative_to(directory).as_posix()
        files += found if below == "." else (f"{below}/{name}" for name in found)
    return sorted(files)


def _untracked(directory: Path) -> list[str] | None:
    """What git neither has nor ignores, without output; repositories in it end with a slash."""
    found = _git(directory, "ls-files", "-z", *_OTHERS)
    if found is None:
        return None
    made = functools.cache(lambda folder: is_output(directory / folder))
    return [
        name
        for name, parts in ((name, name.split("/")) for name in found.split("\0") if name)
        if not any(made("/".join(parts[:depth])) for depth in range(1, len(parts)))
    ]


def is_output(path: Path) -> bool:
    """Whether it is made from other files: by sweeps, by Python, or as a virtual environment."""
    if path.name in _OUTPUT or path.suffix in _MADE:
        return True
    return (path / "pyvenv.cfg").exists() or (path / "ledger.db").exists()


# --- where trials run ------------------------------------------------------------------------------------------


def frozen(spec: SweepSpec) -> SweepSpec:
    """The record by which trials run here: from the frozen source, in the working directory of the submission."""
    if spec.source is None:  # of an older version
        return spec
    here = _led_to(spec, Path(spec.source.folder))
    return here.model_copy(update={"task": here.task.model_copy(update={"cwd": spec.task.cwd})})


def relocated(spec: SweepSpec, folder: Path, directory: Path) -> SweepSpec:
    """The same on another machine, with the source in ``folder`` and ``directory`` in the place of the sweep's."""
    assert spec.source is not None
    data = data_in(spec.data, spec.source.roots, folder)
    return _led_to(spec, folder).model_copy(update={"directory": str(directory), "data": data})


def data_in(found: Mapping[str, Data], roots: Sequence[str], folder: Path) -> dict[str, Data]:
    """Data, of which those that belong to the source of some roots are read from its frozen copy in a folder."""
    moved = _places(roots, folder)
    uris = {name: _moved(each.uri, moved) for name, each in found.items()}
    return {
        name: each.model_copy(update={"uri": uris[name]}) if Path(uris[name]).exists() else each
        for name, each in found.items()
    }


def _places(roots: Sequence[str], folder: Path) -> dict[str, str]:
    return {root: str(folder / str(number)) for number, root in enumerate(roots)}


def _led_to(spec: SweepSpec, folder: Path) -> SweepSpec:
    assert spec.source is not None
    if not folder.is_dir():
        raise SweepError(f"the frozen source of sweep '{spec.name}' is gone: there is no {folder}")
    moved = _places(spec.source.roots, folder)
    for path in moved.values():
        Path(path).mkdir(exist_ok=True)  # one without files
    task, composition = spec.task, spec.composition
    search_path = tuple(
        (provider, _SCHEME * path.startswith(_SCHEME) + _moved(path.removeprefix(_SCHEME), moved))
        for provider, path in composition.search_path
    )
    return spec.model_copy(update={
        "task": task.model_copy(update={
            "file": None if task.file is None else _moved(task.file, moved),
            "cwd": _moved(task.cwd, moved),
            "sys_path": tuple(_moved(path, moved) for path in task.sys_path),
        }),
        "composition": composition.model_copy(update={"search_path": search_path}),
    })  # fmt: skip


def roots(spec: SweepSpec) -> list[Path]:
    """The folders that the task is run from; none of them lies in another.

    These are its working directory, those of its module and on its path, and those on Hydra's search path, without
    what belongs to the interpreter.
    """
    given = {spec.task.cwd, *spec.task.sys_path}
    given.update(path.removeprefix(_SCHEME) for _, path in spec.composition.search_path)
    if spec.task.file is not None:
        given.add(str(Path(spec.task.file).parent))
    installed = {Path(sys.prefix), Path(sys.base_prefix), _OURSELVES}
    folders = {
        path
        for path in map(Path, given)
        if path.is_absolute() and path.is_dir() and not installed & {path, *path.parents}
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
            ["git", "-C", str(directory), *command], capture_output=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return os.fsdecode(done.stdout)
