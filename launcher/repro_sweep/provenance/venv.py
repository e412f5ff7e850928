"""Builds the environment that a trial had: a virtual environment with its Python and the packages of its lock."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from repro_sweep.errors import SweepError
from repro_sweep.provenance.environment import Environment, editable_folder

_OURSELVES = "repro-sweep"
_TIMEOUT_S = 3600


def build(wanted: Environment, folder: Path) -> Path:
    """Make a virtual environment in a folder; returns its Python.

    Packages come from where pip is configured to look. repro-sweep itself, if it was installed to be edited, comes from
    where this one lies.

    Raises:
        SweepError: there is no such Python, or a package cannot be installed.
    """
    python = _python(wanted)
    _run([python, "-m", "venv", str(folder)], "the virtual environment cannot be made")
    made = folder / "bin" / "python"
    lock = folder / "requirements.txt"
    lock.write_text(wanted.lock(), encoding="utf-8")
    pip = [str(made), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # Python compiles what is imported, which is a small part of it
    install = [*pip, "install", "--no-deps", "--no-compile"]
    _run([*install, "--requirement", str(lock)], "the recorded packages cannot be installed")
    ours = wanted.packages.get(_OURSELVES)
    if ours is None or ours.editable is not None:
        here = editable_folder(metadata.distribution(_OURSELVES))
        what = ["--editable", here] if here is not None else [f"{_OURSELVES}=={metadata.version(_OURSELVES)}"]
        _run([*install, *what], "repro-sweep cannot be installed")
    came_along = [name for name in ("setuptools", "pip") if name not in wanted.packages]
    if came_along:
        _run([*pip, "uninstall", "--yes", *came_along], "what was not there cannot be removed")
    return made


def _python(wanted: Environment) -> str:
    minor = ".".join(wanted.python.split(".")[:2])
    for name in (sys.executable, f"python{minor}", "python3", "python"):
        path = shutil.which(name)
        if path is not None and _version(path) == wanted.python:
            return path
    raise SweepError(f"--env: there is no Python {wanted.python} here, with which the trial ran")


def _version(python: str) -> str:
    code = "import platform; print(platform.python_version())"
    try:
        return subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _run(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise SweepError(f"--env: {what}: {error}") from error
    if done.returncode != 0:
        lines = (
            [line for line in done.stderr.splitlines() if "ERROR" in line]
            or done.stderr.splitlines()
            or ["?"]
        )
        raise SweepError(f"--env: {what}: {lines[0].strip()}")
