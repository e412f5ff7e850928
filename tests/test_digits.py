"""The reference study: its data, its training and its config tree."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from sklearn.datasets import load_digits

import repro_sweep
from sweeps import digits

ROOT = Path(__file__).resolve().parent.parent
IMAGES_IN_ALL = 1797


class CutOffError(Exception):
    """Stands for the end of an attempt in the middle of its training."""


class FakeTrial:
    """What ``repro_sweep`` offers to a task function, with its directories below ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reports: list[tuple[int, dict[str, float]]] = []
        self.cut_off_in_epoch: int | None = None

    def report(self, epoch: int, **metrics: float) -> None:
        if epoch == self.cut_off_in_epoch:
            raise CutOffError
        self.reports.append((epoch, metrics))

    def directory(self, name: str) -> Path:
        directory = self.path / name
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    @property
    def model_bytes(self) -> bytes:
        return (self.directory("artifacts") / "model.pt").read_bytes()


NewTrial = Callable[[str], FakeTrial]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a trial. Threads that wait for each other on a busy machine would make this ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def new_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NewTrial:
    def begin(name: str) -> FakeTrial:
        trial = FakeTrial(tmp_path / name)
        monkeypatch.setattr(repro_sweep, "report", trial.report)
        monkeypatch.setattr(repro_sweep, "artifact_dir", lambda: trial.directory("artifacts"))
        monkeypatch.setattr(repro_sweep, "checkpoint_dir", lambda: trial.directory("checkpoints"))
        return trial

    return begin


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose("config", overrides=list(overrides))


