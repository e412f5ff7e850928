"""The recorded Python environment, built again with venv and pip."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from helpers import environment as clean

from repro_sweep.errors import SweepError
from repro_sweep.provenance import environment, venv
from repro_sweep.provenance.environment import Environment, Package


def wanted(packages: dict[str, str], python: str | None = None) -> Environment:
    """An environment of this Python with some packages."""
    here = environment.inspect()
    found = {name: Package(version=version) for name, version in packages.items()}
    return here.model_copy(update={"packages": found, "python": python or here.python})


def test_packages_have_the_recorded_versions(tmp_path: Path) -> None:
    """Older ones than pip would choose, and repro-sweep itself."""
    python = venv.build(wanted({"packaging": "24.0", "colorlog": "6.8.0"}), tmp_path / "venv")
    code = "import importlib.metadata as m; print(*(m.version(n) for n in ('packaging', 'colorlog', 'repro-sweep')))"
    said = subprocess.run(
        [python, "-c", code], env=clean(), capture_output=True, text=True, check=True
    ).stdout
    assert said.split()[:2] == ["24.0", "6.8.0"]
    assert len(said.split()) == 3


def test_a_package_that_is_not_to_be_had_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        SweepError, match=r"--env: the recorded packages cannot be installed: ERROR: .*packaging==0\.0\.1"
    ):
        venv.build(wanted({"packaging": "0.0.1"}), tmp_path / "venv")


def test_another_python_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(
        SweepError, match=r"^--env: there is no Python 3\.9\.99 here, with which the trial ran$"
    ):
        venv.build(wanted({}, python="3.9.99"), tmp_path / "venv")
    assert not (tmp_path / "venv").exists()
