"""A search by one of Optuna's samplers, over a study in memory that is rebuilt by making the same calls again.

Optuna remembers nothing between two processes here, and its samplers' random numbers are not saved: a suggestion is a
function of the seed and of the calls before it. See ``samplers`` for how that comes about.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from repro_sweep.errors import ReproSweepError, SpaceError, SweepError
from repro_sweep.points import Categorical, Domain, FloatRange, IntRange, Parameter, Point, Scalar
from repro_sweep.search import pruning, samplers, targets
from repro_sweep.search.base import Search, SearchSpace, Suggestion
from repro_sweep.states import TrialState
from repro_sweep.sweep import Chosen, SweepSpec

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*", re.ASCII)
_RESERVED = frozenset({"true", "false", "null", "inf", "nan"})
_UNKNOWN = math.inf
"""The violation of a constraint whose metric is not known: nothing says that the point is feasible."""


class OptunaSearch(Search):
    """Suggests points as one of Optuna's samplers does.

    Not safe for several threads. Suggestions that run count (constant liar) where the sampler can.

    Args:
        space: what to choose from.
        sweep: with its ``search``.
        pruner: what :meth:`should_prune` asks; None or the name none never prunes.
        extend: adds parameters by calling ``trial.suggest_*``; they become overrides of every point.

    Raises:
        SweepError: the options of the sampler or the pruner cannot be used.
    """

    def __init__(
        self,
        space: SearchSpace,
        sweep: SweepSpec,
        *,
        pruner: Chosen | None,
        extend: Callable[[object], None] | None = None,
    ) -> None:
        from repro_sweep.search import memory

        assert sweep.search is not None
        self._space = space
        self._spec = sweep.search
        self._extend = extend
        self._stateless = self._spec.sampler.name in samplers.STATELESS
        self._pruner = None if pruner is None or pruner.name == pruning.NONE else pruner
        self._study, self._storage = memory.create(
            sweep.name,
            [objective.direction.value for objective in sweep.all_objectives],
            pruning.build(pruner),
            self._sampler(self._spec.seed),
        )
        self._several = len(sweep.all_objectives) > 1
        self._trials: list[optuna.Trial] = []
        self._pruned: set[int] = set()

    def ask(self) -> Suggestion | None:
        """The sampler's next suggestion; None if it has no more, as only ``bruteforce`` ever has.

        Raises:
            SweepError: somebody else's sampler failed.
            SpaceError: a point to try first is not in the space.
        """
        if self._study.stopped:
            return None
        number = len(self._trials)
        fixed = self._enqueued(number)
        if self._stateless:
            self._study.sampler = self._sampler(samplers.fresh_seed(self._spec.seed, number))
        suggestion = self._suggest(fixed)
        if fixed is None and self._is_exhausted(number):
            self._study.stop()
            self._finish(self._trials.pop(), TrialState.FAIL, None, ())
            return None
        return suggestion

    def restore(self, values: Mapping[str, Scalar]) -> Suggestion:
        """The next suggestion has been made before, and was this one.

        A sampler that counts, caches or draws as it goes makes it again.

        Raises:
            SpaceError: the space does not have it.
            SweepError: the sampler suggests something else now.
        """
        number = len(self._trials)
        if self._stateless:
            suggestion = self._suggest(values, recorded=values)
        else:
            suggestion = self._suggest(self._enqueued(number))
        if dict(suggestion.values) != dict(values):
            if self._stateless:
                raise SpaceError(f"suggestion {number}: the space has no point {dict(values)!r}")
            import optuna

            raise SweepError(
                f"sweep/sampler={self._spec.sampler.name}: the search cannot be replayed: suggestion {number} was "
                f"{dict(values)!r}, and is {dict(suggestion.values)!r} with optuna {optuna.__version__} here"
                " (have versions of packages changed?)"
            )
        return suggestion

    def tell(
        self, number: int, state: TrialState, values: Sequence[float] | None, violations: Sequence[float] = ()
    ) -> None:
        """Suggestion ``number`` came to ``state``; a later call replaces an earlier one.

        COMPLETE without values, or with NaN, counts as FAIL, as in Optuna; infinite values are values.

        Raises:
            SweepError: somebody else's sampler failed.
        """
        trial = self._trials[number]
        if self._is_finished(trial):
            self._storage.reopen(trial._trial_id)
        self._finish(trial, state, values, violations)

    def report(self, number: int, step: int, value: float, *, decide: bool = True) -> None:
        """The first objective's value at a step of suggestion ``number``; the first one of a step is kept.

        What the pruner makes of it is decided here, and stands: asking for it changes nothing. With several
        objectives there is nothing to decide. Of a suggestion that had failed and runs again nothing is taken, as the
        sampler has already counted it.
        """
        trial = self._trials[number]
        if self._several or step < 0 or self._is_finished(trial):
            return
        with samplers.quiet():
            trial.report(value, step)
            if pruning.must_decide(self._pruner, decide=decide) and trial.should_prune():
                self._pruned.add(number)

    def should_prune(self, number: int) -> bool:
        """Whether suggestion ``number`` is not worth going on with, by what was reported."""
        return number in self._pruned

    def learn(
        self,
        values: Mapping[str, Scalar],
        state: TrialState,
        objectives: Sequence[float],
        violations: Sequence[float] = (),
    ) -> None:
        """Put a result from elsewhere into the study.

        What failed, is not in the space, or may violate constraints for all that is known, is no help and is left out.
        """
        import optuna

        distributions = self._distributions(values)
        unknown = len(violations) != len(self._spec.constraints) or any(map(math.isnan, objectives))
        if distributions is None or unknown or state not in (TrialState.COMPLETE, TrialState.PRUNED):
            return
        pruned = state is TrialState.PRUNED
        with samplers.quiet():
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState[state.name],
                    values=None if pruned and self._several else list(objectives) or None,
                    params={name: values[name] for name in distributions},
                    distributions=distributions,
                    intermediate_values=(
                        {0: objectives[0]} if pruned and objectives and not self._several else None
                    ),
                    constraints=self._constraints(violations),
                )
            )

    def _sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        chosen = self._spec.sampler
        return samplers.build(chosen.name, chosen.options, seed)

    def _enqueued(self, number: int) -> dict[str, Scalar] | None:
        """What is fixed of suggestion ``number``."""
        if number >= len(self._spec.enqueue):
            return None
        return self._space.assign_partial(self._spec.enqueue[number], where=f"sweep.enqueue[{number}]")

    def _suggest(
        self, fixed: Mapping[str, Scalar] | None, recorded: Mapping[str, Scalar] | None = None
    ) -> Suggestion:
        """Make the next suggestion, with some or (``recorded``) all of its values fixed."""
        number = len(self._trials)
        with self._guarded(2 * number):
            if fixed:
                self._study.enqueue_trial(dict(fixed))
            trial = self._study.ask()
            self._trials.append(trial)

            def choose(parameter: Parameter) -> Scalar:
                if recorded is not None and not _holds(parameter, recorded):
                    raise SpaceError(f"suggestion {number}: the space has no point {dict(recorded)!r}")
                return _suggest(trial, parameter)

            points = self._space.draw(choose)
            if points and self._extend is not None:
                points = self._extended(trial, points, self._extend)
        if self._stateless:
            # what a sampler notes there holds values of parameters that this point does not have, and a search that
            # is made again would lack it
            for key in self._storage.get_trial(trial._trial_id).system_attrs:
                self._storage.set_trial_system_attr(trial._trial_id, key, "")
        if not points:
            self._finish(trial, TrialState.FAIL, None, ())
        return Suggestion(values=trial.params, points=points)

    def _extended(
        self, trial: optuna.Trial, points: tuple[Point, ...], extend: Callable[[object], None]
    ) -> tuple[Point, ...]:
        """The points with what the user's function adds."""
        before = set(trial.params)
        try:
            extend(trial)
        except ReproSweepError:
            raise
        except Exception as error:
            raise SweepError(
                f"sweep.custom_search_space: it raised {type(error).__name__}: {targets.one_line(error)}"
            ) from error
        added = {name: value for name, value in trial.params.items() if name not in before}
        overrides = tuple(f"{name}={_text(value)}" for name, value in added.items())
        plain = {name.lstrip("+~"): value for name, value in added.items()}
        return tuple(
            replace(point, overrides=point.overrides + overrides, params={**point.params, **plain})
            for point in points
        )

    def _is_exhausted(self, number: int) -> bool:
        """Whether brute force has begun again: it repeats a point only when none is left."""
        if self._spec.sampler.name != "bruteforce":
            return False
        trial = self._trials[number]
        earlier = self._study.get_trials(deepcopy=False)[: trial.number]
        return any(other.params == trial.params for other in earlier)

    def _finish(
        self,
        trial: optuna.Trial,
        state: TrialState,
        values: Sequence[float] | None,
        violations: Sequence[float],
    ) -> None:
        import optuna

        complete = state is TrialState.COMPLETE and bool(values) and not any(map(math.isnan, values or ()))
        with self._guarded(2 * trial.number + 1):
            if complete or violations:
                for key, violation in self._constraints(violations).items():
                    trial.set_constraint(key, violation)
            if complete:
                self._study.tell(trial, values)
            elif state is TrialState.PRUNED:
                self._note_last_value(trial, values)
                self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                self._study.tell(trial, state=optuna.trial.TrialState.FAIL)

    def _note_last_value(self, trial: optuna.Trial, values: Sequence[float] | None) -> None:
        """Samplers look for a pruned trial's value among those that were reported."""
        if not self._several and values and not self._frozen(trial).intermediate_values:
            trial.report(values[0], 0)

    def _constraints(self, violations: Sequence[float]) -> dict[str, float]:
        """One for each constraint, as Optuna wants it: some samplers do not work where one is missing."""
        named = [
            f"{index}: {item.metric} {item.operator} {item.bound}"
            for index, item in enumerate(self._spec.constraints)
        ]
        known = list(violations) if len(violations) == len(named) else [_UNKNOWN] * len(named)
        return {
            name: _UNKNOWN if math.isnan(value) else float(value)
            for name, value in zip(named, known, strict=True)
        }

    def _distributions(self, values: Mapping[str, Scalar]) -> dict[str, BaseDistribution] | None:
        """Of the parameters of the point with these values; None where the space does not have it."""
        found: dict[str, BaseDistribution] = {}

        def choose(parameter: Parameter) -> Scalar:
            if not _holds(parameter, values):
                raise LookupError(parameter.name)
            found[parameter.name] = _distribution(parameter.domain)
            return values[parameter.name]

        try:
            with samplers.quiet():
                self._space.draw(choose)
        except LookupError:
            return None
        return found

    def _frozen(self, trial: optuna.Trial) -> optuna.trial.FrozenTrial:
        return self._storage.get_trial(trial._trial_id)

    def _is_finished(self, trial: optuna.Trial) -> bool:
        return self._frozen(trial).state.is_finished()

    @contextmanager
    def _guarded(self, call: int) -> Iterator[None]:
        """Around everything that a sampler does; ``call`` numbers these, for somebody else's sampler's sake."""
        with samplers.quiet():
            if self._spec.sampler.name != samplers.BY_TARGET:
                yield
                return
            with samplers.seeded_globally(samplers.fresh_seed(self._spec.seed, call)):
                try:
                    yield
                except ReproSweepError:
                    raise
                except Exception as error:
                    name = type(self._study.sampler).__name__
                    raise SweepError(
                        f"sweep.sampler: {name} failed: {type(error).__name__}: {targets.one_line(error)}"
                    ) from error


