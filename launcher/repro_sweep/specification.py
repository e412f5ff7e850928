"""From the sweep's options, as Hydra composed them, to the record that a coordinator and its workers run from.

Nothing is expanded, written or started here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, Node, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from repro_sweep import machine, task
from repro_sweep.config.compose import composition_of
from repro_sweep.config.nodes import held
from repro_sweep.config.optuna_samplers import DEFAULT_TRIALS
from repro_sweep.config.optuna_sweeper import Translation
from repro_sweep.config.schema import DeterminismConf, SweepConf
from repro_sweep.config.trials import SUBDIR
from repro_sweep.errors import SweepError
from repro_sweep.executors import base as executors
from repro_sweep.provenance import data
from repro_sweep.provenance.snapshot import STORE_NAME
from repro_sweep.provenance.source import code_fingerprint, git_state
from repro_sweep.records import now
from repro_sweep.redaction import has_password, is_secret, redacted, revealed, without_secrets
from repro_sweep.search import base as searchers
from repro_sweep.search.grid import GridConf
from repro_sweep.search.samplers import checked_seed
from repro_sweep.standings import usual_direction
from repro_sweep.states import Direction, FailureKind
from repro_sweep.sweep import (
    UNNAMED_METRIC,
    Budget,
    Chosen,
    Composition,
    Constraint,
    Data,
    Determinism,
    Limits,
    Objective,
    Origin,
    Resources,
    SearchSpec,
    SourceRules,
    SpaceSpec,
    SweepSpec,
    TaskSpec,
    Tracking,
)
from repro_sweep.tracking.uri import resolve_uri

_HYDRA_DIR = "multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}"
_HYDRA_SUBDIR = "${hydra.job.num}"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CONSTRAINT = re.compile(r"\s*(.+?)\s*(<=|>=)\s*(\S+)\s*")
_MAX_SEED = 2**31
_REFERENCE = re.compile(r"(?<!\\)\$\{\s*([^${}:\s]+)\s*\}")
_ENV = re.compile(r"(?<!\\)\$\{\s*oc\.env\s*:\s*(\w+)\s*(?:,([^${}'\"]*))?\}")
_KEPT = frozenset({"runtime_env", "env_vars"})
"""Options of executors in which interpolations of the environment are resolved where they are used."""
_RESOLVER = re.compile(r"(?<!\\)\$\{\s*([\w.]+)\s*:")
_RESOLVERS = frozenset({"oc.env", "oc.decode", "oc.create"})
_SHELL = "setup"
"""And the one whose lines a shell reads, which has the environment itself."""
_Number = TypeVar("_Number", int | None, float | None, float)


def sweep_options(config: DictConfig) -> SweepConf:
    """The typed options of the sweep; the defaults where the application has no sweep node of ours.

    Raises:
        SweepError: an option is missing or cannot be resolved.
    """
    if not is_ours(config):
        defaults = SweepConf(sampler=GridConf(), executor=executors.load("local").OPTIONS())
        return OmegaConf.structured(defaults)  # type: ignore[no-any-return]
    node: SweepConf = config.sweep
    _check_keys(config.sweep, "sweep")
    try:
        missing = OmegaConf.missing_keys(node)
        OmegaConf.to_container(config.sweep, resolve=True)
    except OmegaConfBaseException as error:
        raise SweepError(f"sweep: {str(error).splitlines()[0]}") from error
    if missing:
        first = min(missing).removeprefix("sweep.")
        raise SweepError(
            f"sweep.{first}: has no value; put '{first}: …' into the defaults of the sweep's YAML"
        )
    _check_choices(config)
    return node


def _check_keys(node: Any, where: str) -> None:
    """Typed nodes have the keys of their types only; Hydra lets ``+sweep.key=…`` add any other.

    Raises:
        SweepError: there is another one.
    """
    conf = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
    if conf is None or not is_dataclass(conf):
        return
    allowed = [field.name for field in fields(conf)]
    for key in node:
        if key not in allowed:
            raise SweepError(f"{where}.{key}: not an option ({', '.join(allowed)})")
        if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            _check_keys(node[key], f"{where}.{key}")


def _check_choices(config: DictConfig) -> None:
    """What a config group offers is chosen with a slash; a dot would only replace the options of what is chosen.

    Raises:
        SweepError: a node is not the options of a choice.
    """
    for key, known in _choosable().items():
        choice, node = config.hydra.runtime.choices.get(f"sweep/{key}"), config.sweep[key]
        if isinstance(node, DictConfig) if choice is not None else node is None:
            continue
        got = "none" if node is None else node.get("name") if isinstance(node, DictConfig) else node
        name, allowed = (got, "") if got in known else ("NAME", f" ({', '.join(known)})")
        raise SweepError(
            f"sweep.{key}: choose it with sweep/{key}={name}{allowed}, in a file with '{key}: {name}' in its defaults;"
            f" sweep.{key} has the options of what is chosen, got {_shown(node)}"
        )


def _choosable() -> dict[str, Sequence[str]]:
    """The config groups of the ``sweep`` node, and what they offer."""
    pruners = sorted(searchers.pruner_options())
    return {
        "sampler": searchers.names(),
        "executor": sorted(executors.options()),
        "pruner": pruners,
        "repeats_pruner": pruners,
    }


def _shown(node: object) -> str:
    return repr(OmegaConf.to_container(node) if isinstance(node, DictConfig | ListConfig) else node)


def adopt(options: SweepConf, config: DictConfig, asked: Translation) -> Chosen:
    """Take over what ``hydra.sweeper`` asks for where the ``sweep`` node says nothing; returns the sampler.

    A sampler that the ``sweep`` node chooses replaces the other one, and nothing else of what is asked for.
    """
    choice = str(config.hydra.runtime.choices.get("sweep/sampler") or "grid")
    sampler = Chosen(
        name=choice, options=_plain(options.sampler, "sweep.sampler", not_secret=options.not_secret)
    )
    if asked.sampler is None:
        return sampler
    if choice == "grid" and asked.search:
        sampler = asked.sampler
    _adopt_objectives(options, asked)
    if asked.slots is not None and options.executor.get("slots", 0) is None:
        options.executor.slots = asked.slots
    options.custom_search_space = options.custom_search_space or asked.custom_search_space
    if options.max_failures is None and asked.search:  # the rate is one of so many trials
        options.max_failures = asked.max_failures
    budget = options.budget
    has_none = all(each is None for each in (budget.trials, budget.hours, budget.target, budget.plateau))
    if has_none and asked.search and issubclass(searchers.load(sampler.name).searcher, searchers.Search):
        budget.trials = asked.trials or DEFAULT_TRIALS
    return sampler


def _adopt_objectives(options: SweepConf, asked: Translation) -> None:
    """Its number is minimized where nothing is said; a metric that the ``sweep`` node names has its usual direction."""
    directions = [str(each) for each in asked.directions]
    if options.metric in (None, UNNAMED_METRIC):
        directions = directions or [Direction.MINIMIZE.value]
    if options.metric is None and len(directions) > 1:
        options.metric = [f"{UNNAMED_METRIC}_{i}" for i in range(len(directions))]
    if options.direction is None and directions:
        options.direction = directions if len(directions) > 1 else directions[0]


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line overrides: those of the task, and those of the ``sweep`` node, which trials do not see.

    Raises:
        SweepError: several sweeps at once (``+sweep=a,b``).
    """
    mine: list[str] = []
    theirs: list[str] = []
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        line = override.input_line or ""
        if re.split(r"[./@]", override.key_or_group, maxsplit=1)[0] != "sweep":
            theirs.append(line)
            continue
        if override.is_sweep_override():
            raise SweepError(
                f"{line}: the sweep's own options take one value; to sweep over a key, name that key"
            )
        mine.append(line)
    return theirs, mine


