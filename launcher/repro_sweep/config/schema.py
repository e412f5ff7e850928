"""The typed ``sweep`` and ``hydra.sweeper`` nodes and their place in Hydra's ConfigStore.

``sweep/base_sweep`` is the schema that a sweep's YAML names first in its defaults; ``sweep/default`` is a complete,
empty sweep for use without a file (``+sweep=default``). Unknown keys and wrong types are Hydra's own errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from omegaconf import MISSING

from repro_sweep.config import optuna_samplers
from repro_sweep.executors import base as executors
from repro_sweep.search import base as searchers


@dataclass
class ResourcesConf:
    """What one trial is given.

    ``gpus_per_trial``: null means one where the machine has GPUs, else none; below 1, several trials share a GPU.
    ``cpus_per_trial`` also limits the threads of the numeric libraries. ``nodes_per_trial``: a trial runs on so many
    nodes at once (one process on each), and has its GPUs, CPUs and memory on each of them.
    """

    gpus_per_trial: float | None = None
    cpus_per_trial: float = 1.0
    mem_gb_per_trial: float | None = None
    nodes_per_trial: int = 1


@dataclass
class TrackingConf:
    """The MLflow store (null: MLFLOW_TRACKING_URI, else ``mlflow.db`` here) and experiment (null: the sweep's name)."""

    uri: str | None = None
    experiment: str | None = None


@dataclass
class RetriesConf:
    """How many more attempts a trial gets after each kind of failure; null: as many as it needs.

    Preemption and the loss of a worker are no fault of the trial's; ten losses of one trial are no accident.
    """

    EXCEPTION: int | None = 0
    INVALID_METRIC: int | None = 0
    DRIFT: int | None = 0
    OUT_OF_MEMORY: int | None = 1
    GPU_OUT_OF_MEMORY: int | None = 1
    CRASH: int | None = 1
    TIMEOUT: int | None = 0
    STALLED: int | None = 1
    PREEMPTED: int | None = None
    NODE_LOST: int | None = 10


@dataclass
class BudgetConf:
    """What ends a search, whatever comes first: trials, hours, a value of the metric, points that are no better."""

    trials: int | None = None
    hours: float | None = None
    target: float | None = None
    plateau: int | None = None


@dataclass
class SourceConf:
    """What is frozen of the project when a sweep is submitted; ``max_mb`` is for each file."""

    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    max_mb: float = 10.0


@dataclass
class DeterminismConf:
    """The sweep's seed (null: nothing is seeded), and whether torch must be deterministic: true, false or warn."""

    seed: int | None = 0
    strict: Any = False


@dataclass
class SweepConf:
    """The options of a sweep, as ``docs/sweep.md`` explains them."""

    name: str | None = None
    task: str | None = None
    metric: Any = None
    direction: Any = None
    params: Any = None
    zip: list[list[str]] = field(default_factory=list)
    exclude: list[dict[str, Any]] = field(default_factory=list)
    repeats: dict[str, Any] = field(default_factory=dict)
    resources: ResourcesConf = field(default_factory=ResourcesConf)
    tracking: TrackingConf = field(default_factory=TrackingConf)
    sampler: Any = MISSING
    executor: Any = MISSING
    pruner: Any = None
    repeats_pruner: Any = None
    budget: BudgetConf = field(default_factory=BudgetConf)
    start_from: list[str] = field(default_factory=list)
    enqueue: list[dict[str, Any]] = field(default_factory=list)
    constraints: list[str] = field(default_factory=list)
    custom_search_space: str | None = None
    report: bool = True
    max_failures: int | None = None
    log_limit_mb: float = 20.0
    retries: RetriesConf = field(default_factory=RetriesConf)
    trial_timeout_min: float | None = None
    stall_timeout_min: float | None = None
    orphan_timeout_min: float = 10.0
    min_free_mb: float = 100.0
    checkpoint_uri: str | None = None
    source: SourceConf = field(default_factory=SourceConf)
    not_secret: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    determinism: DeterminismConf = field(default_factory=DeterminismConf)
    reuse: bool = True
    detach: bool = False


@dataclass
class SweeperConf:
    """``hydra.sweeper``: ``params`` as in Hydra's own basic sweeper; ``plan`` shows the trials and starts none.

    The other keys are hydra-optuna-sweeper's, null where they are not given (see ``config.optuna_sweeper``). Hydra must
    not make the sampler when it makes the sweeper, hence ``_recursive_``.
    """

    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"sampler": "unset"}])
    _target_: str = "hydra_plugins.repro_sweep.sweeper.ReproSweeper"
    _recursive_: bool = False
    params: dict[str, Any] | None = field(default_factory=dict)
    plan: bool = False
    sampler: Any = None
    direction: Any = None
    storage: Any = None
    study_name: str | None = None
    n_trials: int | None = None
    n_jobs: int | None = None
    max_failure_rate: float | None = None
    search_space: dict[str, Any] | None = None
    custom_search_space: str | None = None


@dataclass
class OptunaSweeperConf(SweeperConf):
    """``hydra/sweeper=optuna`` where hydra-optuna-sweeper is not installed: always a search."""

    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"sampler": "tpe"}])
    n_trials: int | None = optuna_samplers.DEFAULT_TRIALS


def register() -> None:
    """Put the schemas into the ConfigStore (again, without harm)."""
    store = ConfigStore.instance()
    store.store(group="hydra/sweeper", name="repro_sweep", node=SweeperConf, provider="repro_sweep")
    _register_for_optuna_sweeper(store)
    store.store(group="sweep", name="base_sweep", node=SweepConf, provider="repro_sweep")
    store.store(
        group="sweep",
        name="default",
        node={"defaults": ["base_sweep", {"sampler": "grid"}, {"executor": "local"}, "_self_"]},
        provider="repro_sweep",
    )
    for name, conf in executors.options().items():
        store.store(group="sweep/executor", name=name, node=conf, provider="repro_sweep")
    for name, options in searchers.options().items():
        store.store(group="sweep/sampler", name=name, node=options, provider="repro_sweep")
    for name, options in searchers.pruner_options().items():
        for group in ("sweep/pruner", "sweep/repeats_pruner"):
            store.store(group=group, name=name, node=options, provider="repro_sweep")


def _register_for_optuna_sweeper(store: ConfigStore) -> None:
    """What an application written for hydra-optuna-sweeper names in its defaults, unless somebody else provides it.

    That plugin, if it is imported later, replaces these.
    """
    nodes: dict[tuple[str, str], Any] = {("hydra/sweeper", "optuna"): OptunaSweeperConf}
    nodes |= {("hydra/sweeper/sampler", name): node for name, node in optuna_samplers.group().items()}
    for (group, name), node in nodes.items():
        path = f"{group}/{name}.yaml"
        if store.get_type(path) is ObjectType.NOT_FOUND or store.load(path).provider == "repro_sweep":
            store.store(group=group, name=name, node=node, provider="repro_sweep")
