"""A worker that runs as a SLURM job, or as one of its tasks: takes stock of what the job was given, and works.

It must use nothing of the node that its job was not given: where SLURM does not confine jobs, all of it can be seen.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from repro_sweep import host, machine
from repro_sweep.errors import SweepError
from repro_sweep.machine import Machine
from repro_sweep.spool import worker_directory
from repro_sweep.sweep import Resources
from repro_sweep.worker.agent import Agent
from repro_sweep.worker.ranks import team_of

_COMMAND_S = 20.0
_MARGIN_S = 5.0

log = logging.getLogger(__name__)


def inspect(environ: Mapping[str, str] = os.environ) -> Machine:
    """What this job may use on this node, by what SLURM has put into its environment."""
    seen = machine.inspect({"CUDA_VISIBLE_DEVICES": environ.get("CUDA_VISIBLE_DEVICES", "")})
    cpus = environ.get("SLURM_CPUS_PER_TASK") or environ.get("SLURM_CPUS_ON_NODE")
    memory_mb = environ.get("SLURM_MEM_PER_NODE")
    return Machine(
        cpus=int(cpus) if cpus else seen.cpus,
        mem_gb=min(seen.mem_gb, int(memory_mb) / 1024) if memory_mb else seen.mem_gb,
        gpus=seen.gpus,
    )


def seconds_left(environ: Mapping[str, str], minutes: float) -> float:
    """How long this job may still run: what squeue says, else its time limit from now on."""
    array, index = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{index}" if array else environ.get("SLURM_JOB_ID", "")
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%L"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=True).stdout
        return duration_s(text.strip())
    except (OSError, subprocess.SubprocessError, ValueError):
        return 60 * minutes


def duration_s(text: str) -> float:
    """Seconds of a duration as SLURM writes it: ``days-hours:minutes:seconds``, shorter where it can.

    Raises:
        ValueError: it is none, such as UNLIMITED or INVALID.
    """
    days, _, rest = text.rpartition("-")
    seconds = 0.0
    for part in rest.split(":"):
        seconds = 60 * seconds + int(part)
    return seconds + 86_400 * int(days or 0)


def main() -> None:
    """Entry point of a worker's job."""
    parser = argparse.ArgumentParser(prog="repro-sweep-slurm-worker")
    parser.add_argument("--directory", required=True, type=Path, help="the sweep's directory")
    parser.add_argument("--batch", required=True, help="what was submitted together")
    parser.add_argument("--cpus", required=True, type=float, help="of a trial")
    parser.add_argument("--gpus", required=True, type=float, help="of a trial")
    parser.add_argument("--mem-gb", type=float, help="of a trial")
    parser.add_argument("--slots", type=int, help="trials at a time")
    parser.add_argument("--nodes", type=int, default=1, help="of a trial")
    parser.add_argument("--minutes", required=True, type=float, help="the job's time limit")
    args = parser.parse_args()
    worker = f"slurm-{args.batch}-{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    directory = worker_directory(args.directory, worker)
    directory.mkdir(parents=True, mode=0o700, exist_ok=True)
    logging.basicConfig(
        format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO,
        handlers=[logging.FileHandler(directory / "worker.log"), logging.StreamHandler()],
    )  # fmt: skip
    ends_at = time.monotonic() + seconds_left(os.environ, args.minutes) - _MARGIN_S
    log.info(
        "job %s on %s",
        os.environ.get("SLURM_JOB_ID"),
        host.name(),
    )
    try:
        slots = machine.slots(
            inspect(), Resources(cpus=args.cpus, gpus=args.gpus, mem_gb=args.mem_gb), args.slots
        )
        team = team_of(args.nodes)
    except SweepError as error:
        log.error("%s", error)  # noqa: TRY400  (one line says it all)
        sys.exit(1)
    sys.exit(0 if Agent(worker, args.directory, None, slots, ends_at=ends_at, team=team).work() else 1)


if __name__ == "__main__":
    main()