def environment() -> dict[str, str]:
    """Of a process that imports what this one can, with threads limited as the launcher does."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
        # scikit-learn imports pandas, pandas pyarrow, and pyarrow's jemalloc would start a thread.
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
    }


def test_the_splits_are_disjoint_and_cover_every_image() -> None:
    rows = digits.split_indices(load_digits().target, config().dataset)
    assert list(rows) == ["train", "validation", "test"]
    assert not any(set(a) & set(b) for a, b in combinations(rows.values(), 2))
    assert sorted(np.concatenate(list(rows.values()))) == list(range(IMAGES_IN_ALL))
    assert [len(part) for part in rows.values()] == [1078, 359, 360]


def test_the_splits_are_stratified_by_digit() -> None:
    labels = load_digits().target
    wanted = np.bincount(labels)
    for rows in digits.split_indices(labels, config().dataset).values():
        assert np.abs(np.bincount(labels[rows]) - wanted * len(rows) / IMAGES_IN_ALL).max() <= 1


def test_the_splits_do_not_depend_on_the_seed() -> None:
    splits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # the state that scikit-learn would fall back on
        splits.append(digits.load_splits(config(f"seed={seed}").dataset, torch.device("cpu")))
    for name, (images, labels) in splits[0].items():
        assert torch.equal(images, splits[1][name][0])
        assert torch.equal(labels, splits[1][name][1])


def test_images_are_sequences_of_rows_scaled_to_one() -> None:
    for images, labels in digits.load_splits(config().dataset, torch.device("cpu")).values():
        assert images.shape == (len(labels), 8, 8)
        assert images.min().item() == 0
        assert images.max().item() == 1


@pytest.mark.parametrize("model", ["lstm", "bi_lstm"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_the_same_config_trains_to_the_same_bits(new_trial: NewTrial, model: str, optimizer: str) -> None:
    cfg = config(f"model={model}", f"optimizer={optimizer}", "epochs=1", "seed=3")
    first = new_trial("first")
    metrics = digits.train(cfg)
    second = new_trial("second")
    assert digits.train(cfg) == metrics
    assert second.reports == first.reports
    assert second.model_bytes == first.model_bytes


def test_another_seed_trains_to_other_bits(new_trial: NewTrial) -> None:
    first = new_trial("first")
    digits.train(config("epochs=1", "seed=0"))
    second = new_trial("second")
    digits.train(config("epochs=1", "seed=1"))
    assert second.model_bytes != first.model_bytes


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_training_that_was_cut_off_resumes_to_the_same_bits(new_trial: NewTrial, optimizer: str) -> None:
    cfg = config(f"optimizer={optimizer}", "epochs=3")
    whole = new_trial("whole")
    metrics = digits.train(cfg)

    resumed = new_trial("resumed")
    resumed.cut_off_in_epoch = 1
    with pytest.raises(CutOffError):
        digits.train(cfg)
    resumed.cut_off_in_epoch = None
    assert digits.train(cfg) == metrics
    assert [epoch for epoch, _ in resumed.reports] == [0, 1, 2]  # no epoch was trained twice
    assert resumed.reports == whole.reports
    assert resumed.model_bytes == whole.model_bytes


def test_a_training_cut_off_after_its_last_epoch_only_evaluates_again(new_trial: NewTrial) -> None:
    trial = new_trial("trial")
    cfg = config("epochs=1")
    metrics = digits.train(cfg)
    assert digits.train(cfg) == metrics
    assert len(trial.reports) == 1


def test_a_checkpoint_that_was_not_finished_is_not_taken_up(new_trial: NewTrial) -> None:
    trial = new_trial("trial")
    (trial.directory("checkpoints") / "checkpoint.tmp").write_bytes(b"torn")
    digits.train(config("epochs=1"))
    assert len(trial.reports) == 1
    assert [file.name for file in trial.directory("checkpoints").iterdir()] == ["checkpoint.pt"]


def test_a_training_reports_each_epoch_and_returns_its_final_metrics(new_trial: NewTrial) -> None:
    trial = new_trial("trial")
    metrics = digits.train(config("epochs=2"))
    assert [epoch for epoch, _ in trial.reports] == [0, 1]
    assert all(report.keys() == {"train_loss", "val_loss", "val_accuracy"} for _, report in trial.reports)
    assert metrics.keys() == {"val_accuracy", "val_loss", "test_accuracy", "test_loss"}
    assert metrics["val_accuracy"] == trial.reports[-1][1]["val_accuracy"]
    assert all(type(value) is float for value in metrics.values())


def test_the_saved_model_and_the_picture_can_be_read_again(new_trial: NewTrial) -> None:
    trial = new_trial("trial")
    cfg = config("epochs=1")
    metrics = digits.train(cfg)
    artifacts = trial.directory("artifacts")
    assert (artifacts / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG\r\n")
    model = digits.RowClassifier(cfg.model)
    model.load_state_dict(torch.load(artifacts / "model.pt", weights_only=True))
    splits = digits.load_splits(cfg.dataset, torch.device("cpu"))
    assert digits.evaluate(model, *splits["test"]) == (metrics["test_loss"], metrics["test_accuracy"])


def test_each_optimizer_holds_only_its_own_settings() -> None:
    assert config("optimizer=SGD").optimizer.keys() == {"name", "lr", "momentum", "nesterov"}
    assert config("optimizer=Adam").optimizer.keys() == {"name", "lr", "beta1", "beta2"}


def test_an_unknown_optimizer_is_named_in_the_error() -> None:
    cfg = config("optimizer.name=Adagrad")
    with pytest.raises(ValueError, match="'Adagrad' is not an optimizer of this study"):
        digits.build_optimizer(cfg.optimizer, [])


def test_the_optimizer_grid_sweeps_only_settings_that_exist_with_their_choice() -> None:
    sweep = yaml.safe_load((ROOT / "conf/sweep/optimizer_grid.yaml").read_text(encoding="utf-8"))
    for optimizer, axes in sweep["params"]["optimizer"].items():
        for model in sweep["params"]["model"].split(","):
            cfg = config(f"optimizer={optimizer}", f"model={model}")
            for key, values in axes.items():
                for value in values.split(","):
                    config(f"optimizer={optimizer}", f"{key}={value}")
                assert key.removeprefix("optimizer.") in cfg.optimizer


def test_the_module_can_be_imported_before_a_fork() -> None:
    program = (
        "import os, sys, torch, sweeps.digits\n"
        "assert len(os.listdir('/proc/self/task')) == 1, 'it started a thread'\n"
        "assert not torch.cuda.is_initialized(), 'it touched CUDA'\n"
        "assert 'matplotlib' not in sys.modules, 'it imported matplotlib'\n"
    )
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True)


def test_the_study_runs_under_plain_hydra(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sweeps.digits", "epochs=1", f"hydra.run.dir={tmp_path}/run"]
    subprocess.run(command, cwd=tmp_path, env=environment(), check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert sum(1 for _ in (tmp_path / "run").rglob("model.pt")) == 1