def _suggest(trial: optuna.Trial, parameter: Parameter) -> Scalar:
    """What Optuna chooses for a parameter."""
    name, domain = parameter.name, parameter.domain
    if isinstance(domain, Categorical):
        chosen: Scalar = trial.suggest_categorical(name, domain.choices)
        return chosen
    if isinstance(domain, IntRange):
        return trial.suggest_int(name, domain.low, domain.high, step=domain.step, log=domain.log)
    return trial.suggest_float(name, domain.low, domain.high, step=domain.step, log=domain.log)


def _distribution(domain: Domain) -> BaseDistribution:
    import optuna

    if isinstance(domain, Categorical):
        return optuna.distributions.CategoricalDistribution(domain.choices)
    if isinstance(domain, IntRange):
        return optuna.distributions.IntDistribution(domain.low, domain.high, log=domain.log, step=domain.step)
    return optuna.distributions.FloatDistribution(domain.low, domain.high, log=domain.log, step=domain.step)


def _holds(parameter: Parameter, values: Mapping[str, Scalar]) -> bool:
    """Whether the parameter has a value there, and may have it."""
    if parameter.name not in values:
        return False
    value, domain = values[parameter.name], parameter.domain
    if isinstance(domain, Categorical):
        return any(choice == value and type(choice) is type(value) for choice in domain.choices)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or (isinstance(value, float) and isinstance(domain, FloatRange))):
        return False
    contains: bool = _distribution(domain)._contains(value)  # type: ignore[arg-type]
    return contains


def _text(value: Any) -> str:
    """A value as Hydra's override grammar writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str) or (_BARE.fullmatch(value) and value.lower() not in _RESERVED):
        return str(value)
    # backslashes escape only quotes, and themselves before a quote
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"
