"""From a composed Hydra config to a sweep that can start: every trial expanded, composed and checked beforehand.

Nothing is written and nothing started here, except by :meth:`Submission.record`, which the sweep's lease protects.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from repro_sweep import machine, task
from repro_sweep.config.compose import Composer, composition_of
from repro_sweep.config.identity import check, identity
from repro_sweep.config.schema import SweepConf
from repro_sweep.config.space import Space
from repro_sweep.config.yamltext import to_yaml
from repro_sweep.errors import CompositionError, SweepError, UserError
from repro_sweep.executors import base as executors
from repro_sweep.failpoints import failpoint
from repro_sweep.ledger import FILE_NAME, Ledger
from repro_sweep.points import Point
from repro_sweep.provenance.source import code_fingerprint, git_state
from repro_sweep.records import NewTrial, now
from repro_sweep.search import base as searchers
from repro_sweep.standings import usual_direction
from repro_sweep.states import Direction, FailureKind, TrialState
from repro_sweep.sweep import (
    UNNAMED_METRIC,
    Composition,
    Limits,
    Origin,
    Resources,
    SweepSpec,
    TaskSpec,
    Tracking,
)
from repro_sweep.tracking.uri import check_writable, resolve_uri

_HYDRA_DIR = "multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}"
_HYDRA_SUBDIR = "${hydra.job.num}"
_SUBDIR = "trials/${hydra.job.num}"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHOWN_PROBLEMS = 10
_Number = TypeVar("_Number", int | None, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A sweep that is ready to start.

    ``new`` are the trials that its ledger does not hold; ``again`` the numbers of those that it holds unfinished or
    failed, ``withdrawn`` those it holds unfinished that are no part of the sweep any more; ``done`` counts the
    finished ones, ``cancelled`` those that the user has cancelled.
    """

    spec: SweepSpec
    new: tuple[NewTrial, ...]
    again: tuple[int, ...]
    withdrawn: tuple[int, ...]
    done: int
    duplicates: int
    cancelled: int = 0

    @property
    def to_run(self) -> int:
        """How many trials will run."""
        return len(self.new) + len(self.again)

    def record(self, ledger: Ledger) -> None:
        """Write the sweep into its ledger, whose lease is held.

        Raises:
            LedgerError: it cannot be written.
            SweepError: another command has changed the sweep since it was prepared.
        """
        # The sweep may have gone on since this was prepared: the lease is held only now.
        known = dict(ledger.states())
        if any(trial.number in known for trial in self.new):
            raise SweepError(f"sweep '{self.spec.name}' has changed meanwhile; give the same command again")
        ledger.update_spec(self.spec)
        ledger.set_withdrawn(self.withdrawn)
        ledger.requeue(self.again)
        ledger.add_trials(self.new)
        failpoint("record.before_commit")
        ledger.commit()
        failpoint("record.committed")


def prepare(
    config: DictConfig, loader: ConfigLoader, arguments: Sequence[str], found: TaskSpec | None, command: str
) -> Submission:
    """Expand, compose and check a sweep.

    Args:
        config: the master config that Hydra composed (a sweeper's ``setup`` gets it).
        loader: Hydra's config loader.
        arguments: the task's overrides, as a sweeper's ``sweep`` gets them.
        found: the task function that Hydra handed over; None where the sweep itself names its task.
        command: the command line, for the record.

    Raises:
        UserError: anything that the user must change first.
    """
    options = sweep_options(config)
    task_overrides, sweep_overrides = split_overrides(arguments)
    name = _name(options, config)
    if _is_ours(config):
        options.name = name  # for interpolations such as hydra.sweep.dir=out/${sweep.name}
    directory = _directory(config, name)
    task_spec = _task(options, found)
    composition = _composition(config, loader, directory)
    composer = Composer(composition, loader=loader)
    space = Space(
        params=options.params,
        zip_=options.zip,
        exclude=options.exclude,
        repeats=options.repeats,
        overrides=task_overrides,
        hydra_params=config.hydra.sweeper.get("params"),
        config_loader=loader,
    )
    if sweep_overrides:
        _check_confined(config, composer, task_overrides)
    spec = _spec(options, config, name, directory, task_spec, composition, command)
    _check_startable(spec)
    sampler = searchers.load(spec.sampler)
    searcher = sampler.searcher(space)  # type: ignore[call-arg]  # a grid's only argument
    return _Expansion(spec, composer, _fixed(task_overrides)).run(iter(searcher.ask, None))