def is_ours(config: DictConfig) -> bool:
    return "sweep" in config and OmegaConf.get_type(config, "sweep") is SweepConf


def name_of(options: SweepConf, config: DictConfig) -> str:
    name = options.name or (config.hydra.runtime.choices.get("sweep") if is_ours(config) else None)
    name = str(name or config.hydra.job.name)
    if not _NAME.fullmatch(name):
        raise SweepError(f"sweep.name: '{name}' must consist of letters, digits, '.', '_' and '-'")
    return name


def directory_of(config: DictConfig, name: str) -> Path:
    if _raw_sweep(config)["dir"] == _HYDRA_DIR:
        return Path.cwd() / "multirun" / name
    try:
        return Path.cwd() / str(config.hydra.sweep.dir)
    except OmegaConfBaseException as error:
        raise SweepError(f"hydra.sweep.dir: {str(error).splitlines()[0]}") from error


def composition_with(config: DictConfig, loader: ConfigLoader, directory: Path) -> Composition:
    """Hydra's composition, with our directories in place of Hydra's defaults as overrides like any other.

    A directory that refers to the sweep's own node is resolved here: trials do not have that node.
    """
    raw = _raw_sweep(config)
    chosen = []
    if raw["dir"] == _HYDRA_DIR or "${sweep" in raw["dir"]:
        quoted = str(directory.relative_to(Path.cwd()) if directory.is_relative_to(Path.cwd()) else directory)
        quoted = quoted.replace("\\", "\\\\").replace("'", "\\'")
        chosen.append(f"hydra.sweep.dir='{quoted}'")
    if raw["subdir"] == _HYDRA_SUBDIR:
        chosen.append(f"hydra.sweep.subdir={SUBDIR}")
    composition = composition_of(config, loader, strip=("sweep",) if is_ours(config) else ())
    return composition.model_copy(update={"hydra_overrides": (*composition.hydra_overrides, *chosen)})


