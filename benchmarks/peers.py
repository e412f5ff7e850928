"""Virtual environments of peers that cannot be installed beside us, because of what they pin; made once and kept."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness

_TIMEOUT_S = 600.0


def python(cache: Path, name: str, packages: Sequence[str]) -> Path:
    """The interpreter of an environment, which is made in ``cache`` if it is not there; needs a package index."""
    wanted = hashlib.sha256("\n".join((sys.version, *packages)).encode()).hexdigest()[:12]
    folder = cache / f"{name}-{wanted}"
    interpreter, complete = folder / "bin/python", folder / "complete"
    if not complete.exists():
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        _run([str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages])
        complete.touch()
    return interpreter


def _run(command: list[str]) -> None:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise harness.BenchmarkError(f"{' '.join(command)}: not over in {_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        raise harness.BenchmarkError(f"{' '.join(command)}: status {done.returncode}\n{done.stderr[-3000:]}")
