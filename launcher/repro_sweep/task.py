"""The task function: how another process finds it, and how it is imported.

Nothing is pickled. A function of an importable module is found by its dotted name; one of a script that was run as
``__main__`` is found by importing the script's file under a module name of its own, so that its
``if __name__ == "__main__"`` part does not run.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from repro_sweep.errors import TaskError
from repro_sweep.sweep import TaskSpec

_FILE_MODULE = "__repro_sweep_task__"

Task = Callable[[Any], Any]


def from_dotted(dotted: str, where: str) -> TaskSpec:
    """The task that a sweep's YAML names as ``package.module.function``.

    Raises:
        TaskError: it is not a dotted name.
    """
    module, _, qualname = dotted.rpartition(".")
    if not module or not all(part.isidentifier() for part in dotted.split(".")):
        raise TaskError(f"{where}: '{dotted}' is not a dotted name like package.module.function")
    return TaskSpec(module=module, qualname=qualname, cwd=str(Path.cwd()), sys_path=_sys_path())


def from_function(function: Task) -> TaskSpec:
    """The task that Hydra handed to the sweeper.

    Raises:
        TaskError: another process could not find it (a lambda, a nested function, an interactive session).
    """
    qualname = getattr(function, "__qualname__", type(function).__qualname__)
    if not all(part.isidentifier() for part in qualname.split(".")):
        raise TaskError(
            f"task function {qualname}: workers import it by name, so it must stand at a module's top level"
        )
    module: str | None = function.__module__
    file: str | None = None
    if module == "__main__":
        main = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        module = None if spec is None else str(spec.name)
        file = getattr(main, "__file__", None)
        if module is None and file is None:
            raise TaskError(
                f"task function {qualname}: workers import it from a file, an interactive session has none"
            )
        file = None if module is not None or file is None else str(Path(file).resolve())
    return TaskSpec(module=module, file=file, qualname=qualname, cwd=str(Path.cwd()), sys_path=_sys_path())


def load(spec: TaskSpec) -> Task:
    """Import the task's module and take the function; one that ``hydra.main`` wraps is unwrapped.

    Raises:
        TaskError: with the last line of the import's own traceback, where that failed.
    """
    for entry in reversed(spec.sys_path):
        if entry not in sys.path:
            sys.path.insert(0, entry)
    try:
        module = _import(spec)
    except (Exception, SystemExit) as error:
        last = " ".join(traceback.format_exception_only(error)[-1].split())
        raise TaskError(f"task {spec.name}: importing {spec.module or spec.file} failed: {last}") from error
    target: Any = module
    for part in spec.qualname.split("."):
        if not hasattr(target, part):
            raise TaskError(f"task {spec.name}: {spec.module or spec.file} has no '{spec.qualname}'")
        target = getattr(target, part)
    return _callable(target, spec)


def _import(spec: TaskSpec) -> ModuleType:
    if spec.module is not None:
        return importlib.import_module(spec.module)
    if spec.file is None:
        raise TaskError(f"task {spec.name}: neither a module nor a file is given")
    found = importlib.util.spec_from_file_location(_FILE_MODULE, spec.file)
    if found is None or found.loader is None:
        raise TaskError(f"task {spec.name}: {spec.file} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[_FILE_MODULE] = module
    found.loader.exec_module(module)
    return module


def _callable(target: Any, spec: TaskSpec) -> Task:
    if not callable(target):
        raise TaskError(f"task {spec.name}: is a {type(target).__name__}, not a function")
    wrapped = getattr(target, "__wrapped__", None)
    function: Task = wrapped if wrapped is not None and _is_hydra_main(target) else target
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        signature = inspect.signature(function)
        raise TaskError(
            f"task {spec.name}: a task takes one argument, the config; this one is {function.__name__}{signature}"
        ) from error
    except ValueError:  # a builtin without a signature
        pass
    return function


def _is_hydra_main(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code.co_name == "decorated_main"


def _sys_path() -> tuple[str, ...]:
    return tuple(dict.fromkeys(os.path.abspath(entry or ".") for entry in sys.path))  # noqa: PTH100 (zip entries too)
