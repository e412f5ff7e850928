"""What SLURM says of jobs: its commands, asked with patience and with an end, and what their answers mean."""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
from dataclasses import dataclass

_COMMAND_S = 60.0
_SHORT_S = 5.0
_DEFAULT_ARRAY = 1001
STOPPED = frozenset({"SUSPENDED", "STOPPED"})
"""The states of jobs that stand still until the cluster lets them go on."""
EVICTED = frozenset({"TIMEOUT", "PREEMPTED", "DEADLINE", "REVOKED"})
"""The states of jobs that the cluster has ended."""
LOST = frozenset({"NODE_FAIL", "BOOT_FAIL"})
"""Those of jobs that ended with a node."""
ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "OUT_OF_MEMORY"}) | EVICTED | LOST
"""Those of all jobs that have ended, by squeue's manual; whatever else it says, a job lives."""
_OWN_OPTIONS = ("SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_")
"""What these commands' variables begin with, by which a user changes what they say by hand."""
SQUEUE_FORMAT = "--format=%j|%F|%K|%T"
SACCT_FORMAT = "--format=JobName,JobID,State"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """What squeue or sacct says of a job: its name, the id of its array or its own, its index there, its state."""

    name: str
    array: str
    index: int
    state: str


def queued(text: str) -> list[Job]:
    """The lines of ``squeue --noheader --array`` with :data:`SQUEUE_FORMAT`."""
    found = []
    for line in text.splitlines():
        name, array, index, state = line.rsplit("|", 3)
        found.append(Job(name.strip(), array, int(index) if index.isdigit() else 0, state.split()[0]))
    return found


def accounted(text: str) -> list[Job]:
    """The lines of ``sacct --noheader --allocations --parsable2`` with :data:`SACCT_FORMAT`."""
    found = []
    for line in text.splitlines():
        name, job, state = line.rsplit("|", 2)
        array, _, index = job.partition("_")
        first, _, last = index.strip("[]").partition("%")[0].partition("-")
        if not index:
            found.append(Job(name, array, 0, state.split()[0]))
        elif first.isdigit() and (not last or last.isdigit()):  # tasks that have not begun are one line
            found += [
                Job(name, array, i, state.split()[0]) for i in range(int(first), int(last or first) + 1)
            ]
    return found


def largest_array() -> int:
    """How many tasks a job array may have here: SLURM's default where the controller does not say."""
    text = ask("scontrol", "show", "config", timeout_s=_SHORT_S) or ""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
    return max(1, int(found[1]) if found else _DEFAULT_ARRAY)  # the largest index is one less


def ask(*command: str, timeout_s: float = _COMMAND_S) -> str | None:
    """What one of SLURM's commands says; None where it fails or does not answer in time."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL,
            env={
                **{key: value for key, value in os.environ.items() if not key.startswith(_OWN_OPTIONS)},
                "SLURM_TIME_FORMAT": "standard",
            },
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("%s: %s", command[0], error)
        return None
    if done.returncode:
        log.warning("%s: %s", shlex.join(command), " ".join(done.stderr.split()))
        return None
    return done.stdout
