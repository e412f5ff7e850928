"""What a sweep is, frozen when it is submitted: the one record from which a coordinator and its workers run.

It is stored as JSON in the ledger. Nothing here needs the user's code.
"""

from __future__ import annotations

from getpass import getuser
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from repro_sweep import host
from repro_sweep.states import Direction, FailureKind

UNNAMED_METRIC = "objective"
"""What the number is called that a task returns, where the sweep names no metric."""


class Record(BaseModel):
    """Base of the frozen JSON records; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class TaskSpec(Record):
    """Where the task function is found by a process that has none of the front door's state.

    ``module`` is imported by its dotted name; ``file`` (a script that was run as ``__main__``) is imported
    under a module name of its own. Exactly one of them is set. ``qualname`` is looked up in it, and a function
    decorated with ``hydra.main`` is unwrapped. ``sys_path`` holds the entries to put before the interpreter's own.
    """

    module: str | None = None
    file: str | None = None
    qualname: str
    cwd: str
    sys_path: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Dotted name for messages and for the identity; the same wherever the project's folder lies."""
        return f"{self.module or Path(self.file or '').stem}.{self.qualname}"


class Composition(Record):
    """What a process needs to compose a trial's config as Hydra did at submission (see ``config.compose``).

    ``search_path`` holds the (provider, path) pairs of Hydra's search path, in its order; ``strip`` the nodes of the
    first level that trials must not see; ``now`` what ``${now:pattern}`` is in all trials, for the patterns that the
    sweep itself has used.
    """

    config_name: str | None
    search_path: tuple[tuple[str, str], ...]
    hydra_overrides: tuple[str, ...]
    job_name: str
    version_base: str | None
    now: tuple[tuple[str, str], ...] = ()
    strip: tuple[str, ...] = ("sweep",)


class Resources(Record):
    """What one trial is given on each of its ``nodes``.

    ``gpus`` may be a fraction (several trials on one GPU); memory is in GB.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    mem_gb: float | None = None
    nodes: int = 1

    @property
    def threads(self) -> int:
        """How many threads the trial's numeric libraries may use."""
        return max(1, int(self.cpus))


class Tracking(Record):
    """The MLflow store: its URI and the name of the experiment."""

    uri: str
    experiment: str


