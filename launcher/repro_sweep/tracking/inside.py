"""MLflow inside a trial: ``mlflow.log_metric``, autolog and ``mlflow.start_run()`` go to the trial's own run.

Nothing happens before a task first starts a run: a trial that does not use MLflow never asks for one, and importing
mlflow, before or after :func:`install`, costs nothing here.

Whatever tracking URI and experiment the task has set, a run that it starts without naming a run id is the trial's, at
the sweep's store: an application with its own ``set_tracking_uri`` and ``set_experiment`` needs no change. It stays
so: ``with mlflow.start_run():`` twice, or autolog twice, resumes the same run. Nested runs become children of the
trial's run. Explicit run ids and :class:`mlflow.MlflowClient` are left alone. The trial's final status is set by the
tracker after the trial has ended, whatever the task does to it.

Hooks into two module globals of ``mlflow.tracking.fluent``, because a task may have done ``from mlflow import
start_run`` before; ``tests/test_mlflow_inside.py`` fails if a version of MLflow has them no more.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any

from repro_sweep.tracking.base import RunRef

_FLUENT = "mlflow.tracking.fluent"
_ENGINES = (
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.jobs.sqlalchemy_store",
)
_MODEL_LOGGERS = {("mlflow.models.model", "log"), (_FLUENT, "_create_logged_model")}

_logger = logging.getLogger(__name__)
_installed: _TrialRun | None = None
_inherited: list[object] = []
"""Connections of the parent process: neither used nor closed here."""


def install(resolve: Callable[[], RunRef], *, uri: str | None = None) -> None:
    """Make MLflow in this process, the freshly forked child of a trial, log to the trial's run.

    Args:
        resolve: finds the trial's run; called once at most, when the task first starts a run. What it raises is
            raised to the task.
        uri: the sweep's tracking URI, for what the task reads from MLflow without starting a run.
    """
    global _installed
    _installed = _TrialRun(resolve)
    if uri is not None:
        os.environ["MLFLOW_TRACKING_URI"] = uri
    os.environ.pop("MLFLOW_RUN_ID", None)
    fluent = sys.modules.get(_FLUENT)
    if fluent is None:
        sys.meta_path.insert(0, _AfterImport(_installed))
        return
    _leave_connections_to_parent()
    _installed.attach(fluent)
    if uri is not None and sys.modules["mlflow"].get_tracking_uri() != uri:
        sys.modules["mlflow"].set_tracking_uri(uri)


def settle(*, failed: bool = False) -> None:
    """Send what MLflow still holds back; called when the task has ended, before its outcome is reported.

    Runs nested in the trial's are ended if the task left them open. The trial's own is not touched: nothing that
    MLflow does when the interpreter exits may change it after the tracker has set its final status.
    """
    if _installed is None or _installed.ref is None:
        return
    try:
        _installed.settle("FAILED" if failed else "FINISHED")
    except Exception:  # the task has its result: MLflow's troubles are no reason to lose it
        _logger.exception("MLflow could not store all that the trial has logged")


class _TrialRun:
    """The run of this process's trial, found when it is first needed."""

    def __init__(self, resolve: Callable[[], RunRef]) -> None:
        self._resolve = resolve
        self._lock = threading.Lock()
        self._fluent: Any = None
        self.ref: RunRef | None = None
        self.starting = threading.local()

    def attach(self, fluent: Any) -> None:
        """Make ``mlflow.start_run`` resume the trial's run."""
        self._fluent = fluent
        registry = sys.modules["mlflow.tracking.context.registry"]._run_context_provider_registry
        registry.register(lambda: _ParentTag(self))
        fluent._active_run_stack = _Stack(fluent._active_run_stack, self)
        fluent.MLFLOW_RUN_ID = _RunId(fluent.MLFLOW_RUN_ID, self)

    def prepare(self) -> RunRef:
        """Find the run, and point MLflow at its store and experiment."""
        with self._lock:
            if self.ref is None:
                self.ref = self._resolve()
        mlflow: Any = sys.modules["mlflow"]
        if mlflow.get_tracking_uri() != self.ref.uri:
            mlflow.set_tracking_uri(self.ref.uri)
        self._fluent._active_experiment_id = self.ref.experiment_id
        return self.ref

    def as_active_run(self) -> Any:
        """The run as MLflow's functions see the active one; it is not made active."""
        ref = self.prepare()
        return self._fluent.ActiveRun(sys.modules["mlflow"].MlflowClient().get_run(ref.run_id))

    def settle(self, status: str) -> None:
        """See :func:`settle`."""
        fluent, ref = self._fluent, self.ref
        assert ref is not None
        stack = fluent._active_run_stack.get()
        while stack:
            if stack[-1].info.run_id != ref.run_id:
                fluent.end_run(status)
                continue
            stack.pop()
            monitor = fluent.run_id_to_system_metrics_monitor.pop(ref.run_id, None)
            if monitor is not None:
                monitor.finish()
        sys.modules["mlflow"].flush_async_logging()


