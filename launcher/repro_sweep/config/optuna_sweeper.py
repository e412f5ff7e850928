"""Applications written for hydra-optuna-sweeper: what their ``hydra.sweeper`` node means as options of a sweep.

The keys are those of hydra-optuna-sweeper 1.2 (``hydra_plugins/hydra_optuna_sweeper/config.py``), and
``max_failure_rate`` of its later versions. What has no equivalent is named in a notice and ignored, unless it has its
default there. Nothing here composes a config, or knows the ``sweep`` node, whose options go before these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum

import yaml
from hydra.core.override_parser.types import Override, RangeSweep
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from repro_sweep.config.grammar import Grammar, key_name
from repro_sweep.config.optuna_samplers import DEFAULT_TRIALS, sampler_of
from repro_sweep.errors import SpaceError, SweepError
from repro_sweep.states import Direction
from repro_sweep.sweep import Chosen

_WHERE = "hydra.sweeper"
_OURS = frozenset({"params", "plan"})
_DISTRIBUTION = ("type", "choices", "low", "high", "log", "step")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """What a ``hydra.sweeper`` node asks for; an option of the ``sweep`` node that is given goes before it.

    ``search``: it asks for a search, by any key of hydra-optuna-sweeper's besides ``params``, or by an interval in
    ``params`` or on the command line; if not, ``params`` is a grid, as in Hydra. ``params`` are for
    ``SpaceSpec.hydra_params``, their interpolations unresolved. ``directions``: one for each objective; none where none
    is given, which means ``minimize`` in hydra-optuna-sweeper. ``trials``: as ``sweep.budget.trials``; None where it is
    not given, which means ``DEFAULT_TRIALS`` there. ``sampler``: as ``sweep/sampler=NAME`` with all of its options, the
    seed among them (null where none is given); None where nothing asks for a search or for the grid sampler.
    ``max_failures``, ``slots`` (``n_jobs``) and ``name`` (``study_name``) are None where they are not given.
    ``custom_search_space`` is for :mod:`repro_sweep.config.custom_space`. ``notices`` are lines for the user.
    """

    search: bool
    params: Mapping[str, object]
    directions: tuple[Direction, ...] = ()
    trials: int | None = None
    sampler: Chosen | None = None
    max_failures: int | None = None
    slots: int | None = None
    name: str | None = None
    custom_search_space: str | None = None
    notices: tuple[str, ...] = ()


def translate(
    node: DictConfig, overrides: Sequence[str] = (), *, sampler_is_named: bool = False
) -> Translation:
    """What the node means.

    Args:
        node: ``hydra.sweeper`` of the master config, by the schema ``SweeperConf``.
        overrides: the task's own on the command line, whose intervals and ranges count as those in ``params`` do.
        sampler_is_named: a ``sweep`` node says what kind of sweep it is, so that an interval alone does not.

    Raises:
        SweepError: a value cannot be used.
    """
    given = _given(node)
    params = _params(node)
    swept = _swept(params, overrides)
    trials = _count(given, "n_trials")
    notices = list(_unused(given, node))
    name = given.get("study_name")
    slug = None if name is None else _NOT_IN_NAMES.sub("-", str(name)).strip("-._") or "study"
    if slug != name:
        notices.append(f"{_WHERE}.study_name: {name!r} cannot be a sweep's name; it is called {slug!r}")
    sampler: Chosen | None = None
    intervals = [where for where, override in swept if override.is_interval_sweep()]
    if given or (intervals and not sampler_is_named):
        sampler, about_sampler = sampler_of(given.get("sampler"), trials)
        notices += about_sampler
        if not given:
            notices.append(
                f"{intervals[0]}: an interval makes this a search, of {DEFAULT_TRIALS} trials ({_WHERE}.n_trials)"
            )
        if sampler.name not in ("grid", "bruteforce"):  # GridSampler left the ends out
            notices += filter(None, (_range_notice(where, override) for where, override in swept))
    return Translation(
        search=sampler is not None and sampler.name != "grid",
        params=params or _old_params(given.get("search_space")),
        directions=_directions(given.get("direction")),
        trials=trials,
        sampler=sampler,
        max_failures=_max_failures(given.get("max_failure_rate"), trials),
        slots=_count(given, "n_jobs"),
        name=slug,
        custom_search_space=_custom_search_space(given),
        notices=tuple(notices),
    )


def results_yaml(best: Sequence[tuple[Mapping[str, object], Sequence[float]]], objectives: int = 1) -> str:
    """What hydra-optuna-sweeper writes to ``optimization_results.yaml`` in ``hydra.sweep.dir`` at the end.

    Args:
        best: the params and the values of the best point, or of each point of the Pareto front; plain values.
        objectives: how many values a point has; with one, ``best`` must have a point, and its first one counts.
    """
    results: dict[str, object] = {"name": "optuna"}
    if objectives > 1:
        results["solutions"] = [{"params": dict(params), "values": list(values)} for params, values in best]
    else:
        params, values = best[0]
        results |= {"best_params": dict(params), "best_value": values[0]}
    text: str = yaml.safe_dump(results, sort_keys=False, allow_unicode=True)
    return text


def _given(node: DictConfig) -> dict[str, object]:
    """The keys of hydra-optuna-sweeper's that have a value, ``params`` aside."""
    given: dict[str, object] = {}
    for key in (str(key) for key in node):
        if key.startswith("_") or key in _OURS:
            continue
        try:
            value = node[key]
            given[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException as error:
            raise SweepError(f"{_WHERE}.{key}: {str(error).splitlines()[0]}") from error
    sampler = given.get("sampler")
    if isinstance(sampler, Mapping) and all(value is None for value in sampler.values()):
        given["sampler"] = None
    return {key: value for key, value in given.items() if value is not None}


def _unused(given: Mapping[str, object], node: DictConfig) -> Iterator[str]:
    """Notices of the keys that have no equivalent."""
    if "storage" in given:
        yield f"{_WHERE}.storage: not used: the sweep's ledger takes its place"
    if "search_space" in given and node.get("params"):
        yield f"{_WHERE}.search_space: not used: {_WHERE}.params takes its place"


def _params(node: DictConfig) -> Mapping[str, object]:
    raw = OmegaConf.to_container(node, resolve=False)
    assert isinstance(raw, dict)
    return raw.get("params") or {}


def _old_params(space: object) -> Mapping[str, object]:
    """``search_space``, which was the space before there were ``params``."""
    where = f"{_WHERE}.search_space"
    if space is None:
        return {}
    if not isinstance(space, Mapping):
        raise SweepError(f"{where}: must be a mapping of keys to distributions, got {space!r}")
    return {str(key): _distribution(value, f"{where}.{key}") for key, value in space.items()}


def _distribution(given: object, where: str) -> str:
    """A key of ``search_space`` as an override's value: ``{type: int, low: 1, high: 3}`` is ``range(1,4,1)``."""
    if not isinstance(given, Mapping):
        raise SweepError(f"{where}: must be a mapping of {', '.join(_DISTRIBUTION)}, got {given!r}")
    if unknown := sorted(str(key) for key in given if key not in _DISTRIBUTION):
        raise SweepError(f"{where}.{unknown[0]}: not a key of a distribution ({', '.join(_DISTRIBUTION)})")
    kind = given.get("type")
    kind = kind.name if isinstance(kind, Enum) else kind
    if kind == "categorical":
        return _choice(given.get("choices"), f"{where}.choices")
    if kind not in ("int", "float"):
        raise SweepError(f"{where}.type: must be int, float or categorical, got {kind!r}")
    low, high = (_number(given.get(end), kind, f"{where}.{end}") for end in ("low", "high"))
    step = given.get("step")
    if given.get("log"):  # Optuna's logarithmic ranges had no steps
        return f"tag({'int,log' if kind == 'int' else 'log'},interval({low},{high}))"
    if step is None and kind == "float":
        return f"interval({low},{high})"
    step = _number(1 if step is None else step, kind, f"{where}.step")
    # A range leaves its end out, and a distribution does not.
    stop = high + 1 if kind == "int" else float(Decimal(repr(high)) + Decimal(repr(step)) / 2)
    return f"range({low},{stop},{step})"


def _choice(choices: object, where: str) -> str:
    if not isinstance(choices, list) or not choices:
        raise SweepError(f"{where}: must be a list of values, got {choices!r}")
    grammar = Grammar()
    return ",".join(grammar.literal(value, where).text for value in choices)


def _number(value: object, kind: object, where: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SweepError(f"{where}: must be a number, got {value!r}")
    return int(value) if kind == "int" else float(value)


def _swept(params: Mapping[str, object], overrides: Sequence[str]) -> list[tuple[str, Override]]:
    """The overrides that the space is made of, with their places; what is wrong with one, the space says itself."""
    grammar = Grammar()
    given = [(f"{_WHERE}.params.{key}", f"{key}={value}") for key, value in params.items()]
    given += [("command line", text) for text in overrides]
    swept: dict[str, tuple[str, Override]] = {}
    for where, text in given:
        try:
            override = grammar.parse(text, where)
        except SpaceError:
            continue
        name = key_name(override)  # a key on the command line replaces that in params
        swept[name] = (f"{where}, {name}" if where == "command line" else where, override)
    return list(swept.values())


def _range_notice(where: str, override: Override) -> str | None:
    """A notice if a range's end was one of its values for hydra-optuna-sweeper (since 1.4 it is not)."""
    sweep = override._value
    if not isinstance(sweep, RangeSweep) or sweep.shuffle or not sweep.step:
        return None
    start, stop, step = (Decimal(str(number)) for number in (sweep.start, sweep.stop, sweep.step))
    if not (start.is_finite() and stop.is_finite() and step.is_finite()) or (stop - start) % step != 0:
        return None
    text = override.get_value_string()
    return f"{where}: {text} excludes {sweep.stop}, as in Hydra; hydra-optuna-sweeper 1.2 included it"


def _directions(value: object) -> tuple[Direction, ...]:
    where = f"{_WHERE}.direction"
    items = value if isinstance(value, list) else [] if value is None else [value]
    names = [item.name if isinstance(item, Enum) else str(item) for item in items]
    if value == [] or any(name not in list(Direction) for name in names):
        raise SweepError(f"{where}: must be {' or '.join(Direction)}, or a list of them, got {value!r}")
    return tuple(Direction(name) for name in names)


def _max_failures(rate: object, trials: int | None) -> int | None:
    """How many trials may fail. The rate is that in a batch there; here, where no batches are, that of all trials."""
    if rate is None:
        return None
    if not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise SweepError(f"{_WHERE}.max_failure_rate: must be from 0 to 1, got {rate}")
    return math.floor(Decimal(repr(float(rate))) * (trials or DEFAULT_TRIALS))


def _count(given: Mapping[str, object], key: str) -> int | None:
    value = given.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or value < 1:
        raise SweepError(f"{_WHERE}.{key}: must be at least 1, got {value}")
    return value


def _custom_search_space(given: Mapping[str, object]) -> str | None:
    dotted = given.get("custom_search_space")
    return None if dotted is None else str(dotted)
