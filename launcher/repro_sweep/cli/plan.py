"""``repro-sweep plan OVERRIDE...``: the trials that would run; nothing is started or written."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

from repro_sweep.executors import base as executors
from repro_sweep.points import Categorical, Domain, IntRange
from repro_sweep.submission import Submission
from repro_sweep.sweep import Budget, SearchSpec

HELP = """\
repro-sweep plan OVERRIDE...

Expands, composes and checks a sweep as 'repro-sweep OVERRIDE...' would, and shows its trials, how many are done
already, and what it would run on: with sweep/executor=slurm also the job script, after the cluster was asked whether
it can run that. Nothing is started, submitted or written.
"""
_SHOWN = 50
_SHOWN_CHOICES = 8


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
    if spec.search is None:
        total = submission.to_run + submission.done + submission.cancelled
        print(f"sweep       {spec.name}: {total} trials ({spec.task.name})")
    else:
        print(f"sweep       {spec.name}: a search ({spec.task.name})")
    if spec.metric is not None:
        metrics = ", ".join(f"{each.metric} ({each.direction})" for each in spec.all_objectives)
        print(f"metric      {metrics}")
    if spec.search is None:
        print(f"to run      {submission.to_run}")
    else:
        _show_search(submission, spec.search)
    print(f"done        {submission.done}")
    if submission.cancelled:
        print(f"cancelled   {submission.cancelled}")
    if submission.duplicates:
        print(f"duplicates  {submission.duplicates} points have the config of another one")
    print(f"resources   {_resources(submission)}")
    print(f"runs on     {executors.create(spec).describe()} (sweep/executor={spec.executor_name})")
    for note in submission.outlook.notes:
        print(f"            {note}")
    print(f"directory   {spec.directory}")
    print(f"MLflow      {spec.tracking.uri}, experiment {spec.tracking.experiment}")
    if submission.again:
        numbers = ", ".join(map(str, submission.again[:20])) + (", …" if len(submission.again) > 20 else "")
        print(f"again       trials {numbers}: unfinished or failed")
    for trial in submission.new[:_SHOWN]:
        print(f"  {trial.number:>6}  {' '.join(trial.overrides)}")
    if len(submission.new) > _SHOWN:
        print(f"          … and {len(submission.new) - _SHOWN} more")
    if submission.outlook.script:
        print(f"job script\n{textwrap.indent(submission.outlook.script.rstrip(), '  | ', lambda _: True)}")
    sys.stdout.flush()
    return 0


def _show_search(submission: Submission, search: SearchSpec) -> None:
    spec = submission.spec
    pruner = "" if spec.pruner is None else f", pruned by {spec.pruner.name}"
    print(f"sampler     {search.sampler.name} (seed {search.seed}){pruner}")
    print(f"until       {_budget(search.budget)}")
    if submission.begin is not None and submission.begin["known"]:
        print(f"known       {len(submission.begin['known'])} points from elsewhere")
    width = max((len(parameter.name) for parameter in submission.parameters), default=0)
    for parameter in submission.parameters:
        print(f"  {parameter.name:<{width}}  {_domain(parameter.domain)}")
    for notice in submission.notices:
        print(f"note        {notice}")


def _budget(budget: Budget) -> str:
    parts = {
        "{} trials": budget.trials,
        "{} h": budget.hours,
        "the target {}": budget.target,
        "{} points in a row that are no better": budget.plateau,
    }
    return ", or ".join(text.format(f"{value:g}") for text, value in parts.items() if value is not None)


def _domain(domain: Domain) -> str:
    if isinstance(domain, Categorical):
        shown = ", ".join(str(choice) for choice in domain.choices[:_SHOWN_CHOICES])
        return shown if len(domain.choices) <= _SHOWN_CHOICES else f"{shown}, … ({len(domain.choices)})"
    kind = "integers" if isinstance(domain, IntRange) else "numbers"
    log = ", logarithmic" if domain.log else ""
    step = f" in steps of {domain.step:g}" if domain.step not in (None, 1) else ""
    return f"{kind} from {domain.low:g} to {domain.high:g}{step}{log}"


def _resources(submission: Submission) -> str:
    resources = submission.spec.resources
    parts = [f"{resources.cpus:g} CPUs", f"{resources.gpus:g} GPUs"]
    if resources.mem_gb is not None:
        parts.append(f"{resources.mem_gb:g} GB")
    text = ", ".join(parts)
    return f"{resources.nodes} nodes a trial, each with {text}" if resources.nodes > 1 else f"{text} a trial"