def _raw_sweep(config: DictConfig) -> dict[Any, Any]:
    raw = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    assert isinstance(raw, dict)
    return raw


def task_of(options: SweepConf, found: TaskSpec | None) -> TaskSpec:
    if found is not None:
        if options.task is not None and options.task != found.name:
            raise SweepError(f"sweep.task: is {options.task}, but this application's task is {found.name}")
        return found
    if options.task is None:
        raise SweepError(
            "sweep.task: is missing; choose a sweep with +sweep=NAME, or name the task function:"
            " sweep.task=package.module.function"
        )
    spec = task.from_dotted(options.task, "sweep.task")
    task.load(spec)
    return spec


def specify(
    options: SweepConf,
    config: DictConfig,
    name: str,
    directory: Path,
    task_spec: TaskSpec,
    composition: Composition,
    overrides: Sequence[str],
    sampler: Chosen,
    params: Mapping[str, object],
    command: str,
) -> SweepSpec:
    """The sweep's record.

    Raises:
        SweepError: an option is not what it must be.
    """
    git = git_state(Path.cwd())
    choices = config.hydra.runtime.choices
    cwd = Path.cwd()
    objectives = _objectives(options.metric, options.direction)
    determinism = _determinism(options.determinism)
    gpus = options.resources.gpus_per_trial
    if gpus is None:
        gpus = 1.0 if _has_gpus(options.executor) else 0.0
    return SweepSpec(
        sweep_id=uuid.uuid4().hex,
        name=name,
        directory=str(directory),
        task=task_spec,
        composition=composition,
        resources=Resources(
            cpus=_positive(options.resources.cpus_per_trial, "sweep.resources.cpus_per_trial"),
            gpus=_gpu_share(gpus),
            mem_gb=None
            if options.resources.mem_gb_per_trial is None
            else _positive(options.resources.mem_gb_per_trial, "sweep.resources.mem_gb_per_trial"),
            nodes=_nodes(options.resources.nodes_per_trial, str(choices.get("sweep/executor") or "local")),
        ),
        tracking=Tracking(
            uri=resolve_uri(options.tracking.uri, cwd, os.environ),
            experiment=options.tracking.experiment or name,
        ),
        origin=Origin.here(
            without_secrets(command),
            git_commit=git.commit if git else None,
            git_dirty=git.dirty if git else None,
        ),
        metric=objectives[0].metric if objectives else None,
        direction=objectives[0].direction if objectives else _direction(options.direction, UNNAMED_METRIC),
        executor_name=_executor_name(options.executor, str(choices.get("sweep/executor") or "local")),
        executor=_plain(options.executor, "sweep.executor", not_secret=options.not_secret),
        sampler=sampler.name,
        max_failures=_not_negative(options.max_failures, "sweep.max_failures"),
        log_limit_mb=_positive(options.log_limit_mb, "sweep.log_limit_mb"),
        created_at=now(),
        repeats=tuple(str(key).lstrip("+") for key in options.repeats),
        limits=_limits(options),
        code=_code(cwd, determinism),
        reuse=options.reuse,
        detach=options.detach,
        checkpoint_uri=_checkpoint_uri(options.checkpoint_uri),
        source_rules=SourceRules(
            include=_patterns(options.source.include, "sweep.source.include"),
            exclude=_patterns(options.source.exclude, "sweep.source.exclude"),
            max_mb=_positive(options.source.max_mb, "sweep.source.max_mb"),
        ),
        not_secret=tuple(options.not_secret),
        report=options.report,
        determinism=determinism,
        data=_data(options.data, cwd, directory.parent / STORE_NAME),
        objectives=objectives if len(objectives) > 1 else (),
        pruner=_pruner(options, "pruner", choices.get("sweep/pruner")),
        search=_search(options, sampler, choices.get("sweep/repeats_pruner"), params, overrides),
    )