class _Stack:
    """MLflow's stack of active runs. ``start_run`` looks at it before anything else: the moment to find the run."""

    def __init__(self, stack: Any, trial: _TrialRun) -> None:
        self._stack = stack
        self._trial = trial

    def get(self) -> list[Any]:
        """The active runs of this thread."""
        runs: list[Any] = self._stack.get()
        caller = sys._getframe(1)
        if caller.f_code.co_name == "active_run" and not runs and _logs_a_model(caller.f_back):
            return [self._trial.as_active_run()]
        if caller.f_code.co_name == "start_run":
            asked = caller.f_locals
            mine = not runs and not asked.get("run_id") and not asked.get("parent_run_id")
            self._trial.starting.resume = mine and not asked.get("nested")
            if mine:
                self._trial.prepare()
        return runs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stack, name)


class _RunId:
    """MLflow's variable ``MLFLOW_RUN_ID``, which names the run that ``start_run`` resumes."""

    def __init__(self, variable: Any, trial: _TrialRun) -> None:
        self._variable = variable
        self._trial = trial

    def get(self) -> str | None:
        """The trial's run, or None for a nested one."""
        if not getattr(self._trial.starting, "resume", False):
            return None
        self._trial.starting.resume = False
        run_id = self._trial.prepare().run_id
        os.environ[self._variable.name] = run_id  # start_run deletes it
        return run_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._variable, name)


class _ParentTag:
    """A context provider of MLflow's: nested runs are children of the trial's run even while that is not active."""

    def __init__(self, trial: _TrialRun) -> None:
        self._trial = trial

    def in_context(self) -> bool:
        """Whether the trial has used its run."""
        return self._trial.ref is not None

    def tags(self) -> dict[str, str]:
        """The parent of runs that name none."""
        return {} if self._trial.ref is None else {"mlflow.parentRunId": self._trial.ref.run_id}


class _AfterImport(MetaPathFinder):
    """Attaches to MLflow right after the task has imported it."""

    def __init__(self, trial: _TrialRun) -> None:
        self._trial = trial

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        """Wrap the loader of one module; everything else is found by the other finders."""
        if fullname != _FLUENT:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _AttachingLoader(spec.loader, self._trial)
        return spec


class _AttachingLoader(Loader):
    """Loads a module as its own loader does, then attaches to it."""

    def __init__(self, loader: Loader, trial: _TrialRun) -> None:
        self._loader = loader
        self._trial = trial

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """See the module's own loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """See the module's own loader."""
        self._loader.exec_module(module)
        self._trial.attach(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _logs_a_model(frame: FrameType | None) -> bool:
    """Whether a frame is one of MLflow's that link a model to the active run without starting one."""
    return frame is not None and (frame.f_globals.get("__name__"), frame.f_code.co_name) in _MODEL_LOGGERS


def _leave_connections_to_parent() -> None:
    """Open new connections to databases instead of sharing the parent's."""
    for name in _ENGINES:
        module = sys.modules.get(name)
        for engine in _engines(module):
            _inherited.append(engine.pool)
            engine.dispose(close=False)


def _engines(module: ModuleType | None) -> Iterator[Any]:
    for thing in vars(module).values() if module is not None else ():
        if isinstance(thing, type):
            yield from getattr(thing, "_engine_map", {}).values()
