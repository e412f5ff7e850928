"""From a composed Hydra config to a sweep that can start: every trial expanded, composed and checked beforehand.

Nothing is written and nothing started here, except by :meth:`Submission.record`, which the sweep's lease protects.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from repro_sweep import history, specification
from repro_sweep.config import custom_space, optuna_sweeper
from repro_sweep.config.compose import Composer
from repro_sweep.config.space import Space
from repro_sweep.config.trials import TrialMaker
from repro_sweep.config.yamltext import to_yaml
from repro_sweep.errors import CompositionError, SweepError, UserError
from repro_sweep.executors import base as executors
from repro_sweep.failpoints import failpoint
from repro_sweep.ledger import FILE_NAME, Ledger
from repro_sweep.points import Parameter, Point
from repro_sweep.records import NewTrial
from repro_sweep.search import base as searchers
from repro_sweep.search.checks import check
from repro_sweep.states import StepKind, TrialState
from repro_sweep.sweep import SearchSpec, SweepSpec, TaskSpec
from repro_sweep.tracking.uri import check_writable

_SHOWN_PROBLEMS = 10
_MANY = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A sweep that is ready to start.

    ``new`` are the trials that its ledger does not hold; ``again`` the numbers of those that it holds unfinished or
    failed, ``withdrawn`` those it holds unfinished that are no part of the sweep any more; ``done`` counts the
    finished ones, ``cancelled`` those that the user has cancelled.

    A search has no ``new`` ones: they are asked for while it runs. ``parameters`` are what it chooses; ``begin`` is the
    first step of one that is new, or differs from what its ledger holds; ``notices`` are for the user.
    ``for_optuna_sweeper``: the application was written for hydra-optuna-sweeper, and may want its file of results.
    ``outlook``: what the executor says of its workers; there are no problems in it.
    """

    spec: SweepSpec
    new: tuple[NewTrial, ...]
    again: tuple[int, ...]
    withdrawn: tuple[int, ...]
    done: int
    duplicates: int
    cancelled: int = 0
    parameters: tuple[Parameter, ...] = ()
    begin: Mapping[str, Any] | None = None
    notices: tuple[str, ...] = ()
    for_optuna_sweeper: bool = False
    outlook: executors.Outlook = field(default_factory=executors.Outlook)

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
        if self.begin is not None:
            ledger.add_step(StepKind.BEGIN, self.begin)
            ledger.set_search_hours(0.0)
        ledger.set_search_over(None)
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
    options = specification.sweep_options(config)
    task_overrides, sweep_overrides = specification.split_overrides(arguments)
    asked = optuna_sweeper.translate(
        config.hydra.sweeper, task_overrides, sampler_is_named=specification.is_ours(config)
    )
    options.name = options.name or asked.name
    name = specification.name_of(options, config)
    sampler = specification.adopt(options, config, asked)
    if specification.is_ours(config):
        options.name = name  # for interpolations such as hydra.sweep.dir=out/${sweep.name}
    directory = specification.directory_of(config, name)
    task_spec = specification.task_of(options, found)
    composition = specification.composition_with(config, loader, directory)
    specification.check_overrides(composition.hydra_overrides, options.not_secret)
    composer = Composer(composition, loader=loader)
    if sweep_overrides:
        _check_confined(config, composer, task_overrides)
    spec = specification.specify(
        options,
        config,
        name,
        directory,
        task_spec,
        composition,
        task_overrides,
        sampler,
        asked.params,
        command,
    )
    _check_startable(spec)
    expansion = _Expansion(spec, TrialMaker(composer, task_spec.name, spec.repeats, task_overrides, spec))
    space = Space(
        params=options.params,
        zip_=options.zip,
        exclude=options.exclude,
        repeats=options.repeats,
        overrides=task_overrides,
        hydra_params=asked.params,  # type: ignore[arg-type]  # as the config has them
        config_loader=loader,
        search=spec.search is not None,
        extended=spec.search is not None and spec.search.custom_search_space is not None,
    )
    if spec.search is not None:
        if spec.search.custom_search_space is not None:
            custom_space.resolve(spec.search.custom_search_space)
        ready = expansion.search(space, spec.search)
        ready = replace(ready, notices=(*asked.notices, *ready.notices), for_optuna_sweeper=asked.search)
        return _look_ahead(ready)
    check(space, spec)
    searcher = searchers.load(spec.sampler).searcher(space)  # type: ignore[call-arg]  # a grid's only argument
    assert isinstance(searcher, searchers.Searcher)
    return _look_ahead(expansion.run(iter(searcher.ask, None)))