def _checkpoint_uri(uri: str | None) -> str | None:
    """Where checkpoints are kept; fsspec must know how to get there."""
    if uri is None:
        return None
    where = "sweep.checkpoint_uri"
    _refuse_password(uri, where)
    if find_spec("fsspec") is None:
        raise SweepError(f"{where}: fsspec is not installed; pip install fsspec")
    from fsspec import get_filesystem_class
    from fsspec.utils import get_protocol

    try:
        get_filesystem_class(get_protocol(uri))
    except (ImportError, ValueError) as error:
        raise SweepError(f"{where}: '{uri}' cannot be used: {' '.join(str(error).split())}") from error
    return uri if "://" in uri else str(Path(uri).absolute())


def _data(options: Mapping[str, object], cwd: Path, store: Path) -> dict[str, Data]:
    found = {}
    for name, where in options.items():
        if not isinstance(where, str) or not where:
            raise SweepError(f"sweep.data.{name}: must be a path or a URI, got {where!r}")
        _refuse_password(where, f"sweep.data.{name}")
        found[str(name)] = data.fingerprint(str(name), where, cwd, store)
    return found


def _refuse_password(uri: str, where: str) -> None:
    """It would be in the ledger; fsspec takes it from elsewhere."""
    if has_password(uri):
        variable = re.sub(r"\W", "_", uri.partition("://")[0].rpartition("::")[2]).upper()
        raise SweepError(
            f"{where}: {redacted(uri)!r} holds a password, which would be kept in records; put it into the environment"
            f" variables or configuration files of its fsspec backend instead (FSSPEC_{variable}_PASSWORD,"
            " ~/.config/fsspec)"
        )


def _patterns(patterns: Sequence[str], where: str) -> tuple[str, ...]:
    for pattern in patterns:
        path = PurePosixPath(pattern)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise SweepError(f"{where}: {pattern!r} must be a pattern of files below the project")
        if any("**" in part and part != "**" for part in path.parts):
            raise SweepError(f"{where}: {pattern!r} must have '**' between slashes only")
    return tuple(patterns)


def executor_of(overrides: Sequence[str]) -> tuple[str, dict[str, object]]:
    """Name and options of an executor, from overrides alone: ``sweep/executor=NAME``, ``sweep.executor.OPTION=VALUE``.

    Raises:
        SweepError: one of them is something else, or not what it must be.
    """
    group, prefix = "sweep/executor", "sweep.executor."
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise SweepError(" ".join(str(error).split())) from error
    names = [str(each.value()) for each in parsed if each.key_or_group == group]
    name = names[-1] if names else "local"
    options = OmegaConf.structured(executors.load(name).OPTIONS)
    for each in parsed:
        if each.key_or_group == group:
            continue
        if not each.key_or_group.startswith(prefix) or each.is_sweep_override():
            raise SweepError(f"{each.input_line}: only {group} and {prefix}OPTION can be set here")
        try:
            OmegaConf.update(
                options, each.key_or_group.removeprefix(prefix), each.value(), force_add=each.is_add()
            )
        except OmegaConfBaseException as error:
            raise SweepError(f"{each.input_line}: {str(error).splitlines()[0]}") from error
    return name, _plain(options, "sweep.executor")


