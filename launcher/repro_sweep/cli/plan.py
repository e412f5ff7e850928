"""``repro-sweep plan OVERRIDE...``: the trials that would run; nothing is started or written."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from repro_sweep.executors import base as executors
from repro_sweep.submission import Submission

HELP = """\
repro-sweep plan OVERRIDE...

Expands, composes and checks a sweep as 'repro-sweep OVERRIDE...' would, and shows its trials, how many are done
already, and what it would run on. Nothing is started or written.
"""
_SHOWN = 50


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    if not arguments or arguments[0] in ("--help", "-h"):
        print(HELP, end="")
        return 0
    from repro_sweep.cli import sweep

    return sweep.main(arguments, forced=("hydra.sweeper.plan=true",))


def show(submission: Submission) -> int:
    """Print the plan of a prepared sweep; returns the exit status."""
    spec = submission.spec
    total = submission.to_run + submission.done + submission.cancelled
    print(f"sweep       {spec.name}: {total} trials ({spec.task.name})")
    if spec.metric is not None:
        print(f"metric      {spec.metric} ({spec.direction})")
    print(f"to run      {submission.to_run}")
    print(f"done        {submission.done}")
    if submission.cancelled:
        print(f"cancelled   {submission.cancelled}")
    if submission.duplicates:
        print(f"duplicates  {submission.duplicates} points have the config of another one")
    print(f"resources   {_resources(submission)}")
    print(f"runs on     {executors.create(spec).describe()} (sweep/executor={spec.executor_name})")
    print(f"directory   {spec.directory}")
    print(f"MLflow      {spec.tracking.uri}, experiment {spec.tracking.experiment}")
    if submission.again:
        numbers = ", ".join(map(str, submission.again[:20])) + (", …" if len(submission.again) > 20 else "")
        print(f"again       trials {numbers}: unfinished or failed")
    for trial in submission.new[:_SHOWN]:
        print(f"  {trial.number:>6}  {' '.join(trial.overrides)}")
    if len(submission.new) > _SHOWN:
        print(f"          … and {len(submission.new) - _SHOWN} more")
    sys.stdout.flush()
    return 0


def _resources(submission: Submission) -> str:
    resources = submission.spec.resources
    parts = [f"{resources.cpus:g} CPUs", f"{resources.gpus:g} GPUs"]
    if resources.mem_gb is not None:
        parts.append(f"{resources.mem_gb:g} GB")
    return ", ".join(parts) + " a trial"
