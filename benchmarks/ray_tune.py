"""The peer of ``sleep``: Ray Tune with a function trainable. A script: ``ray_tune.py TRIALS SLOTS [--reuse]``."""

from __future__ import annotations

import os
import sys
import tempfile
import types
from pathlib import Path

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS="0", RAY_DEDUP_LOGS="1")


def main(trials: int, slots: int, *, reuse: bool) -> None:
    """Run the project's task under Ray Tune, everything on the loopback interface and in a temporary folder."""
    import ray
    from ray import tune

    project = str(Path.cwd())

    def trainable(config: dict[str, float]) -> dict[str, float]:
        if project not in sys.path:
            sys.path.insert(0, project)
        from task import train

        return train(types.SimpleNamespace(**config))

    with tempfile.TemporaryDirectory(prefix="ray-") as temporary:
        ray.init(
            num_cpus=slots, include_dashboard=False, _temp_dir=temporary, _node_ip_address="127.0.0.1",
            log_to_driver=False,
        )  # fmt: skip
        try:
            results = tune.Tuner(
                trainable,
                param_space={"x": tune.grid_search(list(range(trials)))},
                tune_config=tune.TuneConfig(max_concurrent_trials=slots, reuse_actors=reuse),
                run_config=tune.RunConfig(storage_path=f"{temporary}/results", verbose=0),
            ).fit()
            if results.num_errors:
                raise RuntimeError(f"{results.num_errors} trials failed: {results.errors[0]}")
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), reuse="--reuse" in sys.argv)