def _code(cwd: Path, determinism: Determinism) -> str:
    """What must be equal for a result of another sweep to be this one's: the code, and how it is seeded."""
    found = code_fingerprint(cwd)
    if not found or determinism == Determinism():
        return found
    return hashlib.sha256(f"{found} {determinism.model_dump_json()}".encode()).hexdigest()


def _determinism(options: DeterminismConf) -> Determinism:
    if not isinstance(options.strict, bool) and options.strict != "warn":
        raise SweepError(
            f"sweep.determinism.strict: must be true, false or warn, got {_shown(options.strict)}"
        )
    seed = _not_negative(options.seed, "sweep.determinism.seed")
    return Determinism(seed=seed, strict=options.strict)


def _has_gpus(executor: DictConfig) -> bool:
    """Whether workers have GPUs as far as their options say; else this machine's count, if they run here."""
    if "gpus_per_node" in executor:
        return bool(executor.gpus_per_node)
    return executor.get("address") is None and bool(machine.inspect().gpus)


def _executor_name(node: object, choice: str) -> str:
    """The executor that was chosen: by its own name, or by a file of the user's that has its options."""
    known = executors.options()
    if choice in known or not isinstance(node, DictConfig):
        return choice
    kind = OmegaConf.get_type(node)
    return next((name for name, options in known.items() if options is kind), choice)


def _objectives(metric: object, direction: object) -> tuple[Objective, ...]:
    """Those that the sweep names, none where it names no metric."""
    metrics = _texts(metric, "sweep.metric", "the name of a metric, or a list of names")
    directions = _texts(direction, "sweep.direction", f"one of {', '.join(Direction)}, or a list of them")
    if len(set(metrics)) < len(metrics):
        raise SweepError(f"sweep.metric: names a metric twice: {', '.join(metrics)}")
    if directions and len(directions) != max(1, len(metrics)):
        raise SweepError(
            f"sweep.direction: must have one direction for each metric,"
            f" got {len(directions)} for {len(metrics)} metrics"
        )
    return tuple(
        Objective(metric=name, direction=_direction(directions[i] if directions else None, name))
        for i, name in enumerate(metrics)
    )


def _texts(value: object, where: str, what: str) -> list[str]:
    if value is None:
        return []
    items = list(value) if isinstance(value, ListConfig | list | tuple) else [value]
    if not items or not all(isinstance(item, str) and item for item in items):
        raise SweepError(f"{where}: must be {what}, got {value!r}")
    return [str(item) for item in items]


def _pruner(options: SweepConf, key: str, choice: object) -> Chosen | None:
    if choice in (None, "none"):
        return None
    if choice not in (known := searchers.pruner_options()):
        raise SweepError(f"sweep/{key}: {choice!r} is not a pruner ({', '.join(sorted(known))})")
    plain = _plain(getattr(options, key), f"sweep.{key}", not_secret=options.not_secret)
    return Chosen(name=str(choice), options=plain)


def _search(
    options: SweepConf,
    sampler: Chosen,
    repeats_pruner: object,
    params: Mapping[str, object],
    overrides: Sequence[str],
) -> SearchSpec | None:
    """How points are searched for; None for a grid."""
    between = _pruner(options, "repeats_pruner", repeats_pruner)
    budget = _budget(options)
    if not issubclass(searchers.load(sampler.name).searcher, searchers.Search):
        _refuse_for_grids(options, budget, between, sampler.name)
        return None
    if budget == Budget():
        raise SweepError(
            "sweep.budget: a search needs an end: sweep.budget.trials=100, or hours, target, plateau"
        )
    if between is not None and not options.repeats:
        raise SweepError("sweep/repeats_pruner: there are no repeats to prune (sweep.repeats)")
    seed = checked_seed(sampler.options.get("seed"), "sweep.sampler.seed")
    return SearchSpec(
        sampler=sampler,
        seed=secrets.randbelow(_MAX_SEED) if seed is None else seed,
        space=SpaceSpec(
            params=_raw(options.params),
            zip=_raw(options.zip),
            exclude=_raw(options.exclude),
            repeats=_raw(options.repeats),
            overrides=tuple(overrides),
            hydra_params=dict(params),
        ),
        budget=budget,
        enqueue=tuple(
            _plain(point, f"sweep.enqueue[{i}]", not_secret=options.not_secret)
            for i, point in enumerate(options.enqueue)
        ),
        start_from=tuple(options.start_from),
        repeats_pruner=between,
        constraints=tuple(
            _constraint(text, f"sweep.constraints[{i}]") for i, text in enumerate(options.constraints)
        ),
        custom_search_space=options.custom_search_space,
    )


