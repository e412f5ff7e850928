"""Runs one trial in the process it is called in, as Hydra's own ``run_job`` runs a job.

What does not change from trial to trial (the task's import, the composed bases) is prepared once, before the fork.
The result goes to the agent as one message before the process ends, so that a crash at exit spoils nothing.
"""

from __future__ import annotations

import atexit
import errno
import faulthandler
import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from repro_sweep import task as tasks
from repro_sweep.config.compose import Composer
from repro_sweep.config.yamltext import hydra_yaml, to_yaml
from repro_sweep.errors import TrackingError, TrialInterrupted, TrialPruned, UserError
from repro_sweep.redaction import redacted
from repro_sweep.states import FailureKind, TrialState
from repro_sweep.sweep import SweepSpec
from repro_sweep.tracking import inside
from repro_sweep.tracking.base import RunRef
from repro_sweep.worker import preload, recorder, seeding, threads, trial
from repro_sweep.worker.attempt import FULL_DISK
from repro_sweep.worker.logs import JobLogging
from repro_sweep.worker.returned import final_metrics
from repro_sweep.worker.wire import STACKS_SIGNAL

_MESSAGE_LIMIT = 2000
_LONGEST_CHAIN = 20
_GPUS = "CUDA_VISIBLE_DEVICES"


class DriftError(Exception):
    """The config composed here is not the one that was frozen at submission."""


class Runner:
    """Holds the imported task and the composer.

    Raises:
        UserError: the task cannot be imported, or Hydra cannot be set up.
    """

    def __init__(self, spec: SweepSpec) -> None:
        self._spec = spec
        os.chdir(spec.task.cwd)
        seeding.enter(
            spec.determinism, spec.determinism.seed
        )  # for what the task's modules do at their import
        self._task = tasks.load(spec.task)
        self._composer = Composer(spec.composition)
        self._logging = JobLogging()
        self._rehearsed = False

    def prepare(self, message: Mapping[str, Any]) -> bool:
        """Before the fork: have the composed base of this trial's config-group choices ready.

        Returns:
            Whether anything had to be made.

        Raises:
            UserError: Hydra cannot compose it any more.
        """
        new = self._composer.prepare(message["overrides"])
        self._logging.prepare(self._composer.hydra(message["overrides"]))
        if not self._rehearsed:  # what every child does, once here, so that caches are warm in all of them
            self._rehearsed = True
            job = self._composer.job_config(
                message["overrides"], num=0, job_id="0", output_dir=message["directory"]
            )
            hydra_yaml(_hydra_shell(job))
        return new

    def run(self, message: Mapping[str, Any], fds: list[int]) -> None:
        """In the trial's own process: run it, send its result, end the process."""
        channel_fd, output_fd = fds
        atexit._clear()  # what was registered before the fork belongs to the zygote
        os.dup2(output_fd, 1)
        os.dup2(output_fd, 2)
        os.close(output_fd)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # text streams on descriptors
        faulthandler.enable(file=2)
        faulthandler.register(STACKS_SIGNAL, file=2, all_threads=True)
        context = (trial.Follower if message["rank"] else trial.Context)(
            socket.socket(fileno=channel_fd),
            Path(message["directory"]),
            message["run"],
            judged=_judged(self._spec),
        )
        trial.enter(context)
        known = preload.imported()
        result = self._result(message, context)
        context.send(imported=sorted(preload.imported() - known), facts=recorder.facts(context.seed))
        context.send(result=result)
        _exit()

    def _result(self, message: Mapping[str, Any], context: trial.Context) -> dict[str, Any]:
        try:
            _enter_environment(self._spec, message)
            inside.install(lambda: _find_run(context), uri=self._spec.tracking.uri)
            value = self._run_job(message, context)
            inside.settle()
            if message["rank"]:
                return {"state": TrialState.COMPLETE}
            return {"state": TrialState.COMPLETE, **final_metrics(value, context.last, self._spec)}
        except BaseException as error:  # noqa: BLE001  (user code: whatever it raises is the trial's failure)
            pruning = _pruning(error)
            if pruning is not None:
                logging.getLogger("repro_sweep").info("pruned: %s", _text(pruning))
                inside.settle()
                return {"state": TrialState.PRUNED, "metrics": context.last}
            inside.settle(failed=True)
            _print_exception(error)
            kind = FailureKind.PREEMPTED if _gives_way(error, context) else _kind(error)
            return {
                "state": TrialState.FAIL,
                "kind": kind,
                "message": _one_line(error),
                "metrics": context.last,
            }

    def _run_job(self, message: Mapping[str, Any], context: trial.Context) -> object:
        """What ``hydra.core.utils.run_job`` does, at a tenth of its cost."""
        overrides = message["overrides"]
        config = self._composer.compose(overrides)
        _check_drift(to_yaml(config), message["config"])
        determinism = self._spec.determinism
        context.seed = seeding.seed_of(determinism, config, message["identity"])
        seeding.enter(determinism, context.seed)
        job = self._composer.job_config(
            overrides,
            num=message["trial"],
            job_id=str(message["trial"]),
            output_dir=str(context.directory),
            consume=True,
        )
        shell = _hydra_shell(job)
        HydraConfig.instance().cfg = shell  # type: ignore[assignment]  # Hydra's own set_config does the same
        node = job.hydra
        if _changes_directory(node):
            os.chdir(context.directory)
        self._logging.enter(node)
        if node.output_subdir is not None and not message["rank"]:
            folder = context.directory / node.output_subdir
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(message["config"], encoding="utf-8")
            (folder / "hydra.yaml").write_text(hydra_yaml(shell), encoding="utf-8")
            (folder / "overrides.yaml").write_text(to_yaml(node.overrides.task), encoding="utf-8")
        own = {key: str(value) for key, value in node.job.env_set.items() if key != _GPUS}
        os.environ.update(own)
        return _call(self._task, config, job)


