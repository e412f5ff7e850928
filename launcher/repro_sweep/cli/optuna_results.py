"""``optimization_results.yaml``, which applications written for hydra-optuna-sweeper may read."""

from __future__ import annotations

from pathlib import Path

from repro_sweep.config.optuna_sweeper import results_yaml
from repro_sweep.ledger import Ledger
from repro_sweep.standings import front_of, ranked_rows

FILE_NAME = "optimization_results.yaml"


def write(directory: Path) -> None:
    """Write the best point of a sweep, or its Pareto front, into its directory; nothing where there is none."""
    ledger = Ledger.open(directory, readonly=True)
    try:
        spec = ledger.spec
        rows = ranked_rows(spec, ledger.trials(), ledger.attempts())
    finally:
        ledger.close()
    objectives = len(spec.all_objectives)
    if best := front_of(rows):
        points = [(row.params, [mean for mean in row.means if mean is not None]) for row in best]
        (directory / FILE_NAME).write_text(results_yaml(points, objectives), encoding="utf-8")
