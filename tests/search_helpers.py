"""Small searches: a project, and what its ledger says of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import Project

from repro_sweep.ledger import Ledger
from repro_sweep.records import Attempt, Step, Trial
from repro_sweep.states import StepKind, TrialState

HEAD = "defaults: [base_sweep, sampler: tpe, executor: local, _self_]"
SEARCH = f"""
{HEAD}
task: tasks.train
metric: loss
budget: {{trials: 16}}
params:
  x: interval(-5, 5)
  opt: {{a: {{z: "interval(0, 1)"}}, b: {{}}}}
  n: range(1, 4)
executor: {{slots: 2}}
"""
FILES = {
    "conf/config.yaml": "{x: 0.0, n: 1, opt: a, z: 0.0, seed: 0, wait_s: 0.0, fail_below: -100, steps: 0}",
    "conf/sweep/search.yaml": SEARCH,
    "tasks.py": """
        import os
        import time

        import repro_sweep

        def train(cfg):
            with open("ran", "a") as ran:
                print(os.environ["REPRO_SWEEP_TRIAL"], file=ran)
            time.sleep(cfg.wait_s)
            if cfg.x < cfg.fail_below and not os.path.exists("mended"):
                raise RuntimeError("too low")
            loss = (cfg.x - 1) ** 2 + cfg.n + (cfg.z if cfg.opt == "a" else 0.5) + 0.01 * cfg.seed
            for step in range(cfg.steps):
                repro_sweep.report(step, loss=loss + cfg.steps - 1 - step)
            return {"loss": loss, "cost": cfg.n, "x": cfg.x}
    """,
}


WITHOUT_MLFLOW = """
import sys

from repro_sweep.cli import session
from repro_sweep.cli.main import main
from repro_sweep.tracking.base import Progress


class NoTracker:
    progress = Progress(left=0, done=True)

    def __init__(self, *_, **__):
        pass

    async def start(self):
        pass

    async def finish(self, timeout_s):
        return 0

    async def kill(self):
        pass


session.TrackerProcess = NoTracker
sys.argv[0] = "repro-sweep"
main(sys.argv[1:])
"""
"""The command in which nobody follows the sweep into MLflow: importing that takes longer than a small search."""


@dataclass(frozen=True)
class Searched:
    """What the ledger of a search holds."""

    trials: tuple[Trial, ...]
    attempts: tuple[Attempt, ...]
    steps: tuple[Step, ...]
    over: str | None
    reports: int
    withdrawn: frozenset[int]

    @classmethod
    def read(cls, directory: Path) -> Searched:
        ledger = Ledger.open(directory, readonly=True)
        try:
            return cls(
                trials=tuple(sorted(ledger.trials(), key=lambda trial: trial.number)),
                attempts=tuple(ledger.attempts()),
                steps=tuple(ledger.steps()),
                over=ledger.search_over,
                reports=len(ledger.reports(limit=1_000_000)),
                withdrawn=ledger.withdrawn,
            )
        finally:
            ledger.close()

    def asks(self) -> list[dict[str, Any]]:
        """The suggestions in their order."""
        return [step.data for step in self.steps if step.kind is StepKind.ASK]

    def values(self) -> list[dict[str, Any]]:
        """What was suggested, in its order."""
        return [ask["values"] for ask in self.asks()]

    def count(self, state: TrialState) -> int:
        """How many trials are in a state."""
        return sum(trial.state is state for trial in self.trials)

    def metrics(self, number: int) -> dict[str, float]:
        """The final metrics of a trial."""
        return [attempt.metrics for attempt in self.attempts if attempt.trial == number][-1]


def searched(project: Project, name: str = "search") -> Searched:
    """What a project's search has come to."""
    return Searched.read(project.root / "multirun" / name)
