"""Where a worker's trials run, as far as that matters to the worker: a machine that sees the sweep's directory."""

from __future__ import annotations

import contextlib

from repro_sweep import protocol
from repro_sweep.provenance import source
from repro_sweep.sweep import SweepSpec
from repro_sweep.worker.link import Link


class Site:
    """A machine that sees the sweep's directory: nothing has to be brought there, or back."""

    def settle(self, link: Link, spec: str) -> str:
        """The sweep's record as it holds here.

        Raises:
            SweepError: the sweep cannot run here.
            CoordinatorLostError: the worker has given up.
        """
        del link
        return source.frozen(SweepSpec.model_validate_json(spec)).model_dump_json()

    def placed(self, assignment: protocol.Assignment) -> protocol.Assignment:
        """An assignment with the directory that the trial has here."""
        return assignment

    def visit(
        self, assignment: protocol.Assignment, link: Link, spec: SweepSpec
    ) -> contextlib.AbstractContextManager[None]:
        """What surrounds the run of an assignment that was placed here.

        Raises:
            CheckpointError: on entry, what an earlier attempt has left cannot be had.
        """
        del assignment, link, spec
        return contextlib.nullcontext()

    def why_no_mlflow(self, spec: SweepSpec) -> str | None:
        """Why trials cannot log to MLflow by themselves here."""
        del spec
        return None
