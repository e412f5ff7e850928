"""The Hydra Sweeper plugin: the front door of every sweep, with the ``repro-sweep`` command or without."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from repro_sweep.config import schema

_OPTUNA_SWEEPER = "hydra_optuna_sweeper"

schema.register()


class ReproSweeper(Sweeper):
    """Hands a multirun over to repro-sweep; ends the process with its exit status unless that is 0."""

    def __init__(self, *, plan: bool = False, **options: Any) -> None:
        del options  # what prepares the sweep reads them from the config
        self._plan = plan
        self._context: HydraContext | None = None
        self._config: DictConfig | None = None
        self._task: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over."""
        self._context, self._config, self._task = hydra_context, config, task_function
        if not self._plan:
            from repro_sweep.tracking import child

            child.start_early()

    def sweep(self, arguments: list[str]) -> None:
        """Run the sweep that the config and ``arguments``, the task's overrides, describe."""
        from repro_sweep.cli import run
        from repro_sweep.cli.main import say

        assert self._context is not None
        assert self._config is not None
        assert self._task is not None
        if self._config.hydra.runtime.choices.get("hydra/sweeper") == "optuna":
            say(
                "hydra/sweeper=optuna: hydra-optuna-sweeper is not installed; this is hydra/sweeper=repro_sweep"
            )
        code = run.main(self._config, self._context.config_loader, arguments, self._task, plan=self._plan)
        if code != 0:
            self._context.callbacks.on_multirun_end(
                config=self._config, config_name=self._config.hydra.job.config_name
            )
            sys.exit(code)


if find_spec(f"hydra_plugins.{_OPTUNA_SWEEPER}") is None:
    # Many an application's YAML repeats that plugin's hydra.sweeper._target_. Of the classes that Hydra sees in this
    # module it finds one by __module__ and __name__, and makes the one that __module__ and __qualname__ lead to.
    OptunaSweeper = type(
        f"{_OPTUNA_SWEEPER}.optuna_sweeper.OptunaSweeper",
        (ReproSweeper,),
        {"__module__": "hydra_plugins", "__qualname__": "repro_sweep.sweeper.ReproSweeper"},
    )
