"""Submits commands to SLURM through submitit; the only module that imports it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repro_sweep.errors import SweepError

_UNSURE = (
    "Socket timed out",
    "Unable to contact slurm controller",
    "Zero Bytes were transmitted",
    "Connection",
)
"""What sbatch says where the controller may have the job all the same."""


_FULL = (
    "MaxSubmitJob",
    "MaxJobCount",
    "temporarily unable to accept job",
    "Resource temporarily unavailable",
)
"""What it says where the user, or all users, have as many jobs as are allowed."""


class TooManyJobsError(Exception):
    """SLURM takes no more jobs, or not so many, for now."""


class UnansweredError(Exception):
    """Whether a submission has worked is not known."""


def _outside(environ: Mapping[str, str]) -> list[str]:
    """What makes a command see nothing of the job that this process runs in: its options are not the new job's."""
    mine = [key for key in environ if key.startswith(("SLURM_", "SLURMD_")) and key != "SLURM_CONF"]
    return ["env", *(f"--unset={key}" for key in mine)] if "SLURM_JOB_ID" in environ else []


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
            make = self._executor._make_submission_command
            self._executor._make_submission_command = lambda path: [*_outside(os.environ), *make(path)]
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
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            return str(self._prepared(count)._submit_command(command).job_id)
        except FailedSubmissionError as error:
            raise UnansweredError(str(error)) from error
        except FailedJobError as error:
            text = " ".join(str(error).split())
            if any(each in text for each in _UNSURE):
                raise UnansweredError(text) from error
            if any(each in text for each in _FULL):
                raise TooManyJobsError(text) from error
            raise SweepError(f"sweep/executor=slurm: {text}") from error

    def _prepared(self, count: int) -> Any:
        if count > 1:
            self._executor.parameters["map_count"] = count  # as submitit itself does for an array
        return self._executor
