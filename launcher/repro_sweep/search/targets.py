"""Makes objects from mappings with ``_target_``, as Hydra's ``instantiate`` does.

The search's process must not need Hydra for it, and a package of OptunaHub has no dotted name. Every error says which
option is wrong.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from repro_sweep.errors import SweepError

TARGET = "_target_"
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "CmaEsSampler": ("cmaes",),
    "GPSampler": ("scipy", "torch"),
    "QMCSampler": ("scipy",),
    "WilcoxonPruner": ("scipy",),
}
"""What classes of Optuna's need that Optuna does not bring along, and only import once they are at work."""

_DISTRIBUTIONS = {"skopt": "scikit-optimize", "sklearn": "scikit-learn", "yaml": "pyyaml"}
"""How packages are called where pip gets them, if not like their modules."""

_HUB = "hub:"
_FORMS = "a dotted name such as optuna.samplers.TPESampler, or hub:samplers/NAME[:Class]"


def instantiate(value: object, where: str, *, seed: int | None = None) -> object:
    """``value`` with every mapping in it that has ``_target_`` replaced by what its target returns.

    ``_args_`` are positional arguments, ``_partial_`` makes a function that still takes arguments. ``seed`` is given to
    whatever takes one and has none: without it, it would draw other numbers each time.

    Raises:
        SweepError: a target does not exist or refuses its arguments; ``where`` names the option.
    """
    if isinstance(value, (list, tuple)):
        return [instantiate(item, f"{where}[{index}]", seed=seed) for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    inner = {
        str(key): instantiate(item, f"{where}.{key}", seed=seed)
        for key, item in value.items()
        if key != TARGET
    }
    if TARGET not in value:
        return inner
    for word in ("_recursive_", "_convert_"):
        if inner.pop(word, None) is not None:
            raise SweepError(
                f"{where}.{word}: not supported here: values are always made recursively, and plain"
            )
    found = locate(value[TARGET], f"{where}.{TARGET}")
    partial = inner.pop("_partial_", False)
    positional = inner.pop("_args_", None) or []
    if not isinstance(positional, list):
        raise SweepError(f"{where}._args_: must be a list, got {positional!r}")
    if seed is not None and inner.get("seed") is None and _takes(found, "seed"):
        inner["seed"] = seed
    if partial:
        return functools.partial(found, *positional, **inner)
    return call(found, inner, where, positional)


def call(
    made_by: Callable[..., object], arguments: Mapping[str, Any], where: str, positional: Any = ()
) -> object:
    """What ``made_by`` returns for these arguments.

    Raises:
        SweepError: it refuses them, or a package that it needs is missing.
    """
    name = getattr(made_by, "__name__", str(made_by))
    try:
        takes = inspect.signature(made_by)
    except (TypeError, ValueError):  # a class written in C need not have one
        takes = None
    if takes is not None:
        _check_arguments(takes, name, arguments, where, positional)
    try:
        return made_by(*positional, **arguments)
    except ImportError as error:
        raise SweepError(f"{where}: {name} cannot be imported: {one_line(error)}{_remedy(error)}") from error
    except Exception as error:
        raise SweepError(f"{_place(where, str(error), arguments)}: {one_line(error)}") from error


def locate(target: object, where: str) -> Callable[..., object]:
    """The class or function that a target names.

    Raises:
        SweepError: there is none, or a package that it needs is missing.
    """
    if not isinstance(target, str) or not target:
        raise SweepError(f"{where}: must be {_FORMS}; got {target!r}")
    found = _from_hub(target, where) if target.startswith(_HUB) else _by_name(target, where)
    _check_packages(found, target, where)
    return found


def needs(packages: Iterable[str]) -> str:
    """That packages are missing, and the command that installs them."""
    missing = list(packages)
    noun = "package" if len(missing) == 1 else "packages"
    return f"needs the {noun} {' and '.join(missing)}: {_pip(missing)}"


def one_line(error: Exception) -> str:
    """The error in one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _by_name(target: str, where: str) -> Callable[..., object]:
    names = target.split(".")
    for length in range(len(names) - 1, 0, -1):
        module = _module(".".join(names[:length]), target, where)
        if module is None:
            continue
        found: Any = module
        for name in names[length:]:
            try:
                found = getattr(found, name)
            except AttributeError:
                raise SweepError(f"{where}: {target!r}: {module.__name__} has no {name!r}") from None
            except ImportError as error:  # a module may import its contents when they are asked for
                raise _not_imported(target, where, error) from error
        if not callable(found):
            raise SweepError(f"{where}: {target!r} is no class and no function")
        made_by: Callable[..., object] = found
        return made_by
    hint = f" (if it is not installed: {_pip(names[:1])})" if len(names) > 1 else ""
    raise SweepError(f"{where}: {target!r}: there is no module {names[0]!r}; it must be {_FORMS}{hint}")


def _check_packages(made_by: Callable[..., object], target: str, where: str) -> None:
    bases = [base for base in getattr(made_by, "__mro__", ()) if base.__module__.startswith("optuna.")]
    packages = {each for base in bases for each in PACKAGES.get(base.__name__, ())}
    if missing := sorted(each for each in packages if importlib.util.find_spec(each) is None):
        raise SweepError(f"{where}: {target} {needs(missing)}")


def _not_imported(target: str, where: str, error: Exception) -> SweepError:
    return SweepError(f"{where}: {target!r} cannot be imported: {one_line(error)}{_remedy(error)}")


def _remedy(error: BaseException) -> str:
    """The command that installs what could not be imported; empty where that is not known to be a package."""
    step: BaseException | None = error
    while step is not None:
        if isinstance(step, ImportError) and step.name:
            package = step.name.partition(".")[0]
            return "" if importlib.util.find_spec(package) else f" ({_pip([package])})"
        step = step.__cause__
    return ""


def _pip(packages: Iterable[str]) -> str:
    return f"pip install {' '.join(_DISTRIBUTIONS.get(each, each) for each in packages)}"


def _takes(made_by: Callable[..., object], name: str) -> bool:
    try:
        return name in inspect.signature(made_by).parameters
    except (TypeError, ValueError):  # a class written in C need not have a signature
        return False


def _module(name: str, target: str, where: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise _not_imported(target, where, error) from error
    except Exception as error:
        raise _not_imported(target, where, error) from error


def _from_hub(target: str, where: str) -> Callable[..., object]:
    """A class of an OptunaHub package; without a class's name, the only sampler or pruner in it."""
    if importlib.util.find_spec("optunahub") is None:
        raise SweepError(f"{where}: {target} {needs(['optunahub'])}")
    import optuna
    import optunahub

    package, _, name = target.removeprefix(_HUB).partition(":")
    try:
        module = optunahub.load_module(package)
    except Exception as error:
        raise SweepError(
            f"{where}: {target!r} cannot be loaded from OptunaHub: {one_line(error)}{_remedy(error)}"
        ) from error
    bases = (optuna.samplers.BaseSampler, optuna.pruners.BasePruner)
    exported = getattr(module, "__all__", None) or [key for key in vars(module) if not key.startswith("_")]
    classes = {
        key: item
        for key in exported
        if isinstance(item := getattr(module, key, None), type) and issubclass(item, bases)
    }
    wanted = [name] if name else list(classes)
    if len(wanted) != 1 or wanted[0] not in classes:
        allowed = ", ".join(f"{_HUB}{package}:{key}" for key in classes) or "it has no sampler"
        raise SweepError(f"{where}: {target!r}: name a class of it ({allowed})")
    return classes[wanted[0]]


def _check_arguments(
    takes: inspect.Signature, name: str, arguments: Mapping[str, Any], where: str, positional: Any
) -> None:
    kinds = inspect.Parameter
    named = [
        key
        for key, item in takes.parameters.items()
        if item.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
    ]
    is_open = any(item.kind is kinds.VAR_KEYWORD for item in takes.parameters.values())
    for key in arguments:
        if key not in named and not is_open:
            raise SweepError(f"{where}.{key}: not an option of {name} ({', '.join(named)})")
    try:
        takes.bind(*positional, **arguments)
    except TypeError as error:
        missing = re.search(r"missing a required .*argument: '(\w+)'", str(error))
        if missing:
            raise SweepError(f"{where}.{missing.group(1)}: must be given for {name}") from error
        raise SweepError(f"{where}: {name}: {one_line(error)}") from error


def _place(where: str, message: str, arguments: Mapping[str, Any]) -> str:
    """``where`` with the one option that a message is about; Optuna writes some of them in words."""
    exact = [key for key in arguments if re.search(rf"\b{re.escape(key)}\b", message)]
    worded = [key for key in arguments if re.sub(r"^n_", "", key).replace("_", " ") in message.lower()]
    for keys in (exact, worded):
        if len(keys) == 1:
            return f"{where}.{keys[0]}"
    return where
