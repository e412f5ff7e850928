"""The peer of ``sleep`` and of ``ray_*``: Ray Tune with a function trainable. A script: see ``--help``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import types
from pathlib import Path

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS="0", RAY_DEDUP_LOGS="1")


def main(trials: int, slots: int, *, reuse: bool, address: str | None) -> None:
    """Run the task under Ray Tune, its files in a temporary folder; on a Ray of its own, unless an address is given."""
    import ray
    from ray import tune

    project = str(Path.cwd())

    def trainable(config: dict[str, float]) -> dict[str, float]:
        if project not in sys.path:
            sys.path.insert(0, project)
        from task import train

        return train(types.SimpleNamespace(**config))

    with tempfile.TemporaryDirectory(prefix="ray-") as temporary:
        if address is None:
            ray.init(
                num_cpus=slots, include_dashboard=False, _temp_dir=temporary, _node_ip_address="127.0.0.1",
                log_to_driver=False,
            )  # fmt: skip
        else:
            ray.init(address, log_to_driver=False)
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
    parser = argparse.ArgumentParser()
    parser.add_argument("trials", type=int)
    parser.add_argument("slots", type=int)
    parser.add_argument("--reuse", action="store_true", help="reuse_actors")
    parser.add_argument("--address", help="a Ray that runs")
    main(**vars(parser.parse_args()))
