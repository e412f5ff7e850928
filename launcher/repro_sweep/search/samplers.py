"""Makes Optuna's samplers, and knows what each can do.

Evidence is Optuna 5.0's source. *Stateless* samplers choose from the study and their random numbers alone, so that a
new one with another seed for each suggestion needs no memory of the earlier ones (``_tpe``, ``_random``,
``_brute_force``; ``_gp`` only remembers where its last fit ended). The others count, cache or draw as they go.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from repro_sweep.errors import SweepError
from repro_sweep.search import targets

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

WHERE = "sweep.sampler"
BY_TARGET = "optuna"
CLASSES: Mapping[str, str] = {
    "bruteforce": "BruteForceSampler",
    "cmaes": "CmaEsSampler",
    "gp": "GPSampler",
    "nsgaii": "NSGAIISampler",
    "nsgaiii": "NSGAIIISampler",
    "qmc": "QMCSampler",
    "random": "RandomSampler",
    "tpe": "TPESampler",
}
STATELESS = frozenset({"bruteforce", "gp", "random", "tpe"})
NEEDS: Mapping[str, tuple[str, ...]] = {
    name: targets.PACKAGES[cls] for name, cls in CLASSES.items() if cls in targets.PACKAGES
}
# ``repro-sweep`` says itself, once and before the start, what these would say again and again
_QUIET: Mapping[str, Mapping[str, object]] = {
    "cmaes": {"warn_independent_sampling": False},
    "gp": {"warn_independent_sampling": False},
    "qmc": {"warn_independent_sampling": False, "warn_asynchronous_seeding": False},
}
_SEEDS = 2**32


def build(name: str, options: Mapping[str, Any], seed: int) -> BaseSampler:
    """A sampler with the options of ``sweep/sampler=NAME``; ``seed`` replaces the one in the options.

    Raises:
        SweepError: the options cannot be used, or a package is missing.
    """
    check_packages(f"sweep/sampler={name}", NEEDS.get(name, ()))
    import optuna

    given = {key: value for key, value in options.items() if key not in {"name", "seed"}}
    if name == BY_TARGET:
        return _by_target(given, seed)
    if name == "tpe" and given.get("group", False) is None:
        given["group"] = given.get("multivariate") is True
    with quiet():
        arguments: dict[str, Any] = {
            key: targets.instantiate(value, f"{WHERE}.{key}") for key, value in given.items()
        }
        if arguments.get("reference_points") is not None:
            arguments["reference_points"] = _points(arguments["reference_points"])
        made = targets.call(
            getattr(optuna.samplers, CLASSES[name]),
            {**arguments, **_QUIET.get(name, {}), "seed": seed % _SEEDS},
            WHERE,
        )
    assert isinstance(made, optuna.samplers.BaseSampler)
    return made


def checked_seed(value: object, where: str) -> int | None:
    """A seed as NumPy's generators take it, None where none is given.

    Raises:
        SweepError: it is none.
    """
    if value is None:
        return None
    try:
        seed = int(str(value))
    except ValueError:
        seed = -1
    if not 0 <= seed < _SEEDS:
        raise SweepError(f"{where}: must be a whole number from 0 to {_SEEDS - 1}, got {value!r}")
    return seed


def fresh_seed(seed: int, number: int) -> int:
    """The seed of suggestion ``number``: as good as independent of those of all others."""
    import numpy as np

    return int(np.random.SeedSequence([seed % 2**64, number]).generate_state(1)[0])


def check_packages(what: str, packages: tuple[str, ...]) -> None:
    """See that packages are there, without importing them.

    Raises:
        SweepError: some are missing; it says how to install them.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise SweepError(f"{what} {targets.needs(missing)}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's remarks, which no user could act on: experimental features are chosen on purpose here."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def seeded_globally(seed: int) -> Iterator[None]:
    """The global random numbers of ``random`` and NumPy, fixed here and as before afterwards.

    A sampler of somebody else's may draw from them.
    """
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _by_target(given: dict[str, Any], seed: int) -> BaseSampler:
    import optuna

    with quiet():
        targets.locate(given.get(targets.TARGET), f"{WHERE}.{targets.TARGET}")
        made = targets.instantiate(given, WHERE, seed=seed % _SEEDS)
    if not isinstance(made, optuna.samplers.BaseSampler):
        raise SweepError(
            f"{WHERE}.{targets.TARGET}: {given[targets.TARGET]!r} is no sampler of Optuna's, got {type(made).__name__}"
        )
    return made


def _points(value: object) -> object:
    import numpy as np

    try:
        points = np.asarray(value, dtype=float)
    except (TypeError, ValueError) as error:
        raise SweepError(f"{WHERE}.reference_points: must be a list of points, got {value!r}") from error
    if points.ndim != 2:
        raise SweepError(f"{WHERE}.reference_points: must be a list of points, got {value!r}")
    return points
