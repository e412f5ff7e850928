"""The systems of ``upload``: each puts the same short trials into the server that the environment names. A script.

Each prints one JSON line: the seconds from the moment when everything is imported to the moment when its client says
that all is sent. ``mlflow.*`` are what MLflow's documentation shows, in one process; ``ray_tune`` is Ray Tune with its
own callback.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

STEPS = 20
METRICS = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate")
PARAMS = 10
CONFIG = "config.yaml"


def params(number: int) -> dict[str, float]:
    """The params of a trial."""
    return {f"p{index}": number + index / PARAMS for index in range(PARAMS)}


def curve(number: int) -> Iterator[tuple[int, dict[str, float]]]:
    """What a trial reports: its steps, and the value of each metric there."""
    for step in range(STEPS):
        yield step, {name: number + step / 1000 + index for index, name in enumerate(METRICS)}


def config(number: int) -> str:
    """The config of a trial, which is an artifact of its run."""
    return "".join(f"{key}: {value}\n" for key, value in params(number).items())


def tracker(trials: int, folder: Path) -> float:
    """The tracker of repro-sweep, with the sweep in ``folder``; the loop is that of ``tracking.process``."""
    import threading

    from repro_sweep.tracking.mlflow import MlflowTracker
    from repro_sweep.tracking.store import import_mlflow, prepare_environment

    prepare_environment()
    import_mlflow()
    woken = threading.Event()
    began = time.perf_counter()
    running = MlflowTracker(folder, wake=woken.set)
    running.finish()
    while not running.progress.done:
        woken.wait(running.sync())
        woken.clear()
    left, took = running.progress.left, time.perf_counter() - began
    running.close()
    if left:
        raise RuntimeError(f"{left} of {trials} trials are left: {running.progress.error}")
    return took


def mlflow_log_metric(trials: int, folder: Path) -> float:
    """MLflow's client as its documentation begins: a call for each value."""
    import mlflow

    def log(values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            mlflow.log_metric(key, value, step=step)

    return _with_mlflow(trials, folder, log)


def mlflow_log_metrics(trials: int, folder: Path) -> float:
    """The same with a call for each step."""
    import mlflow

    return _with_mlflow(trials, folder, lambda values, step: mlflow.log_metrics(values, step=step))


def mlflow_async(trials: int, folder: Path) -> float:
    """The same as the first, with what is logged sent from other threads."""
    import mlflow

    mlflow.config.enable_async_logging()
    return mlflow_log_metric(trials, folder)


def _with_mlflow(trials: int, folder: Path, log: Callable[[dict[str, float], int], None]) -> float:
    import mlflow

    mlflow.set_experiment(folder.name)
    began = time.perf_counter()
    for number in range(trials):
        with mlflow.start_run():
            mlflow.log_params(params(number))
            for step, values in curve(number):
                log(values, step)
            file = folder / CONFIG
            file.write_text(config(number), encoding="utf-8")
            mlflow.log_artifact(str(file))
    mlflow.flush_async_logging()
    return time.perf_counter() - began


def ray_tune(trials: int, folder: Path) -> float:
    """Ray Tune with its callback for MLflow, on a Ray of its own; its start does not count."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS="0")
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    def trainable(given: dict[str, float]) -> None:
        for step in range(STEPS):
            tune.report({name: given["p0"] + step / 1000 + index for index, name in enumerate(METRICS)})

    callback = MLflowLoggerCallback(
        tracking_uri=os.environ["MLFLOW_TRACKING_URI"], experiment_name=folder.name, save_artifact=True
    )
    space = params(0) | {"p0": tune.grid_search([float(number) for number in range(trials)])}
    with tempfile.TemporaryDirectory(prefix="ray-") as temporary:
        ray.init(
            num_cpus=1, include_dashboard=False, _temp_dir=temporary, _node_ip_address="127.0.0.1",
            log_to_driver=False,
        )  # fmt: skip
        try:
            run = tune.RunConfig(storage_path=f"{temporary}/results", verbose=0, callbacks=[callback])
            began = time.perf_counter()
            results = tune.Tuner(trainable, param_space=space, run_config=run).fit()
            took = time.perf_counter() - began
        finally:
            ray.shutdown()
    if results.num_errors:
        raise RuntimeError(f"{results.num_errors} trials failed: {results.errors[0]}")
    return took


SYSTEMS: dict[str, Callable[[int, Path], float]] = {
    each.__name__: each for each in (tracker, mlflow_log_metric, mlflow_log_metrics, mlflow_async, ray_tune)
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("trials", type=int)
    parser.add_argument("folder", type=Path, help="the sweep's, or one whose name is the experiment's")
    args = parser.parse_args()
    print(
        json.dumps({"seconds": SYSTEMS[args.system](args.trials, args.folder)}),
        file=sys.__stdout__,
        flush=True,
    )
