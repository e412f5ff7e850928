"""The coordinator of a detached sweep as a job: submitted, looked for, cancelled.

Which job that is stands in ``coordinator-job.json`` in the sweep's directory. Its name is written down before it is
submitted, so that one whose submission was not answered is found all the same. Whether it coordinates is another
question, which the sweep's lease answers.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shlex
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from repro_sweep import jobs
from repro_sweep.errors import SweepError
from repro_sweep.executors import base as executors
from repro_sweep.spool import write_file
from repro_sweep.submitting import Submission, TooManyJobsError, UnansweredError
from repro_sweep.sweep import SweepSpec

RECORD = "coordinator-job.json"
FOLDER = "slurm"
KEEPER = "repro_sweep.cli.keeper"
UNKNOWN = "UNKNOWN"
_FORMAT = "--format=%A|%T|%r"
_ANSWER_S = 20.0
_FOUND_S = 60.0
_END_S = 90.0
_LOOK_S = 0.5
_ENDING = "COMPLETING"
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorJob:
    """A job that has not ended: its id, SLURM's word for its state, and why it waits, if it does.

    The state is :data:`UNKNOWN` where SLURM does not answer.
    """

    id: str
    state: str
    reason: str = ""

    @property
    def waits(self) -> bool:
        """Whether it has not been started."""
        return self.state == "PENDING"

    def describe(self) -> str:
        """Its id and its state, in a few words."""
        return f"job {self.id} ({self.state}{f', {self.reason}' if self.waits and self.reason else ''})"


def submit(spec: SweepSpec) -> str:
    """Submit the coordinator of a sweep; returns the job's id.

    Raises:
        SweepError: SLURM refuses it, or does not say whether it has it.
    """
    parameters = executors.coordinator_job(spec)
    if parameters is None:
        raise SweepError(f"sweep.detach: sweep/executor={spec.executor_name} submits no jobs")
    directory = Path(spec.directory)
    name = f"{_UNSAFE.sub('-', spec.name)}.coordinator.{uuid.uuid4().hex[:10]}"
    submission = Submission(directory / FOLDER, {**parameters, "job_name": name})
    write_file(directory / RECORD, json.dumps({"name": name, "job": None}))
    command = "exec " + shlex.join([sys.executable, "-P", "-m", KEEPER, "--directory", str(directory)])
    try:
        job = submission.submit(command)
    except TooManyJobsError as error:
        raise SweepError(f"sweep.detach: SLURM takes no more jobs of yours for now: {error}") from error
    except UnansweredError as error:
        found = _await_known(directory)
        if found is None:
            raise SweepError(
                f"sweep.detach: SLURM does not say whether it has the coordinator's job {name} ({error});"
                " 'repro-sweep status' finds out"
            ) from error
        job = found
    write_file(directory / RECORD, json.dumps({"name": name, "job": job}))
    return job


def output(directory: Path, job: str) -> Path:
    """What the coordinator says: a file for the job's whole life, however often it starts again."""
    return directory / FOLDER / f"{job}_0_log.out"


def find(directory: Path) -> CoordinatorJob | None:
    """The job of a sweep's coordinator; None where there is none, or none any more."""
    name, job = _recorded(directory)
    if name is None or job == os.environ.get("SLURM_JOB_ID", ""):
        return None
    said = jobs.ask(
        "squeue", "--noheader", f"--user={getpass.getuser()}", f"--name={name}", _FORMAT, timeout_s=_ANSWER_S
    )
    if said is None:
        return CoordinatorJob(id=job or name, state=UNKNOWN)
    for line in said.splitlines():
        number, state, reason = line.split("|", 2)
        if state != _ENDING:
            return CoordinatorJob(id=number, state=state, reason="" if reason == "None" else reason)
    return None


def cancel(directory: Path) -> bool:
    """Cancel the coordinator's job, whether it waits or runs; returns whether it has ended, within some time."""
    name, _ = _recorded(directory)
    if name is None:
        return True
    jobs.ask("scancel", f"--user={getpass.getuser()}", f"--name={name}", timeout_s=_ANSWER_S)
    return await_end(directory, _END_S)


def await_end(directory: Path, timeout_s: float) -> bool:
    """Wait until the coordinator's job has ended; returns whether it has within the time."""
    deadline = time.monotonic() + timeout_s
    while find(directory) is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True


def refusal(job: CoordinatorJob, name: str) -> SweepError:
    """Why nobody else may run a sweep."""
    how = "waits to be run by" if job.waits else "is run by"
    return SweepError(
        f"sweep '{name}' {how} {job.describe()}; watch it with 'repro-sweep attach {name}',"
        f" stop it with 'repro-sweep cancel {name}'"
    )


def _recorded(directory: Path) -> tuple[str | None, str | None]:
    try:
        record = json.loads((directory / RECORD).read_text())
        return record["name"], record["job"]
    except (OSError, ValueError, KeyError):
        return None, None


def _await_known(directory: Path) -> str | None:
    deadline = time.monotonic() + _FOUND_S
    while time.monotonic() < deadline:
        found = find(directory)
        if found is not None and found.state != UNKNOWN:
            return found.id
        time.sleep(_LOOK_S * 4)
    return None
