"""Submits commands to SLURM through submitit; the only module that imports it."""

from __future__ import annotations

import math
import os
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repro_sweep.errors import SweepError

_UNSURE = (
    "Socket timed out",
    "Unable to contact slurm controller",
    "Zero Bytes were transmitted",
    "onnection",  # with a capital or not, it has failed, was refused, or reset
    "Message receive failure",
)
"""What sbatch says where the controller may have the job all the same."""


_FULL = (
    "MaxSubmitJob",
    "GrpSubmitJob",
    "MaxJobCount",
    "temporarily unable to accept job",
    "Resource temporarily unavailable",
)
"""What it says where the user, or all users, have as many jobs as are allowed."""
_ANSWER_S = 120.0


class TooManyJobsError(Exception):
    """SLURM takes no more jobs, or not so many, for now."""


class UnansweredError(Exception):
    """Whether a submission has worked is not known."""


_SCRIPTS_OWN = frozenset(
    f"SBATCH_{name}"
    for name in (
        "JOB_NAME", "TIMELIMIT", "SIGNAL", "REQUEUE", "NO_REQUEUE", "OUTPUT", "ERROR", "WAIT", "ARRAY_INX",
        "OPEN_MODE", "EXPORT", "GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK", "MEM_PER_CPU", "MEM_PER_GPU",
    )
)  # fmt: skip
"""sbatch takes these variables of the user's before what the script says, which it says for good reasons."""


def _outside(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment for sbatch with nothing of the job that this process runs in, nor what undoes the script."""
    inside = ("SLURM_", "SLURMD_") if "SLURM_JOB_ID" in environ else ()
    return {
        key: value
        for key, value in environ.items()
        if key not in _SCRIPTS_OWN and (key == "SLURM_CONF" or not key.startswith(inside))
    }


def _in_slurms_words(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """submitit's executor for SLURM alone wants memory as SLURM does."""
    rest = {key: value for key, value in parameters.items() if key != "mem_gb"}
    return rest | ({"mem": f"{math.ceil(1024 * parameters['mem_gb'])}M"} if "mem_gb" in parameters else {})


class Submission:
    """submitit's executor for one command, without its pickles: a lost reply must not cost a job its task.

    Args:
        folder: for the sbatch script and the jobs' output, on a file system that the nodes share.
        parameters: submitit's own, and ``mem_gb``.

    Raises:
        SweepError: there is no SLURM here, or submitit refuses a parameter.
    """

    def __init__(self, folder: Path, parameters: dict[str, Any]) -> None:
        import submitit

        self._folder = folder
        slurm: Any = submitit.SlurmExecutor
        try:
            self._executor = slurm(folder, max_num_timeout=0)
            self._executor.update_parameters(**_in_slurms_words(parameters))
        except RuntimeError as error:
            raise SweepError(f"sweep/executor=slurm: there is no SLURM here: {error}") from error
        except (ValueError, TypeError) as error:
            raise SweepError(f"sweep.executor: {' '.join(str(error).split())}") from error

    def script(self, command: str, count: int = 1) -> str:
        """What sbatch gets for ``count`` jobs."""
        return str(self._prepared(count)._make_submission_file_text(command, ""))

    def submit(self, command: str, count: int = 1) -> str:
        """Submit ``count`` jobs, as an array if there are several; returns the array's id, or the only job's.

        Raises:
            SweepError: SLURM refuses them.
            TooManyJobsError: so many are not allowed for now.
            UnansweredError: it may have them.
        """
        from submitit.core.utils import FailedSubmissionError

        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._folder / f".submission_{uuid.uuid4().hex}.sh"
        path.write_text(self.script(command, count))
        try:
            job = str(self._executor._get_job_id_from_submission_command(_sbatch(path)))
        except FailedSubmissionError as error:
            raise UnansweredError(" ".join(str(error).split())) from error
        path.rename(self._folder / f"{job}_submission.sh")
        return job

    def _prepared(self, count: int) -> Any:
        if count > 1:
            self._executor.parameters["map_count"] = count  # as submitit itself does for an array
        return self._executor


def _sbatch(script: Path) -> str:
    """What sbatch says of a job that it has taken; submitit's own call would print its complaints."""
    try:
        done = subprocess.run(
            ["sbatch", str(script)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ANSWER_S,
            check=False, env=_outside(os.environ),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise UnansweredError(f"sbatch says nothing for {_ANSWER_S:g} s") from error
    except OSError as error:
        raise SweepError(f"sweep/executor=slurm: sbatch: {error}") from error
    if not done.returncode:
        return done.stdout
    text = "; ".join(line.removeprefix("sbatch: error: ").strip() for line in done.stderr.splitlines())
    if any(each in text for each in _UNSURE):
        raise UnansweredError(text)
    if any(each in text for each in _FULL):
        raise TooManyJobsError(text)
    raise SweepError(f"sweep/executor=slurm: {text}")