def _judged(spec: SweepSpec) -> str | None:
    """The metric by whose reports trials are pruned; None where none is."""
    if spec.pruner is None or spec.pruner.name == "none":
        return None
    return spec.all_objectives[0].metric


def _call(task: Callable[[Any], object], config: DictConfig, job: DictConfig) -> object:
    """Call the task between Hydra's job callbacks, which see its exception as under Hydra."""
    if not job.hydra.callbacks:
        return task(config)
    callbacks = Callbacks(job)
    returned = JobReturn(
        overrides=list(job.hydra.overrides.task), cfg=config, hydra_cfg=job,
        working_dir=str(Path.cwd()), task_name=job.hydra.job.name,
    )  # fmt: skip
    callbacks.on_job_start(config=job, task_function=task)
    try:
        returned.return_value = task(config)
        returned.status = JobStatus.COMPLETED
    except Exception as error:
        returned.return_value = error
        returned.status = JobStatus.FAILED
        callbacks.on_job_end(config=job, job_return=returned)
        raise
    callbacks.on_job_end(config=job, job_return=returned)
    return returned.return_value


def _find_run(context: trial.Context) -> RunRef:
    """The MLflow run of this trial, asked for when the task first uses MLflow."""
    found = context.ask(run=True)
    if found.get("error"):
        raise TrackingError(f"MLflow: the run of this trial cannot be had: {found['error']}")
    return RunRef(run_id=found["run_id"], uri=found["uri"], experiment_id=found["experiment_id"])


def _enter_environment(spec: SweepSpec, message: Mapping[str, Any]) -> None:
    os.environ["REPRO_SWEEP_NAME"] = spec.name
    os.environ["REPRO_SWEEP_TRIAL"] = str(message["trial"])
    os.environ["REPRO_SWEEP_ATTEMPT"] = message["run"]
    if message["gpus"] is not None:
        os.environ[_GPUS] = ",".join(message["gpus"])
    os.environ.update(message["environment"])
    threads.allow(spec.resources)


