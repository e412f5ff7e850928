"""``search_asha``: the digits study as a search, with and without its pruner."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness
from benchmarks.report import OURS, Table, Target, number

_SWEEP = "optimizer_search"
_WHOLE = "optimizer_search_unpruned"
_METRIC = "val_accuracy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search found: the best accuracy of a trial that ran to its end, and the epochs that all trials took."""

    best: float
    epochs: int
    pruned: int
    took_s: float


def standard_error(accuracy: float, images: int) -> float:
    """Of an accuracy that was measured on so many images (binomial)."""
    return math.sqrt(accuracy * (1 - accuracy) / images)


def asha(folder: Path, *, quick: bool) -> Table:
    """Best accuracy and epochs of the reference search, beside the same search without its pruner."""
    seeds, trials = ((0,), 6) if quick else ((0, 1, 2), None)
    _copy_study(folder)
    pairs = [tuple(_search(folder, sweep, seed, trials) for sweep in (_SWEEP, _WHOLE)) for seed in seeds]
    images = _validation_images(folder)
    lines = []
    for seed, (pruned, whole) in zip(seeds, pairs, strict=True):
        share = pruned.epochs / whole.epochs
        lines += [
            _line(seed, OURS, pruned, f"{number(share)} of the epochs"),
            _line(
                seed,
                "without pruner",
                whole,
                f"± {standard_error(whole.best, images):.4f}, one standard error",
            ),
        ]
    ours, theirs = (statistics.fmean(pair[side].best for pair in pairs) for side in (0, 1))
    share = max(pruned.epochs / whole.epochs for pruned, whole in pairs)
    return Table(
        title="search_asha: the digits study, pruned",
        text=f"`+sweep={_SWEEP}` (TPE, ASHA) beside the same search without its pruner, the same seed, the same number"
        f" of trials. The best accuracy is that of the first in the ranking, on {images} images for validation; an"
        " epoch is a report in the ledger. The best of many accuracies is a matter of luck by an image or two, so what"
        f" counts is the mean over the seeds: {ours:.4f} with the pruner, {theirs:.4f} without.",
        unit="",
        rows=(),
        grid=(("seed", "best accuracy", "epochs", "trials pruned", "s", "system", "remarks"), *lines),
        targets=[
            Target(
                what="the best accuracy is lower by", limit=1.0, unit="standard errors",
                value=max(0.0, theirs - ours) / standard_error(theirs, images),
            ),
            Target(what="share of the epochs (the largest)", value=share, limit=1 / 3, unit=""),
        ],
    )  # fmt: skip


def _line(seed: int, system: str, found: Found, note: str) -> tuple[str, ...]:
    figures = (f"{found.best:.4f}", f"{found.epochs:,}", str(found.pruned), f"{found.took_s:.0f}")
    return (str(seed), *figures, f"**{system}**" if system == OURS else system, note)


def _copy_study(folder: Path) -> None:
    """The repository's study, and its search again without the pruner."""
    from omegaconf import OmegaConf

    harness.copy_study(folder)
    conf = OmegaConf.load(folder / f"conf/sweep/{_SWEEP}.yaml")
    conf.defaults = [each for each in conf.defaults if each == "_self_" or "pruner" not in each]
    conf.pop("pruner", None)
    OmegaConf.save(conf, folder / f"conf/sweep/{_WHOLE}.yaml")


def _search(folder: Path, sweep: str, seed: int, trials: int | None) -> Found:
    name = f"{sweep}-{seed}"
    # what one search has found must not become the other's result
    options = [f"sweep.name={name}", f"sweep.sampler.seed={seed}", "sweep.reuse=false"]
    options += [f"sweep.budget.trials={trials}"] if trials is not None else []
    harness.run([*harness.front_door(), f"+sweep={sweep}", *options], folder)
    with harness.ledger(folder, name) as db:
        states, took_s = harness.outcome(db)
        best = db.execute(
            "SELECT max(json_extract(metrics, ?)) FROM attempts WHERE state = 'COMPLETE'", (f"$.{_METRIC}",)
        ).fetchone()[0]
        epochs = db.execute("SELECT count(*) FROM reports").fetchone()[0]
    if best is None or set(states) - {"COMPLETE", "PRUNED"}:
        raise harness.BenchmarkError(f"{folder}: trials of {name} ended as {states}")
    return Found(best=best, epochs=epochs, pruned=states.get("PRUNED", 0), took_s=took_s)


def _validation_images(folder: Path) -> int:
    from omegaconf import OmegaConf
    from sklearn.datasets import load_digits

    from sweeps.digits import split_indices

    labels = load_digits().target
    return len(split_indices(labels, OmegaConf.load(folder / "conf/dataset/digits.yaml"))["validation"])
