"""Installs what an image needs, in the versions of constraints.txt: ``install.py [--core] EXTRA,...`` or ``--project``.

Packages come from ``docker/wheels`` where there are any, and then nothing is asked of the network; else from
``PIP_INDEX_URL`` or pip's own index. torch comes from ``TORCH_INDEX_URL``, which must be set for it: the build that pip
takes by itself is one for CUDA, of several GB.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "docker" / "wheels"
_NAME = re.compile(r"^\s*([A-Za-z0-9][\w.-]*)\s*(?:\[([^\]]*)\])?")
# nothing that runs needs these: packages' own tests, and Ray's workers in Java
_TESTS_OF = ("matplotlib", "networkx", "numpy", "pandas", "pyarrow", "scipy", "sklearn", "sympy")
_UNUSED = ("ray/jars",)


class InstallError(Exception):
    """Something cannot be installed; the message says what and what to do."""


def main(arguments: list[str] | None = None) -> int:
    """Install; returns the exit status. A user's mistake is one line."""
    parser = argparse.ArgumentParser(prog="install.py", description="Installs what an image needs.")
    parser.add_argument("extras", nargs="?", default="", help="extras of repro-sweep, separated by commas")
    parser.add_argument("--core", action="store_true", help="what repro-sweep itself needs, too")
    parser.add_argument("--project", action="store_true", help="repro-sweep itself, whose needs are there")
    words = parser.parse_args(arguments)
    try:
        if words.project:
            _pip("--no-deps", str(ROOT), env=os.environ)
        else:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            install(requirements(project, _words(words.extras), core=words.core), os.environ)
    except InstallError as error:
        sys.stderr.write(f"install.py: {error}\n")
        return 1
    slim(Path(sysconfig.get_path("purelib")))
    return 0


def requirements(project: Mapping[str, object], extras: Iterable[str], *, core: bool) -> list[str]:
    """What extras need, and with ``core`` the project itself; extras that name others of the same project are resolved.

    Raises:
        InstallError: The project has no such extra.
    """
    found: dict[str, None] = dict.fromkeys(project["dependencies"] if core else ())  # type: ignore[call-overload]
    waiting, seen = list(extras), set()
    offered: Mapping[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        seen.add(extra)
        if extra not in offered:
            raise InstallError(
                f"EXTRAS: '{extra}' is no extra of this project ({', '.join(sorted(offered))})"
            )
        for line in offered[extra]:
            name, more = _parsed(line)
            if name == project["name"]:
                waiting += _words(more)
            else:
                found[line] = None
    return sorted(found)


def install(wanted: list[str], environ: Mapping[str, str]) -> None:
    """Install requirements; torch first, and from its own index.

    Raises:
        InstallError: torch is among them and nothing says which build, or pip fails.
    """
    index = environ.get("TORCH_INDEX_URL", "")
    if any(_parsed(line)[0] == "torch" for line in wanted) and not any(WHEELS.glob("torch-*.whl")):
        if not index:
            raise InstallError(
                "EXTRAS: these need torch, so set TORCH_INDEX_URL to the index of the build that you want, for CPUs or"
                " for a version of CUDA"
            )
        # without what it needs: its index has it in few versions only
        _pip("--no-deps", "--index-url", index, "torch", env=environ)
        _pip("--extra-index-url", index, *wanted, env=environ)
    else:
        _pip(*wanted, env=environ)


def slim(packages: Path) -> None:
    """Remove from packages what nothing needs, and compile the rest: a container keeps nothing that it compiles."""
    folders = [folder for name in _TESTS_OF for folder in _tests(packages / name)]
    for folder in (*folders, *(packages / name for name in _UNUSED)):
        shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "compileall", "-q", "-j", "0", str(packages)], check=False)


def _tests(package: Path) -> Iterator[Path]:
    for folder, children, _ in os.walk(package):
        if "tests" in children:
            children.remove("tests")
            yield Path(folder, "tests")


def _pip(*arguments: str, env: Mapping[str, str]) -> None:
    local = ["--no-index", "--find-links", str(WHEELS)] if any(WHEELS.glob("*.whl")) else []
    command = [sys.executable, "-m", "pip", "install", "--no-cache-dir", "--no-compile", "--progress-bar=off"]
    constraints = str(ROOT / "constraints.txt")
    done = subprocess.run(
        [*command, "--disable-pip-version-check", *local, *arguments],
        # by the environment, as pip gives only this to the isolated environment in which it builds a package
        env={**env, "PIP_CONSTRAINT": constraints, "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    if done.returncode:
        raise InstallError("pip has failed, see above")


def _parsed(requirement: str) -> tuple[str, str]:
    match = _NAME.match(requirement)
    if match is None:
        raise InstallError(f"pyproject.toml: '{requirement}' is no requirement")
    return match[1], match[2] or ""


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


if __name__ == "__main__":
    sys.exit(main())