def _refuse_for_grids(options: SweepConf, budget: Budget, between: Chosen | None, sampler: str) -> None:
    """A grid has all its points, so what steers a search would be ignored."""
    given = {
        "sweep.budget": budget != Budget(),
        "sweep.start_from": bool(options.start_from),
        "sweep.enqueue": bool(options.enqueue),
        "sweep.constraints": bool(options.constraints),
        "sweep.custom_search_space": options.custom_search_space is not None,
        "sweep/repeats_pruner": between is not None,
    }
    for where, is_given in given.items():
        if is_given:
            raise SweepError(
                f"{where}: is for searches, and sweep/sampler={sampler} runs every point; try sweep/sampler=tpe"
            )


def _budget(options: SweepConf) -> Budget:
    budget = options.budget
    for name in ("trials", "plateau"):
        value = getattr(budget, name)
        if value is not None and value < 1:
            raise SweepError(f"sweep.budget.{name}: must be at least 1, got {value}")
    if budget.target is not None and not math.isfinite(budget.target):
        raise SweepError(f"sweep.budget.target: must be a finite number, got {budget.target}")
    return Budget(
        trials=budget.trials,
        hours=_positive_or_none(budget.hours, "sweep.budget.hours"),
        target=budget.target,
        plateau=budget.plateau,
    )


def _constraint(text: str, where: str) -> Constraint:
    found = _CONSTRAINT.fullmatch(text)
    try:
        bound = float(found[3]) if found else math.nan
    except ValueError:
        bound = math.nan
    if found is None or math.isnan(bound):
        raise SweepError(f"{where}: must be like 'latency_ms <= 50' (or >=), got {text!r}")
    return Constraint(metric=found[1], operator="<=" if found[2] == "<=" else ">=", bound=bound)


def _raw(node: object) -> Any:
    """As it stands: interpolations are resolved in each trial's config."""
    container = (
        OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig | ListConfig) else node
    )
    try:
        return json.loads(json.dumps(container))
    except TypeError as error:
        raise SweepError(
            f"sweep.params: {error}: a search can hold text, numbers, true, false and null"
        ) from error


def _limits(options: SweepConf) -> Limits:
    retries = {
        kind: _not_negative(getattr(options.retries, kind, 0), f"sweep.retries.{kind}")
        for kind in FailureKind
    }
    return Limits(
        retries=retries,
        trial_timeout_min=_positive_or_none(options.trial_timeout_min, "sweep.trial_timeout_min"),
        stall_timeout_min=_positive_or_none(options.stall_timeout_min, "sweep.stall_timeout_min"),
        orphan_timeout_min=_positive(options.orphan_timeout_min, "sweep.orphan_timeout_min"),
        min_free_mb=_not_negative(options.min_free_mb, "sweep.min_free_mb"),
    )


def _plain(node: object, where: str, *, not_secret: Collection[str] = ()) -> dict[str, object]:
    """A node's resolved values, but interpolations of secrets as they were written.

    Raises:
        SweepError: a secret itself stands there.
    """
    container = (
        OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig | ListConfig) else {}
    )
    plain: dict[str, object] = json.loads(json.dumps(container))
    if isinstance(node, DictConfig):
        plain = {
            key: _unresolved(value, child, f"{where}.{key}", key)
            for (key, value), child in zip(plain.items(), held(node).values(), strict=True)
        }
    for key, problem in revealed(plain, where, not_secret):
        raise SweepError(f"{key}: {problem}")
    return plain