class _Expansion:
    """Composes and checks each point and compares it with what the ledger holds."""

    def __init__(self, spec: SweepSpec, composer: Composer, fixed: Mapping[str, object]) -> None:
        self._composer = composer
        self._fixed = fixed
        self._known: dict[str, tuple[int, TrialState]] = {}
        self._number = 0
        self._taken: dict[str, int] = {}
        self._cancelled: frozenset[int] = frozenset()
        directory = Path(spec.directory)
        if (directory / FILE_NAME).exists():
            ledger = Ledger.open(directory, readonly=True)
            self._known = ledger.identities()
            self._number = ledger.next_number()
            self._taken = ledger.directories()
            self._cancelled = ledger.cancelled
            spec = spec.model_copy(
                update={"sweep_id": ledger.spec.sweep_id, "created_at": ledger.spec.created_at}
            )
            ledger.close()
        self._spec = spec
        self._custom_subdir = _custom_subdir(composer)
        self._problems: Counter[str] = Counter()

    def run(self, points: Iterable[Point]) -> Submission:
        """Expand all points; every problem of any of them is in the error."""
        new: dict[str, NewTrial] = {}
        mine: set[str] = set()
        duplicates = 0
        for point in points:
            trial = self._trial(point)
            if trial is None:
                continue
            if trial.identity in mine:
                duplicates += 1
                continue
            mine.add(trial.identity)
            if trial.identity not in self._known:
                new[trial.identity] = trial
                self._number += 1
        self._raise_problems()
        self._check_directories(new.values())
        known = self._known.items()
        unfinished = [
            (key, number)
            for key, (number, state) in known
            if not state.is_done() and number not in self._cancelled
        ]
        return Submission(
            spec=self._spec,
            new=tuple(new.values()),
            again=tuple(sorted(number for key, number in unfinished if key in mine)),
            withdrawn=tuple(sorted(number for key, number in unfinished if key not in mine)),
            done=sum(state.is_done() for key, (_, state) in known if key in mine),
            duplicates=duplicates,
            cancelled=sum(number in self._cancelled for key, (number, _) in known if key in mine),
        )

    def _trial(self, point: Point) -> NewTrial | None:
        try:
            config = self._composer.compose(point.overrides)
            checked = check(config, hydra=self._composer.hydra(point.overrides))
        except CompositionError as error:
            self._problems[str(error)] += 1
            return None
        if checked.problems:
            self._problems.update(str(problem) for problem in checked.problems)
            return None
        return NewTrial(
            number=self._number,
            identity=identity(self._spec.task.name, checked.container),
            point=identity(self._spec.task.name, _without(checked.container, self._spec.repeats)),
            directory=self._directory(point),
            overrides=point.overrides,
            params={
                **point.params,
                **{key: self._fixed[key] for key in self._fixed if key not in point.repeat},
            },
            repeat=point.repeat,
            config=checked.yaml,
        )

    def _directory(self, point: Point) -> str:
        if not self._custom_subdir:
            return f"trials/{self._number}"
        job = self._composer.job_config(
            point.overrides, num=self._number, job_id=str(self._number), output_dir="."
        )
        try:
            return str(job.hydra.sweep.subdir)
        except OmegaConfBaseException as error:
            self._problems[f"hydra.sweep.subdir: {str(error).splitlines()[0]}"] += 1
            return ""

    def _check_directories(self, trials: Iterable[NewTrial]) -> None:
        for trial in trials if self._custom_subdir else ():
            other = self._taken.setdefault(trial.directory, trial.number)
            if other != trial.number:
                raise SweepError(
                    f"hydra.sweep.subdir: trials {other} and {trial.number} would share {trial.directory};"
                    " put ${hydra.job.num} into it"
                )

    def _raise_problems(self) -> None:
        if not self._problems:
            return
        shown = [
            f"{problem}" + (f"  ({count} trials)" if count > 1 else "")
            for problem, count in self._problems.most_common(_SHOWN_PROBLEMS)
        ]
        more = len(self._problems) - len(shown)
        if more > 0:
            shown.append(f"and {more} other problems")
        raise CompositionError("\n".join(shown))


def sweep_options(config: DictConfig) -> SweepConf:
    """The typed options of the sweep; the defaults where the application has no sweep node of ours.

    Raises:
        SweepError: an option is missing or cannot be resolved.
    """
    if not _is_ours(config):
        defaults = SweepConf(
            sampler=searchers.load("grid").options(), executor=executors.load("local").OPTIONS()
        )
        return OmegaConf.structured(defaults)  # type: ignore[no-any-return]
    node: SweepConf = config.sweep
    try:
        missing = OmegaConf.missing_keys(node)
        OmegaConf.to_container(config.sweep, resolve=True)
    except OmegaConfBaseException as error:
        raise SweepError(f"sweep: {str(error).splitlines()[0]}") from error
    if missing:
        first = min(missing)
        raise SweepError(
            f"sweep.{first}: has no value; put '{first}: …' into the defaults of the sweep's YAML"
        )
    return node


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


def _fixed(arguments: Sequence[str]) -> dict[str, object]:
    """What the command line sets for all trials; rankings show it, as another command may set something else."""
    parsed = OverridesParser.create().parse_overrides(list(arguments))
    return {
        override.key_or_group: override.get_value_string()
        if isinstance(override.value(), QuotedString | dict | list)
        else override.value()
        for override in parsed
        if not (override.is_sweep_override() or override.is_delete() or override.is_hydra_override())
    }


