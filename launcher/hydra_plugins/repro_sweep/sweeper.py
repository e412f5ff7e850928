"""The Hydra Sweeper plugin: the front door of every sweep, with the ``repro-sweep`` command or without."""

from __future__ import annotations

import sys
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from repro_sweep.config import schema

schema.register()


class ReproSweeper(Sweeper):
    """Hands a multirun over to repro-sweep; ends the process with its exit status unless that is 0."""

    def __init__(self, params: dict[str, Any] | None = None, *, plan: bool = False) -> None:
        del params  # the space reads them from the config
        self._plan = plan
        self._context: HydraContext | None = None
        self._config: DictConfig | None = None
        self._task: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over."""
        self._context, self._config, self._task = hydra_context, config, task_function

    def sweep(self, arguments: list[str]) -> None:
        """Run the sweep that the config and ``arguments``, the task's overrides, describe."""
        from repro_sweep.cli import run

        assert self._context is not None
        assert self._config is not None
        assert self._task is not None
        code = run.main(self._config, self._context.config_loader, arguments, self._task, plan=self._plan)
        if code != 0:
            self._context.callbacks.on_multirun_end(
                config=self._config, config_name=self._config.hydra.job.config_name
            )
            sys.exit(code)