class SourceRules(Record):
    """What is frozen: patterns of paths below the project's folders, and how large a file may be, in MB."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_mb: float = 10.0


class Source(Record):
    """The frozen source: the snapshot's id, the folder that holds it, and the folders that it was taken from.

    ``submission`` stands for it and for all else that trials are built from (see ``provenance.bundle``).
    """

    snapshot: str
    folder: str
    roots: tuple[str, ...]
    submission: str = ""


class Data(Record):
    """Data that trials use: where it is, and a hash of it. ``files`` counts its files, ``size`` its bytes."""

    uri: str
    digest: str
    files: int = 1
    size: int = 0


class Determinism(Record):
    """How chance is taken out of trials.

    ``seed``: the sweep's, from which trials without one get theirs; None leaves all to chance. ``strict``: what torch
    cannot do deterministically is an error in the trial, or with "warn" a warning.
    """

    seed: int | None = 0
    strict: bool | Literal["warn"] = False


class Limits(Record):
    """What a trial may take, and how often it is tried again.

    ``retries`` says for each kind of failure how many more attempts a trial gets, None for as many as it needs.
    ``trial_timeout_min`` and ``stall_timeout_min`` (without a report) end an attempt, ``orphan_timeout_min`` a worker
    that has nothing to run and finds no coordinator; minutes. Nothing is handed out while less than ``min_free_mb`` MB
    are free on the disk of the sweep's directory.
    """

    retries: dict[FailureKind, int | None] = {}
    trial_timeout_min: float | None = None
    stall_timeout_min: float | None = None
    orphan_timeout_min: float = 10.0
    min_free_mb: float = 100.0


class Objective(Record):
    """A metric to be made as large or as small as possible."""

    metric: str
    direction: Direction


class Constraint(Record):
    """What a metric must satisfy for its point to be feasible: ``metric <= bound``, or ``metric >= bound``."""

    metric: str
    operator: Literal["<=", ">="]
    bound: float

    def violation(self, value: float) -> float:
        """By how much a value misses the bound, as Optuna counts it: greater than 0 if it does."""
        return value - self.bound if self.operator == "<=" else self.bound - value


class Chosen(Record):
    """One option of a config group, such as ``sweep/pruner=median``: its name and its typed options."""

    name: str
    options: dict[str, object] = {}


class SpaceSpec(Record):
    """What ``config.space.Space`` is made from: the parts of the sweep's file and the task's overrides, as given."""

    params: object = None
    zip: list[list[str]] = []
    exclude: list[dict[str, object]] = []
    repeats: dict[str, object] = {}
    overrides: tuple[str, ...] = ()
    hydra_params: dict[str, object] | None = None


class Budget(Record):
    """What ends a search: whatever is reached first; running trials finish.

    ``trials`` counts all trials, each repeat of a point for one; ``hours`` is the time in which the sweep ran;
    ``target`` is a value of the first objective; ``plateau`` is how many points may follow each other without a better
    value.
    """

    trials: int | None = None
    hours: float | None = None
    target: float | None = None
    plateau: int | None = None


class SearchSpec(Record):
    """How a search chooses its points.

    ``seed`` is never missing: one that was not given was drawn at submission. ``enqueue`` are points to try first, by
    key. ``custom_search_space`` is the dotted name of a function ``(config, optuna.trial.Trial)`` that adds parameters.
    """

    sampler: Chosen
    seed: int
    space: SpaceSpec
    budget: Budget
    enqueue: tuple[dict[str, object], ...] = ()
    start_from: tuple[str, ...] = ()
    repeats_pruner: Chosen | None = None
    constraints: tuple[Constraint, ...] = ()
    custom_search_space: str | None = None


class Origin(Record):
    """Who submitted the sweep, where and from what."""

    user: str
    host: str
    command: str
    git_commit: str | None = None
    git_dirty: bool | None = None

    @classmethod
    def here(cls, command: str, *, git_commit: str | None, git_dirty: bool | None) -> Origin:
        """The origin of a sweep submitted by this process."""
        try:
            user = getuser()
        except (KeyError, OSError):  # a container's user id without a name
            user = "unknown"
        return cls(user=user, host=host.name(), command=command, git_commit=git_commit, git_dirty=git_dirty)


class SweepSpec(Record):
    """A submitted sweep.

    ``directory`` is absolute. ``metric`` is None when the sweep names none. ``executor`` holds the options of the
    executor named ``executor_name``. ``repeats`` are the keys over which results are averaged. ``created_at`` is
    seconds UTC. ``code`` is a fingerprint of the project's Python files; ``reuse``: take over what other sweeps in the
    same MLflow store have of the same points and the same code. ``objectives`` are set where there are several, the
    first one being ``metric``. ``search`` is None for a grid. ``pruner`` ends trials that are not worth going on
    with. ``detach``: the coordinator is a job of the executor's too. ``checkpoint_uri``: where checkpoints are kept of
    trials on machines that do not see ``directory``. ``source`` is what trials run from, frozen by ``source_rules``
    when the sweep was submitted. ``determinism``: how randomness in trials is seeded.
    ``data``: what trials read, by name, with its fingerprint. ``reproduces``: the MLflow runs that its trials repeat.
    ``not_secret``: keys whose names look like those of secrets, and which are none. ``report``: draw a page about the
    sweep, now and then while it runs and when it is over.
    """

    sweep_id: str
    name: str
    directory: str
    task: TaskSpec
    composition: Composition
    resources: Resources
    tracking: Tracking
    origin: Origin
    metric: str | None
    direction: Direction
    executor_name: str
    executor: dict[str, object]
    sampler: str
    max_failures: int | None
    log_limit_mb: float
    created_at: float
    repeats: tuple[str, ...] = ()
    limits: Limits = Limits()
    code: str = ""
    reuse: bool = True
    objectives: tuple[Objective, ...] = ()
    search: SearchSpec | None = None
    pruner: Chosen | None = None
    detach: bool = False
    checkpoint_uri: str | None = None
    source_rules: SourceRules = SourceRules()
    source: Source | None = None
    determinism: Determinism = Determinism()
    data: dict[str, Data] = {}
    reproduces: dict[int, str] = {}
    not_secret: tuple[str, ...] = ()
    report: bool = True

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, values: Any) -> Any:
        """Only searches had a report, and their ``search`` said whether."""
        search = values.get("search") if isinstance(values, dict) else None
        if not isinstance(search, dict) or "report" not in search:
            return values
        rest = {key: value for key, value in search.items() if key != "report"}
        return {"report": search["report"]} | values | {"search": rest}

    @property
    def ranked_by(self) -> str:
        """The metric that trials are ranked by: ``metric``, or the name that a plain number gets without one."""
        return self.metric or UNNAMED_METRIC

    @property
    def all_objectives(self) -> tuple[Objective, ...]:
        """The objectives, at least one."""
        return self.objectives or (Objective(metric=self.ranked_by, direction=self.direction),)

    def trial_directory(self, directory: str) -> Path:
        """Absolute path of a trial's directory, from the ``directory`` that the ledger holds for it."""
        return Path(self.directory) / directory