def _look_ahead(ready: Submission) -> Submission:
    """See that the workers can be started, where there is anything to run.

    Raises:
        SweepError: they cannot; with all reasons.
    """
    search = ready.spec.search
    trials = ready.to_run if search is None else search.budget.trials or _MANY
    if not trials:
        return ready
    outlook = executors.create(ready.spec).outlook(trials)
    if outlook.problems:
        raise SweepError("\n".join(outlook.problems))
    return replace(ready, outlook=outlook)


class _Expansion:
    """Composes and checks each point and compares it with what the ledger holds."""

    def __init__(self, spec: SweepSpec, maker: TrialMaker) -> None:
        self._maker = maker
        self._known: dict[str, tuple[int, TrialState]] = {}
        self._number = 0
        self._taken: dict[str, int] = {}
        self._cancelled: frozenset[int] = frozenset()
        self._search: history.Earlier | None = None
        directory = Path(spec.directory)
        if (directory / FILE_NAME).exists():
            ledger = Ledger.open(directory, readonly=True)
            self._known = ledger.identities()
            self._number = ledger.next_number()
            self._taken = ledger.directories()
            self._cancelled = ledger.cancelled
            self._search = history.earlier(ledger)
            spec = spec.model_copy(
                update={"sweep_id": ledger.spec.sweep_id, "created_at": ledger.spec.created_at}
            )
            ledger.close()
        self._spec = spec
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

    def search(self, space: Space, search: SearchSpec) -> Submission:
        """Check a search's space by some of its points; find out whether it is one that the ledger holds."""
        notices = check(space, self._spec)
        for points in space.probes():
            self._probe(points[0])
        self._raise_problems()
        self._check_search_directories(space)
        search = history.same_seed(search, self._search)
        spec = self._spec.model_copy(update={"search": search})
        begin = history.begin(spec, space, self._search, first=self._number)
        apart = set() if begin is None else {number for number, _ in self._known.values()}
        unfinished = {
            number for number, state in self._known.values() if not state.is_done()
        } - self._cancelled
        return Submission(
            spec=spec,
            new=(),
            again=tuple(sorted(unfinished - apart)),
            withdrawn=tuple(sorted(unfinished & apart)),
            done=sum(state.is_done() for number, state in self._known.values() if number not in apart),
            duplicates=0,
            cancelled=len(self._cancelled - apart),
            parameters=space.parameters(),
            begin=begin,
            notices=tuple(notices),
        )

    def _probe(self, point: Point) -> None:
        """Note what is wrong with a point's config; what is wrong with a key is the same for all of its values."""
        try:
            self._maker.make(point, self._number)
        except CompositionError as error:
            text = str(error)
            for override in point.overrides:
                text = text.replace(override, f"{override.partition('=')[0]}=…")
            self._problems.update(text.splitlines())

    def _check_search_directories(self, space: Space) -> None:
        """Two trials must not share a directory, whatever their points are."""
        if self._maker.custom_subdir:
            points = next(space.probes())
            self._check_directories(self._maker.make(points[0], self._number + i) for i in (0, 1))

    def _trial(self, point: Point) -> NewTrial | None:
        try:
            return self._maker.make(point, self._number)
        except CompositionError as error:
            self._problems.update(str(error).splitlines())
            return None

    def _check_directories(self, trials: Iterable[NewTrial]) -> None:
        for trial in trials if self._maker.custom_subdir else ():
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


def _only(config: DictConfig, key: str) -> DictConfig:
    return OmegaConf.masked_copy(config, [key])


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
    if spec.detach and executors.coordinator_job(spec) is None:
        raise SweepError(
            f"sweep.detach: sweep/executor={spec.executor_name} runs where the command does; choose one that submits"
            " jobs, such as sweep/executor=slurm"
        )