def _is_ours(config: DictConfig) -> bool:
    return "sweep" in config and OmegaConf.get_type(config, "sweep") is SweepConf


def _name(options: SweepConf, config: DictConfig) -> str:
    name = options.name or (config.hydra.runtime.choices.get("sweep") if _is_ours(config) else None)
    name = str(name or config.hydra.job.name)
    if not _NAME.fullmatch(name):
        raise SweepError(f"sweep.name: '{name}' must consist of letters, digits, '.', '_' and '-'")
    return name


def _directory(config: DictConfig, name: str) -> Path:
    if _raw_sweep(config)["dir"] == _HYDRA_DIR:
        return Path.cwd() / "multirun" / name
    try:
        return Path.cwd() / str(config.hydra.sweep.dir)
    except OmegaConfBaseException as error:
        raise SweepError(f"hydra.sweep.dir: {str(error).splitlines()[0]}") from error


def _composition(config: DictConfig, loader: ConfigLoader, directory: Path) -> Composition:
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
        chosen.append(f"hydra.sweep.subdir={_SUBDIR}")
    composition = composition_of(config, loader, strip=("sweep",) if _is_ours(config) else ())
    return composition.model_copy(update={"hydra_overrides": (*composition.hydra_overrides, *chosen)})


def _raw_sweep(config: DictConfig) -> dict[Any, Any]:
    raw = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    assert isinstance(raw, dict)
    return raw


def _custom_subdir(composer: Composer) -> bool:
    return f"hydra.sweep.subdir={_SUBDIR}" not in composer.spec.hydra_overrides


def _task(options: SweepConf, found: TaskSpec | None) -> TaskSpec:
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


def _check_confined(config: DictConfig, composer: Composer, overrides: Sequence[str]) -> None:
    """The sweep's file must set nothing outside of its own node: a trial is composed without it."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    fixed = [override.input_line or "" for override in parsed if not override.is_sweep_override()]
    try:
        without = composer.compose(fixed)
    except UserError:
        return  # a choice that only the sweep's params make; each trial is checked anyway
    for key in {str(key) for key in config} - {"hydra", "sweep"}:
        if key not in without or to_yaml(_only(config, key)) != to_yaml(_only(without, key)):
            raise SweepError(
                f"sweep: the sweep's file also sets '{key}', outside of its own node;"
                " put that under sweep.params or on the command line"
            )


def _without(container: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A resolved config without some dotted keys, which are no part of what its repeats have in common."""
    rest = dict(container)
    for key in keys:
        first, _, below = key.partition(".")
        if below and isinstance(rest.get(first), dict):
            rest[first] = _without(rest[first], [below])
        elif not below:
            rest.pop(first, None)
    return rest


def _only(config: DictConfig, key: str) -> DictConfig:
    return OmegaConf.masked_copy(config, [key])


def _spec(
    options: SweepConf,
    config: DictConfig,
    name: str,
    directory: Path,
    task_spec: TaskSpec,
    composition: Composition,
    command: str,
) -> SweepSpec:
    git = git_state(Path.cwd())
    choices = config.hydra.runtime.choices
    cwd = Path.cwd()
    gpus = options.resources.gpus_per_trial
    if gpus is None:
        gpus = 1.0 if machine.inspect().gpus else 0.0
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
        ),
        tracking=Tracking(
            uri=resolve_uri(options.tracking.uri, cwd, os.environ),
            experiment=options.tracking.experiment or name,
        ),
        origin=Origin.here(
            command, git_commit=git.commit if git else None, git_dirty=git.dirty if git else None
        ),
        metric=options.metric,
        direction=_direction(options.direction, options.metric),
        executor_name=str(choices.get("sweep/executor") or "local"),
        executor=_plain(options.executor),
        sampler=str(choices.get("sweep/sampler") or "grid"),
        max_failures=_not_negative(options.max_failures, "sweep.max_failures"),
        log_limit_mb=_positive(options.log_limit_mb, "sweep.log_limit_mb"),
        created_at=now(),
        repeats=tuple(str(key).lstrip("+") for key in options.repeats),
        limits=_limits(options),
        code=code_fingerprint(cwd),
        reuse=options.reuse,
    )


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


def _plain(node: object) -> dict[str, object]:
    container = (
        OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig | ListConfig) else {}
    )
    plain: dict[str, object] = json.loads(json.dumps(container))
    return plain


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


def _gpu_share(gpus: float) -> float:
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise SweepError(
            f"sweep.resources.gpus_per_trial: must be a fraction up to 1 or a whole number, got {gpus:g}"
        )
    return gpus


def _check_startable(spec: SweepSpec) -> None:
    """What would fail at the start fails now: the directory, the store, the resources."""
    directory = Path(spec.directory)
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise SweepError(
            f"hydra.sweep.dir: {directory} cannot be written ({existing} is not a writable directory)"
        )
    check_writable(spec.tracking.uri)
    executors.create(spec)
