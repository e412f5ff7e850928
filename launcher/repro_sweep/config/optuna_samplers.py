"""``hydra.sweeper.sampler`` of applications written for hydra-optuna-sweeper, as one of our samplers.

The options of the group ``hydra/sweeper/sampler`` are those of hydra-optuna-sweeper 1.2
(``hydra_plugins/hydra_optuna_sweeper/config.py``), which are Optuna 2's, and what its later versions add.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from repro_sweep.errors import SweepError
from repro_sweep.search import base as searchers
from repro_sweep.search.samplers import checked_seed
from repro_sweep.sweep import Chosen

DEFAULT_TRIALS = 20
"""``n_trials`` of hydra-optuna-sweeper where it is not given."""

_WHERE = "hydra.sweeper.sampler"
_PACKAGE = "optuna.samplers."
_THEIRS = ("optuna.", "hydra_plugins.hydra_optuna_sweeper.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """A class of Optuna's: our sampler of the same kind, the options of the group and their defaults there."""

    cls: str
    ours: str
    options: Mapping[str, object] = field(default_factory=dict)


_FITTED: Mapping[str, object] = {"independent_sampler": None, "warn_independent_sampling": True}
_WEIGHED: Mapping[str, object] = {
    "consider_prior": True,
    "prior_weight": 1.0,
    "consider_magic_clip": True,
    "consider_endpoints": False,
    "n_startup_trials": 10,
}
_TPE: Mapping[str, object] = {
    **_WEIGHED,
    "n_ei_candidates": 24,
    "multivariate": False,
    "group": False,
    "warn_independent_sampling": True,
    "constant_liar": False,
    "constraints_func": None,
}
_CMAES: Mapping[str, object] = {
    "x0": None,
    "sigma0": None,
    "n_startup_trials": 1,
    "consider_pruned_trials": False,
    "restart_strategy": None,
    "popsize": None,
    "inc_popsize": 2,
    "use_separable_cma": False,
    "with_margin": False,
    "lr_adapt": False,
    "source_trials": None,
    **_FITTED,
}
_GENETIC: Mapping[str, object] = {
    "population_size": 50,
    "mutation_prob": None,
    "mutation": None,
    "crossover": None,
    "crossover_prob": 0.9,
    "swapping_prob": 0.5,
    "constraints_func": None,
}
_REFERENCES: Mapping[str, object] = {**_GENETIC, "reference_points": None, "dividing_parameter": 3}
_GP: Mapping[str, object] = {
    "n_startup_trials": 10,
    "deterministic_objective": False,
    "constraints_func": None,
    **_FITTED,
}
_QMC: Mapping[str, object] = {
    "qmc_type": "sobol",
    "scramble": False,
    "warn_asynchronous_seeding": True,
    **_FITTED,
}
_KINDS: Mapping[str, _Kind] = {
    "tpe": _Kind(cls="TPESampler", ours="tpe", options=_TPE),
    "random": _Kind(cls="RandomSampler", ours="random"),
    "cmaes": _Kind(cls="CmaEsSampler", ours="cmaes", options=_CMAES),
    "nsgaii": _Kind(cls="NSGAIISampler", ours="nsgaii", options=_GENETIC),
    "nsgaiii": _Kind(cls="NSGAIIISampler", ours="nsgaiii", options=_REFERENCES),
    "motpe": _Kind(cls="MOTPESampler", ours="tpe", options={**_WEIGHED, "n_ehvi_candidates": 24}),
    "gp": _Kind(cls="GPSampler", ours="gp", options=_GP),
    "qmc": _Kind(cls="QMCSampler", ours="qmc", options=_QMC),
    "grid": _Kind(cls="GridSampler", ours="grid", options={"_partial_": True}),
}
_BY_CLASS: Mapping[str, _Kind] = {
    **{kind.cls: kind for kind in _KINDS.values()},
    "BruteForceSampler": _Kind(cls="BruteForceSampler", ours="bruteforce"),
    # names that hydra-optuna-sweeper 1.4 gives to functions of its own
    "create_nsgaii_sampler": _KINDS["nsgaii"],
    "create_nsgaiii_sampler": _KINDS["nsgaiii"],
    "raise_motpe_removed": _KINDS["motpe"],
}
_RENAMED = {"n_ehvi_candidates": "n_ei_candidates"}
_ONLY_OPTUNAS = frozenset({"x0", "sigma0", "independent_sampler"})
"""What Optuna's class takes and our sampler of that kind does not: then the class itself is used."""

