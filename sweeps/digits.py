"""Reads handwritten digits row by row with a small LSTM: the task function of the reference study.

The data are the 1,797 real images of 8x8 that scikit-learn ships, each a sequence of 8 rows of 8 values.
``train`` is an ordinary Hydra task function; three calls tie it to repro-sweep, and all three work under
plain Hydra too (``python -m sweeps.digits optimizer=SGD``):

- ``repro_sweep.report`` after each epoch: the metrics appear while the trial runs, and it may be pruned;
- ``repro_sweep.checkpoint_dir``: a trial that was cut off goes on where it was, and ends with the same bits;
- ``repro_sweep.artifact_dir``: what is kept of the trial, beside its metrics.

Importing this module must start no threads and must not touch CUDA, so that trials can be forked from a
process that has imported it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import repro_sweep

CLASSES = 10
ROW_WIDTH = 8
BRIGHTEST = 16.0


def train(cfg: DictConfig) -> dict[str, float]:
    """Train one classifier and return its final metrics.

    The same config gives the same bits on the same kind of CPU, also if the training was cut off and resumed.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(cfg.seed)
    splits = load_splits(cfg.dataset, device)
    model = RowClassifier(cfg.model).to(device)
    optimizer = build_optimizer(cfg.optimizer, model.parameters())

    checkpoint = repro_sweep.checkpoint_dir() / "checkpoint.pt"
    for epoch in range(resume(checkpoint, model, optimizer), cfg.epochs):
        train_loss = train_one_epoch(model, optimizer, *splits["train"], cfg.batch_size)
        val_loss, val_accuracy = evaluate(model, *splits["validation"])
        repro_sweep.report(epoch, train_loss=train_loss, val_loss=val_loss, val_accuracy=val_accuracy)
        save_checkpoint(checkpoint, model, optimizer, epochs_done=epoch + 1)

    val_loss, val_accuracy = evaluate(model, *splits["validation"])
    test_loss, test_accuracy = evaluate(model, *splits["test"])
    artifacts = repro_sweep.artifact_dir()
    draw_confusion_matrix(artifacts / "confusion_matrix.png", model, *splits["test"])
    torch.save(model.cpu().state_dict(), artifacts / "model.pt")
    return {
        "val_accuracy": val_accuracy,
        "val_loss": val_loss,
        "test_accuracy": test_accuracy,
        "test_loss": test_loss,
    }


class RowClassifier(nn.Module):
    """Reads an image's rows from top to bottom (and upwards too if bidirectional), then names the digit."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.lstm = nn.LSTM(ROW_WIDTH, cfg.hidden_size, bidirectional=cfg.bidirectional, batch_first=True)
        self.head = nn.Linear(cfg.hidden_size * (2 if cfg.bidirectional else 1), CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, 8, 8) to logits (n, 10)."""
        _, (last_hidden, _) = self.lstm(images)
        logits: Tensor = self.head(last_hidden.transpose(0, 1).flatten(start_dim=1))
        return logits


def build_optimizer(cfg: DictConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that ``cfg.name`` names, with the settings that exist only for it."""
    match cfg.name:
        case "SGD":
            return torch.optim.SGD(parameters, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov)
        case "Adam":
            return torch.optim.Adam(parameters, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))
        case other:
            raise ValueError(f"optimizer.name: {other!r} is not an optimizer of this study (SGD, Adam)")


def split_indices(labels: np.ndarray[Any, Any], cfg: DictConfig) -> dict[str, np.ndarray[Any, Any]]:
    """Which images are for training, validation and test: the same in every trial, stratified by digit."""
    everything = np.arange(len(labels))
    held_out = cfg.validation_fraction + cfg.test_fraction
    train_rows, held_out_rows = train_test_split(
        everything, test_size=held_out, stratify=labels, random_state=cfg.split_seed
    )
    validation_rows, test_rows = train_test_split(
        held_out_rows,
        test_size=cfg.test_fraction / held_out,
        stratify=labels[held_out_rows],
        random_state=cfg.split_seed,
    )
    return {"train": train_rows, "validation": validation_rows, "test": test_rows}


def load_splits(cfg: DictConfig, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Images (n, 8, 8) in 0..1 and labels (n,) of each split."""
    digits = load_digits()
    images = torch.tensor(digits.images / BRIGHTEST, dtype=torch.float32, device=device)
    labels = torch.tensor(digits.target, dtype=torch.int64, device=device)
    return {name: (images[rows], labels[rows]) for name, rows in split_indices(digits.target, cfg).items()}


def train_one_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, batch_size: int
) -> float:
    """One pass over the images in random order; returns the mean loss."""
    total_loss = 0.0
    order = torch.randperm(len(images))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        loss = cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total_loss += loss.item() * len(batch)
    return total_loss / len(images)


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy."""
    with torch.inference_mode():
        logits = model(images)
        correct = int((logits.argmax(dim=1) == labels).sum())
        return cross_entropy(logits, labels).item(), correct / len(images)


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epochs_done: int) -> None:
    """Replace the checkpoint in one step: whoever is killed here leaves the old one or the new one, whole."""
    state = {
        "epochs_done": epochs_done,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Take up the checkpoint if an earlier attempt left one; returns how many epochs are done."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return int(state["epochs_done"])


def draw_confusion_matrix(path: Path, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """A picture of how often each digit (row) was taken for which (column)."""
    # Imported here, as it would slow down every import of the module.
    # A Figure without pyplot draws with Agg: no display, no state left behind.
    from matplotlib.figure import Figure

    with torch.inference_mode():
        predicted = model(images).argmax(dim=1)
    pairs = torch.bincount(labels * CLASSES + predicted, minlength=CLASSES**2)
    counts = pairs.reshape(CLASSES, CLASSES).cpu().numpy()
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="true", xticks=range(CLASSES), yticks=range(CLASSES))
    axes.imshow(counts, cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        if count > 0:
            shade = "white" if count > counts.max() / 2 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=shade)
    figure.savefig(path)


if __name__ == "__main__":
    hydra.main(version_base=None, config_path="../conf", config_name="config")(train)()
