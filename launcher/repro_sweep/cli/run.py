"""Prepares the sweep that Hydra has composed, and runs it in this process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.types import TaskFunction
from omegaconf import DictConfig

from repro_sweep import task
from repro_sweep.cli import optuna_results
from repro_sweep.cli import plan as planning
from repro_sweep.cli.main import INTERRUPTED, fail, say
from repro_sweep.cli.sweep import command_line, named_by_sweep
from repro_sweep.errors import ReproSweepError, SweepError
from repro_sweep.executors import base as executors
from repro_sweep.ledger import FILE_NAME, Ledger
from repro_sweep.provenance import bundle, snapshot
from repro_sweep.submission import Submission, prepare
from repro_sweep.sweep import SweepSpec


def main(
    config: DictConfig, loader: ConfigLoader, arguments: Sequence[str], function: TaskFunction, *, plan: bool
) -> int:
    """Prepare and run the sweep that Hydra composed; returns the exit status."""
    try:
        launcher = config.hydra.runtime.choices.get("hydra/launcher")
        if launcher not in (None, "basic"):
            say(f"hydra/launcher={launcher} is not used: sweep/executor says where trials run")
        found = None if function is named_by_sweep else task.from_function(function)
        submission = prepare(config, loader, arguments, found, command_line())
        return planning.show(submission) if plan else run(submission)
    except ReproSweepError as error:
        return fail(str(error))
    except KeyboardInterrupt:  # outside of the sweep itself: while it is prepared, or summed up
        return INTERRUPTED


def run(submission: Submission) -> int:
    """Run a prepared sweep; returns the exit status.

    Raises:
        ReproSweepError: it cannot be started, or cannot go on.
    """
    # it needs uvicorn, for which what is refused, or only shown, need not wait
    from repro_sweep.cli import session, summary
    from repro_sweep.cli.uploading import check_access

    spec = submission.spec
    if os.environ.get(session.KEPT) != session.AGAIN:  # then its workers may run already
        check_access(spec.tracking)
    directory = Path(spec.directory)
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SweepError(f"hydra.sweep.dir: {directory} cannot be used: {error}") from error
    spec, frozen = snapshot.freeze(spec)
    exists = (directory / FILE_NAME).exists()
    if exists:
        spec = _with_the_source_that_it_has(spec)
    spec = bundle.identified(spec)
    submission = replace(submission, spec=spec)
    for name, why in frozen.left_out.items():
        if "max_mb" in why:
            say(f"not frozen: {name.partition('/')[2]}, {why}")
    spread = executors.is_spread(spec)
    ledger = Ledger.open(directory) if exists else Ledger.create(directory, spec, shared=spread)
    job = os.environ.get("SLURM_JOB_ID", "") if session.is_kept() else ""
    again = os.environ.get(session.KEPT) == session.AGAIN

    def record(ledger: Ledger) -> None:
        if again and ledger.meta("job") == job:  # this job's own command: the sweep goes on as it is
            say(f"goes on: {summary.tally(ledger)}")
            return
        ledger.set_meta("job", job)
        submission.record(ledger)
        for notice in (*submission.notices, *submission.outlook.notes):
            say(notice)
        if spec.search is None:
            _say_what_is_done(submission)
        else:
            _say_what_is_known(submission)

    if spec.detach:
        return session.submit(ledger, spec.name, record)
    code = session.run(ledger, spec.name, record)
    if submission.for_optuna_sweeper:
        optuna_results.write(directory)
    return code


def _with_the_source_that_it_has(spec: SweepSpec) -> SweepSpec:
    """A sweep that goes on keeps its source if the code is the same, whatever trials have written beside it."""
    ledger = Ledger.open(Path(spec.directory), readonly=True)
    try:
        had = ledger.spec.source
    finally:
        ledger.close()
    new = spec.source
    if had is None or new is None or had.roots != new.roots:
        return spec
    if not snapshot.has_same_code(Path(had.folder), Path(new.folder)):
        return spec
    return spec.model_copy(update={"source": had})


def _say_what_is_known(submission: Submission) -> None:
    known = len(submission.begin["known"]) if submission.begin is not None else 0
    if known:
        say(f"the search begins with {known} points that are known already")
    if submission.done:
        again = f", {submission.to_run} to run again" if submission.to_run else ""
        say(f"the search goes on: {submission.done} trials are done already{again}")


def _say_what_is_done(submission: Submission) -> None:
    done, cancelled = submission.done, submission.cancelled
    total = done + submission.to_run + cancelled
    note = f", {cancelled} cancelled" if cancelled else ""
    if submission.to_run == 0:
        say(f"{done} of {total} trials are complete already{note}; nothing to run")
    elif done or cancelled:
        say(f"{done} of {total} trials are complete already{note}, {submission.to_run} to run")