_UNUSED: Mapping[str, str] = {
    "constraints_func": "sweep.constraints takes its place",
    "source_trials": "sweep.start_from takes its place",
    "restart_strategy": "Optuna 5 ignores it",
    "inc_popsize": "Optuna 5 ignores it",
    "warn_independent_sampling": "repro-sweep itself names such parameters before the start",
    "warn_asynchronous_seeding": "one process asks the sampler",
}
_DEPRECATED = "Optuna 5 has deprecated it"


def group() -> dict[str, dict[str, object]]:
    """The group ``hydra/sweeper/sampler``; all options are null, so that one that is given can be told.

    ``unset`` stands for no choice, with a seed that the command line can set.
    """
    nodes: dict[str, dict[str, object]] = {"unset": {"_target_": None, "seed": None}}
    for name, kind in _KINDS.items():
        nodes[name] = {"_target_": f"{_PACKAGE}{kind.cls}", "seed": None, **dict.fromkeys(kind.options)}
    return nodes


def sampler_of(node: object, trials: int | None) -> tuple[Chosen, list[str]]:
    """The sampler with all of its options, the seed among them, and notices of what has no equivalent.

    A grid of ``trials`` points is a search by brute force: like Optuna's ``GridSampler``, it takes the grid's points
    in any order until it has so many.

    Args:
        node: ``hydra.sweeper.sampler``, resolved; None is TPE.
        trials: ``n_trials``, None where it is not given.

    Raises:
        SweepError: it names no sampler, or an option or its value is wrong.
    """
    if node is not None and not isinstance(node, Mapping):
        raise SweepError(
            f"{_WHERE}: must be a mapping with _target_ (or choose hydra/sweeper/sampler=tpe), got {node!r}"
        )
    given = {str(key): value for key, value in (node or {}).items() if value is not None}
    target = given.pop("_target_", f"{_PACKAGE}TPESampler")
    if not isinstance(target, str):
        raise SweepError(f"{_WHERE}._target_: must be the dotted name of a sampler, got {target!r}")
    checked_seed(given.get("seed"), f"{_WHERE}.seed")
    kind = _BY_CLASS.get(target.rpartition(".")[2]) if target.startswith(_THEIRS) else None
    if kind is None:
        return Chosen(name="optuna", options={"_target_": target, "seed": None, **given}), []
    if kind.ours == "grid":
        return _grid(given, trials)
    kept, notices = _used(kind, given)
    if _ONLY_OPTUNAS & set(kept):
        options = {"_target_": f"{_PACKAGE}{kind.cls}", "seed": None, **kept}
        return Chosen(name="optuna", options=options), notices
    return Chosen(name=kind.ours, options=_typed(kind.ours, kept)), notices


def _grid(given: Mapping[str, object], trials: int | None) -> tuple[Chosen, list[str]]:
    if unknown := sorted(set(given) - {"seed", "_partial_"}):
        raise SweepError(f"{_WHERE}.{unknown[0]}: not an option of grid (seed)")
    if trials is None:
        return Chosen(name="grid", options=_typed("grid", {})), []
    seed = {key: value for key, value in given.items() if key == "seed"}
    return Chosen(name="bruteforce", options=_typed("bruteforce", seed)), []


def _used(kind: _Kind, given: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """The options that our sampler or Optuna's class has, and notices of those that have gone."""
    own = _options_of(kind.ours)
    kept: dict[str, object] = {}
    notices: list[str] = []
    for key, value in given.items():
        name = _RENAMED.get(key, key)
        if name in own or (name in _ONLY_OPTUNAS and name in kind.options):
            kept[name] = value
        elif key not in kind.options:
            raise SweepError(f"{_WHERE}.{key}: not an option of {kind.ours} ({', '.join(own)})")
        elif value != kind.options[key]:
            notices.append(f"{_WHERE}.{key}: not used: {_UNUSED.get(key, _DEPRECATED)}")
    return kept, notices


def _options_of(name: str) -> list[str]:
    options = searchers.load(name).options
    assert isinstance(options, type)
    return [each.name for each in fields(options)]


def _typed(name: str, given: Mapping[str, object]) -> dict[str, object]:
    """All options of our sampler, the given ones checked by their types."""
    node = OmegaConf.structured(searchers.load(name).options)
    for key, value in given.items():
        try:
            node[key] = value
        except OmegaConfBaseException as error:
            raise SweepError(f"{_WHERE}.{key}: {str(error).splitlines()[0]}") from error
    options = OmegaConf.to_container(node)
    assert isinstance(options, dict)
    return {str(key): value for key, value in options.items()}
