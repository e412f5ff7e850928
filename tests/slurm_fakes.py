"""SLURM's commands as they are when something goes wrong on the way to the controller."""

from __future__ import annotations

import shutil
from pathlib import Path

NO_ANSWER = """
echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2
exit 1
"""


def with_fake(command: str, path: str, folder: Path, script: str) -> dict[str, str]:
    """An environment in which one of SLURM's commands is a shell script that notes its calls.

    ``sbatch --test-only`` is still the real one's.
    """
    real = shutil.which(command, path=path)
    assert real is not None
    fake = folder / "bin" / command
    fake.parent.mkdir()
    judge = 'case "$*" in *--test-only*) exec "$REAL" "$@";; esac'
    fake.write_text(f'#!/bin/sh\n{judge}\necho "$(date +%s.%N) $*" >>"$CALLS"\n{script}')
    fake.chmod(0o755)
    return {"PATH": f"{fake.parent}:{path}", "REAL": real, "CALLS": str(folder / "calls")}


def calls(folder: Path) -> list[str]:
    """The calls of the command that is a fake in a folder: when, in seconds, and with what."""
    return (folder / "calls").read_text().splitlines()
