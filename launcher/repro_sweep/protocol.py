"""The messages between workers and their coordinator: JSON over HTTP, one pydantic model each way.

==============  ========================  =======================  ==========================================
path            request                   reply                    meaning
==============  ========================  =======================  ==========================================
/register       :class:`Register`         :class:`Registered`      a worker offers its slots
/claim          :class:`Claim`            :class:`Claimed`         a free slot asks for a trial (waits for one)
/report         :class:`Reports`          :class:`Acknowledged`    metrics that running trials reported; whether
                                                                   they go on
/finish         :class:`Finish`           :class:`Acknowledged`    an attempt ended
/heartbeat      :class:`Heartbeat`        :class:`Beat`            the worker lives, and what it runs
/run            :class:`RunRequest`       :class:`RunReference`    the MLflow run of a trial that uses MLflow
/piece          :class:`Piece`            :class:`Acknowledged`    of a file of a trial, from a machine that does not
                                                                   see the sweep's directory
/source         :class:`SourceRequest`    :class:`SourcePiece`     of the source, to such a machine
/status         :class:`StatusRequest`    ``progress.Progress``    what a display shows
/cancel         :class:`Cancel`           :class:`Cancelled`       the user cancels trials, or stops the sweep
==============  ========================  =======================  ==========================================

Every message carries the id of the attempt it is about, which the worker makes up when it claims, so each may be
repeated without harm when its reply was lost: a repeated claim gets the same trial, a repeated report or finish is
recorded once. A coordinator that has been replaced answers 410 (Gone): its workers look for the one in its place.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from repro_sweep.states import FailureKind, TrialState

Metrics = dict[str, float]


class Message(BaseModel):
    """Base of all messages; an unknown field is an error; NaN and the infinities are allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Register(Message):
    """A worker offers ``slots`` slots; ``gpus[slot]`` are the devices that the slot's trials see.

    One that has outlived its coordinator also says which attempts it runs or has results of, and ``spec``: the sweep's
    record that it works by.
    """

    worker: str
    host: str
    pid: int
    slots: Annotated[int, Field(ge=1)]
    gpus: tuple[tuple[str, ...], ...] = ()
    attempts: tuple[str, ...] = ()
    spec: str = ""


class Registered(Message):
    """The sweep's record as JSON (``sweep.SweepSpec``).

    ``stop`` are the attempts that the worker must kill: their trials were given to others. ``leave``: no trial will be
    given to this worker.
    """

    spec: str
    stop: tuple[str, ...] = ()
    leave: bool = False


class Assignment(Message):
    """A trial to run: its number, absolute directory, Hydra overrides, and the config frozen at submission as YAML.

    ``identity`` is the trial's. ``ordinal`` counts its attempts from 0; ``log_size`` is what earlier ones have left of
    its log, in bytes.
    """

    attempt: str
    trial: int
    ordinal: int
    directory: str
    overrides: tuple[str, ...]
    config: str
    identity: str = ""
    log_size: int = 0


class Claimed(Message):
    """``assignment`` to run, or None: ask again, unless ``over`` (no trial will come any more)."""

    assignment: Assignment | None = None
    over: bool = False


class Report(Message):
    """Metrics at one step of one attempt; ``seq`` counts an attempt's reports from 0; ``time`` is seconds UTC."""

    attempt: str
    seq: int
    step: int
    time: float
    metrics: Metrics


class Reports(Message):
    """Reports of any of the worker's attempts, each attempt's in order."""

    worker: str
    reports: tuple[Report, ...]


class Finish(Message):
    """An attempt ended. ``metrics`` are its final ones. It carries the reports that were not yet sent.

    ``metric_missing``: the task ended well but does not return the sweep's metric, nor will any other trial.
    """

    worker: str
    attempt: str
    state: TrialState
    kind: FailureKind | None = None
    message: str | None = None
    metrics: Metrics = {}
    metric_missing: bool = False
    ended_at: float
    reports: tuple[Report, ...] = ()


class Claim(Message):
    """Slot ``slot`` is free; ``attempt`` is the id that its next attempt shall have; wait at most ``wait_s`` for one.

    ``finished`` is what the slot has just ended. Such a claim is answered at once, with or without a trial. ``left_s``
    is how long the worker may still run trials; None: as long as it likes.
    """

    worker: str
    slot: int
    attempt: str
    wait_s: Annotated[float, Field(ge=0, le=60)] = 20.0
    finished: Finish | None = None
    left_s: float | None = None


class Heartbeat(Message):
    """The worker lives. ``leaving``: it has no attempt any more and will exit."""

    worker: str
    attempts: tuple[str, ...] = ()
    leaving: bool = False


class Beat(Message):
    """``known`` is False where the worker was given up: it must register again. ``stop`` are attempts to kill."""

    known: bool = True
    stop: tuple[str, ...] = ()


class Acknowledged(Message):
    """What was received is recorded, or ``refused``: its attempt had ended before, and nothing was.

    ``prune`` answers :class:`Reports`: those of its attempts that are not worth going on with.
    """

    refused: bool = False
    prune: tuple[str, ...] = ()


class RunRequest(Message):
    """The trial of this attempt logs to MLflow by itself and needs its run."""

    attempt: str


class RunReference(Message):
    """A run in MLflow; ``error`` is set instead when it could not be had."""

    run_id: str = ""
    uri: str = ""
    experiment_id: str = ""
    error: str | None = None


def _below(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise ValueError("must be a path below the trial's directory")
    return path


class Piece(Message):
    """Bytes at ``offset`` of a file in the attempt's directory, in base64.

    The file ``grows`` with each piece, or appears as a whole with the ``last`` one.
    """

    attempt: str
    path: Annotated[str, AfterValidator(_below)]
    offset: Annotated[int, Field(ge=0)]
    data: str
    grows: bool = False
    last: bool = False


class SourceRequest(Message):
    """The archive of the source, from this byte on."""

    offset: Annotated[int, Field(ge=0)] = 0


class SourcePiece(Message):
    """Bytes of the archive, in base64, which has ``size`` bytes; ``error`` is set instead where there is none."""

    data: str = ""
    size: int = 0
    error: str | None = None


class StatusRequest(Message):
    """What does the sweep look like?"""


class Cancel(Message):
    """Cancel these trials, or with None stop the sweep: nothing new starts, running trials are stopped and wait."""

    trials: tuple[int, ...] | None = None


class Cancelled(Message):
    """The trials that were waiting or running and are cancelled."""

    trials: tuple[int, ...] = ()
