"""Every error that repro-sweep raises.

::

    ReproSweepError
    ├── UserError              one line to the user, exit code 2
    │   ├── SpaceError         the space of a sweep cannot be expanded
    │   ├── CompositionError   Hydra cannot compose the config of a trial
    │   ├── TaskError          the task cannot be imported or called
    │   ├── SweepError         the sweep's options or directory cannot be used
    │   └── TrackingError      the MLflow URI or what is asked of it cannot be used
    ├── LedgerError            the ledger cannot be read or written
    │   ├── LeaseLostError     another coordinator has taken the sweep over; nothing was written
    │   └── UnwritableError    the disk is full or broken for now; nothing was written
    └── ProtocolError          a worker and its coordinator do not understand each other
    TrialPruned                raised in a trial by ``report``; not a failure
    TrialInterrupted           raised in a trial by ``report``: its worker's time is over, another one goes on with it

Errors of other libraries are mapped to these where they enter. A bug is none of them and keeps its traceback.
"""

from __future__ import annotations


class ReproSweepError(Exception):
    """Base of all errors of repro-sweep."""


class UserError(ReproSweepError):
    """What the user asked for cannot be done; the message says what, where, and what is allowed."""


class SpaceError(UserError):
    """The space of a sweep cannot be expanded."""


class CompositionError(UserError):
    """Hydra cannot compose the config of a trial."""


class TaskError(UserError):
    """The task function cannot be imported or called."""


class SweepError(UserError):
    """The options or the directory of a sweep cannot be used."""


class TrackingError(UserError):
    """The MLflow tracking URI, or what is asked of it, cannot be used."""


class LedgerError(ReproSweepError):
    """The ledger cannot be read or written."""


class LeaseLostError(LedgerError):
    """Another coordinator has taken the sweep over; nothing was written."""


class UnwritableError(LedgerError):
    """The disk is full, or cannot be written for now; nothing was written."""


class ProtocolError(ReproSweepError):
    """A worker and its coordinator do not understand each other."""


class TrialInterrupted(Exception):  # noqa: N818  (no error)
    """Raised by :func:`repro_sweep.report` in a trial whose worker must leave; it goes on elsewhere.

    Let it pass, after a checkpoint if there is none of this step yet: some seconds later the trial is killed.
    """


class TrialPruned(Exception):  # noqa: N818  (Optuna's name)
    """Raised by :func:`repro_sweep.report` in a trial that is not worth going on with."""