def _hydra_shell(job: DictConfig) -> DictConfig:
    """What ``HydraConfig.set_config`` makes of a job's config, without its copy of the hydra node."""
    OmegaConf.set_readonly(job.hydra, True)
    shell = OmegaConf.create(flags={"no_deepcopy_set_nodes": True})
    shell["hydra"] = job.hydra
    shell.hydra._set_parent(job)
    return shell


def _changes_directory(node: DictConfig) -> bool:
    chdir = node.job.chdir
    return bool(chdir) if chdir is not None else not version.base_at_least("1.2")


def _check_drift(composed: str, frozen: str) -> None:
    if composed == frozen:
        return
    import difflib

    old, new = frozen.splitlines(), composed.splitlines()
    lines = list(difflib.unified_diff(old, new, "submitted", "now", lineterm="", n=0))
    changed = "; ".join(line for line in lines[2:] if not line.startswith("@"))
    raise DriftError(f"the config has drifted since it was submitted: {changed}")


def _pruning(error: BaseException) -> BaseException | None:
    """The exception by which the task gave its trial up, None where it has failed.

    It is ours, or Optuna's in a task that was written for Optuna; ``hydra.utils.instantiate`` wraps what is raised
    inside of it. What a task itself raises from such an exception is a failure like any other.
    """
    optuna = sys.modules.get("optuna.exceptions")  # not imported for it: only who has it can raise it
    kinds = (TrialPruned, getattr(optuna, "TrialPruned", TrialPruned))
    link: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if not isinstance(link, InstantiationException):
            break
        link = link.__cause__
    return link if isinstance(link, kinds) else None


def _gives_way(error: BaseException, context: trial.Context) -> bool:
    """Whether the task ended because its worker must leave: another attempt goes on, and nothing has failed."""
    link: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if isinstance(link, TrialInterrupted):
            return context.interrupted
        link = link.__cause__ if link is not None else None
    return False


def _kind(error: BaseException) -> FailureKind:
    """The kind of what was raised, or of what that was raised from: ``hydra.utils.instantiate`` wraps exceptions."""
    link: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if link is None:
            break
        kind = _own_kind(link)
        if kind is not FailureKind.EXCEPTION:
            return kind
        link = link.__cause__
    return FailureKind.EXCEPTION


def _own_kind(error: BaseException) -> FailureKind:
    if isinstance(error, DriftError):
        return FailureKind.DRIFT
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return FailureKind.OUT_OF_MEMORY
    if number in FULL_DISK:
        return FailureKind.NODE_LOST  # the machine's fault
    text = _text(error).lower() if isinstance(error, RuntimeError) else ""
    if "defaultcpuallocator" in text and "memory" in text:
        return FailureKind.OUT_OF_MEMORY  # torch's, for the host's memory
    if "out of memory" in text or "cublas_status_alloc_failed" in text:
        return FailureKind.GPU_OUT_OF_MEMORY  # torch's and jax's
    return FailureKind.EXCEPTION


def _text(error: BaseException) -> str:
    """The text of an exception; its ``str`` may itself fail."""
    try:
        return str(error).strip()
    except Exception:  # noqa: BLE001  (user code)
        return "(its text cannot be had)"


def _one_line(error: BaseException) -> str:
    """Type and first line of an exception, without passwords of URLs."""
    text = (
        _text(error).encode("utf-8", "backslashreplace").decode()
    )  # names of files may hold what no JSON can
    first = redacted(text.splitlines()[0]) if text else ""
    if isinstance(error, DriftError | UserError):
        return first[:_MESSAGE_LIMIT]
    return f"{type(error).__name__}: {first}".removesuffix(": ")[:_MESSAGE_LIMIT]


def _print_exception(error: BaseException) -> None:
    try:
        traceback.print_exception(error)
    except Exception:  # noqa: BLE001  (an exception whose own methods fail)
        print(f"{type(error).__name__} (its traceback cannot be printed)", file=sys.stderr)  # noqa: T201


def _exit() -> None:
    """End as an interpreter would, without the cost of tearing down what was only inherited."""
    threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter calls at its end
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
