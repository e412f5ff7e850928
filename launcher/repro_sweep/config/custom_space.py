"""``custom_search_space``: a function of the user's that suggests parameters beyond those of the space.

Its argument is an ``optuna.trial.Trial``, as for hydra-optuna-sweeper; Optuna itself is not imported here.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable

from hydra._internal.utils import _locate
from omegaconf import DictConfig

from repro_sweep.errors import SweepError

WHERE = "sweep.custom_search_space"


def resolve(
    dotted: str, where: str = WHERE, *, main: str = "__main__"
) -> Callable[[DictConfig, object], object]:
    """The function that ``custom_search_space`` names; a leading dot is ignored, as Hydra 1.1 did.

    Args:
        dotted: ``module.function``; ``__main__`` is the application's own module.
        where: the option, for messages.
        main: the name under which the application's own module is imported in this process.

    Raises:
        SweepError: there is no such function, or it does not take a config and a trial.
    """
    path = dotted.removeprefix(".")
    first, dot, rest = path.partition(".")
    if first == "__main__":
        path = f"{main}{dot}{rest}"
    try:
        found = _locate(path)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SweepError(f"{where}: {reason}") from error
    if not callable(found):
        raise SweepError(
            f"{where}: must be the dotted name of a function, but {dotted} is a {type(found).__name__}"
        )
    function: Callable[[DictConfig, object], object] = found
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise SweepError(
            f"{where}: {dotted} must take two arguments, the config and the trial; it is"
            f" {function.__name__}{inspect.signature(function)}"
        ) from error
    except ValueError:  # a builtin without a signature
        pass
    return function


def bind(
    dotted: str, config: DictConfig, where: str = WHERE, *, main: str = "__main__"
) -> Callable[[object], None]:
    """The function with its config, for the process that asks the sampler.

    It is called with each trial after the space's own parameters were suggested. It reads them in ``trial.params`` and
    suggests others, whose names are keys: each becomes an override ``name=value`` of the point.

    Args:
        dotted: see :func:`resolve`.
        config: what a sweeper's ``setup`` gets: the application's whole config, ``hydra`` included, with the command
            line's fixed overrides and none of the swept ones. All trials get this same object.
        where: see :func:`resolve`.
        main: see :func:`resolve`.

    Raises:
        SweepError: see :func:`resolve`. The returned function raises it with what the user's raised.
    """
    function = resolve(dotted, where, main=main)

    def extend(trial: object) -> None:
        try:
            function(config, trial)
        except Exception as error:
            last = " ".join(traceback.format_exception_only(error)[-1].split())
            raise SweepError(f"{where}: {dotted} failed: {last}") from error

    return extend
