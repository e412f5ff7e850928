"""Records of sweeps that benchmarks make without a command line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from repro_sweep.states import Direction
from repro_sweep.sweep import Composition, Origin, Resources, SweepSpec, TaskSpec, Tracking


def record(directory: Path, *, uri: str = "sqlite:///:memory:", **changes: Any) -> SweepSpec:
    """The record of a sweep in a directory, by whose name it and its experiment are called, with ``changes``."""
    values: dict[str, Any] = {
        "sweep_id": directory.name, "name": directory.name, "directory": str(directory),
        "task": TaskSpec(module="task", qualname="train", cwd="/"),
        "composition": Composition(
            config_name="config", search_path=(), hydra_overrides=(), job_name="task", version_base="1.3"
        ),
        "resources": Resources(), "tracking": Tracking(uri=uri, experiment=directory.name),
        "origin": Origin(user="bench", host="localhost", command="repro-sweep +sweep=bench"),
        "metric": "value", "direction": Direction.MAXIMIZE, "executor_name": "local", "executor": {},
        "sampler": "grid", "max_failures": None, "log_limit_mb": 1.0, "created_at": time.time(),
    }  # fmt: skip
    return SweepSpec(**(values | changes))