def _unresolved(value: object, node: Node, where: str, option: str) -> object:
    """A value, but what comes from the environment as it was written, where it is resolved when it is used."""
    given = held(node)
    text = _followed(given, node) if isinstance(given, str) and "${" in given else ""
    if "oc.env" in text and option == _SHELL:
        return _for_shell(text, node, where)
    if is_secret(where) and isinstance(given, str) and text:
        return text if "oc.env" in text else given
    if "oc.env" in text and option in _KEPT:
        return _resolvable(text, where)
    if not isinstance(value, dict | list):
        return value
    content = held(node._dereference_node() if text else node)
    if isinstance(value, list):
        return [_unresolved(each, child, where, option) for each, child in zip(value, content, strict=True)]
    return {
        name: _unresolved(each, child, f"{where}.{name}", option)
        for (name, each), child in zip(value.items(), content.values(), strict=True)
    }


def _followed(text: str, node: Node) -> str:
    """An interpolation in which references are replaced by what is written where they lead to."""
    beside = node._get_parent_container()

    def written(found: re.Match[str]) -> str:
        assert beside is not None
        root, key = beside._resolve_key_and_root(found[1])
        parent, last, _ = root._select_impl(key, throw_on_missing=True, throw_on_resolution_failure=True)
        target = parent._get_node(last) if parent is not None else None
        if not isinstance(target, Node) or isinstance(raw := held(target), dict | list):
            return found[0]
        return _followed(raw, target) if isinstance(raw, str) else str(raw)

    return _REFERENCE.sub(written, text)


def _resolvable(text: str, where: str) -> str:
    """See that a text can be resolved elsewhere."""
    try:
        OmegaConf.to_container(OmegaConf.create({"text": text}), resolve=True)
        alone = _RESOLVERS.issuperset(_RESOLVER.findall(text))
    except OmegaConfBaseException:
        alone = False
    if not alone:
        raise SweepError(
            f"{where}: '{text}' is resolved where it is used, which has the environment and nothing of the config"
        )
    return text


def _for_shell(text: str, node: Node, where: str) -> str:
    """A line for a shell, which has the variables of the environment itself."""
    line = _ENV.sub(_shell_variable, text)
    if "oc.env" in line or "'" in line:
        raise SweepError(
            f"{where}: write ${{oc.env:NAME}} by itself and not between single quotes: the shell resolves it"
        )
    found = StringNode(line, parent=node._get_parent())._dereference_node()
    return str(found._value())


def _shell_variable(found: re.Match[str]) -> str:
    default = "" if found[2] is None else f"-{found[2].strip()}"
    return f"\\${{{found[1]}{default}}}"


def check_overrides(overrides: Sequence[str], not_secret: Sequence[str]) -> None:
    """See that no secret stands on the command line.

    Raises:
        SweepError: one does.
    """
    for each in OverridesParser.create().parse_overrides(list(overrides)):
        for key, problem in revealed(each.value(), each.key_or_group, not_secret):
            raise SweepError(f"{key}: {problem}")


def _direction(text: str | None, metric: str | None) -> Direction:
    if text is None:
        return usual_direction(metric or UNNAMED_METRIC)
    try:
        return Direction(text)
    except ValueError:
        raise SweepError(f"sweep.direction: '{text}' is not one of {', '.join(Direction)}") from None


def _positive(value: float, where: str) -> float:
    if not value > 0:
        raise SweepError(f"{where}: must be greater than 0, got {value:g}")
    return float(value)


def _positive_or_none(value: float | None, where: str) -> float | None:
    return None if value is None else _positive(value, where)


def _not_negative(value: _Number, where: str) -> _Number:
    if value is not None and value < 0:
        raise SweepError(f"{where}: must be at least 0, got {value}")
    return value


def _nodes(nodes: int, executor: str) -> int:
    if nodes < 1:
        raise SweepError(f"sweep.resources.nodes_per_trial: must be at least 1, got {nodes}")
    able = [name for name in sorted(executors.options()) if executors.spans_nodes(name)]
    if nodes > 1 and executor not in able:
        raise SweepError(
            f"sweep.resources.nodes_per_trial: {nodes} nodes need sweep/executor={' or '.join(able)},"
            f" this sweep has sweep/executor={executor}"
        )
    return nodes


def _gpu_share(gpus: float) -> float:
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise SweepError(
            f"sweep.resources.gpus_per_trial: must be a fraction up to 1 or a whole number, got {gpus:g}"
        )
    return gpus
